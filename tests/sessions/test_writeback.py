"""Write-backs: beside what arrives, and when a copy fails in the middle of one."""

from __future__ import annotations

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import TransferError
from djinn_core.sessions import SessionState, writeback
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, released, wait_for

LINK_GBPS = 0.001  # 15 tokens of a layer take 8 ms
LAYER_BYTES = 64 << 10

pytestmark = pytest.mark.timeout(60)


def test_a_session_leaves_while_another_one_arrives(rig: Rig) -> None:
    """Each way of the link has a stream of its own, and neither waits for the other."""
    arriving, leaving = released(rig, 1), rig.open()
    leaving.forward(prompt(seed=2))
    rig.device.link_gbps = LINK_GBPS
    rig.sessions.pager.events.clear()
    arriving.resume()
    leaving.pause()
    arriving.wait_until("restored", 10)
    leaving.wait_until("clean", 10)
    copies = {event.event: event.copies for event in rig.sessions.pager.events if event.event.startswith("swap")}
    (in_begun, in_done), (out_begun, out_done) = copies["swap_in"], copies["swap_out"]
    both_ms = min(in_begun.elapsed_time(in_done), in_begun.elapsed_time(out_done)) - in_begun.elapsed_time(out_begun)
    assert both_ms > in_begun.elapsed_time(in_done) / 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["refused", "failing later"])
@pytest.mark.parametrize("nth", range(1, LAYERS + 1))
def test_a_victim_stays_whole_where_it_is_when_a_copy_fails(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, nth: int, asynchronous: bool
) -> None:
    monkeypatch.setattr(writeback, "GROUP_BYTES", 1)  # each layer could leave by itself
    rig = make_rig()
    pager, session, oracle = rig.sessions.pager, rig.open(), Oracle(rig.stock)
    ids = session.forward(prompt()).float().argmax(-1)[:, None]
    oracle.forward(prompt())
    with monkeypatch.context() as no_writer:
        no_writer.setattr(pager, "_clean", lambda holding: None)
        session.pause()
        wait_for(lambda: not session._holding.queued)
    rig.device.link_gbps = LINK_GBPS
    rig.device.faults = plan = FaultPlan().fail("copy", nth, asynchronous=asynchronous)
    with pytest.raises(TransferError):
        pager.evict(session._holding)
    assert plan.fired and pager.d2h.query(), "a copy may still read what others can take now"
    assert session.state is SessionState.PAUSED and rig.kv_bytes == LAYERS * LAYER_BYTES
    rig.device.faults = None
    assert pager.evict(session._holding)
    assert session.state is SessionState.SWAPPED and not rig.kv_bytes
    session.resume()
    assert torch.equal(session.forward(ids), oracle.forward(ids))


def test_a_victim_that_the_host_has_not_all_room_for_makes_the_room_that_it_can(make_rig: MakeRig) -> None:
    """Three sessions of four units, seven on the device and nine on the host: each that was admitted can go on."""
    rig = make_rig(host_bytes=9 * LAYER_BYTES)
    sessions = [rig.open()]
    others = sum(size_bytes for _, size_bytes in rig.pool.usage().held.items())
    rig.pool.resize(others + 7 * LAYER_BYTES)
    sessions += [rig.open(), rig.open()]
    oracle = Oracle(rig.stock)
    ids = oracle.forward(prompt(seed=1)).float().argmax(-1)[:, None]
    for seed, session in enumerate(sessions[:2], start=1):
        session.forward(prompt(seed=seed))
        session.pause(release=True)
        session.wait_until("released", 10)
    sessions[2].forward(prompt(seed=3))
    sessions[2].pause()
    sessions[0].resume()
    assert torch.equal(sessions[0].forward(ids), oracle.forward(ids))
