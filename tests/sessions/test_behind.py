"""Writing behind: a prefill that stops is on the host by then, and nothing that goes wrong on the way fails it."""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DjinnError
from djinn_core.sessions import Session, SessionState
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig

TOKENS = 12
TOKEN_BYTES = 2 * 64 * 4  # K and V of one layer of the small Llama, float32
HIDDEN_BYTES = 64 * 4
LINK_GBPS = 0.0002  # the tokens of a layer take 31 ms

pytestmark = pytest.mark.timeout(60)


def stopped(rig: Rig, layer: int = 3) -> tuple[Session, torch.Tensor]:
    """A session whose prefill stopped after `layer`; the logits at its end."""
    session = rig.open()
    session.forward(prompt(), stop_after=layer)
    return session, Oracle(rig.stock).forward(prompt())


def on_host(session: Session) -> list[int]:
    return [sum(block.host_valid_bytes for block in row) for row in session._holding.table.blocks]


def behind_of(session: Session) -> None:
    """What its last pass has written behind itself is taken in."""
    lock = session._pager.lock
    with lock:
        assert lock.wait_for(lambda: session._holding.behind is None and not session._holding.draining, 10)


def leave_and_return(session: Session, wanted: torch.Tensor) -> None:
    """Bit-equal after a round trip, whatever was written when."""
    if session.state is SessionState.RUNNING:
        session.pause(release=True)
    session.wait_until("released", 10)
    assert session.device_bytes == 0
    assert torch.equal(session.resume(), wanted)


def test_a_pause_after_a_stop_has_nothing_left_to_copy(rig: Rig) -> None:
    session, wanted = stopped(rig)
    behind_of(session)
    assert on_host(session) == [TOKENS * TOKEN_BYTES] * 3 + [0] * (LAYERS - 3)
    before = rig.device.copied.d2h_bytes
    session.pause(release=True)
    session.wait_until("released", 10)
    assert rig.device.copied.d2h_bytes == before
    leave_and_return(session, wanted)


def test_it_copies_while_the_pass_goes_on_and_counts_only_at_its_end(rig: Rig, monkeypatch) -> None:
    rig.device.link_gbps = LINK_GBPS
    seen: list[tuple[bool, list[int]]] = []

    def look(*_: object) -> None:
        seen.append((not rig.sessions.pager.d2h.query(), on_host(session)))

    session = rig.open()
    hook = rig.served.model.layers[2].register_forward_pre_hook(look)
    session.forward(prompt(), stop_after=3)
    hook.remove()
    assert seen == [(True, [0] * LAYERS)], "the third layer ran while the first ones were on their way"
    rig.device.link_gbps = None
    leave_and_return(session, Oracle(rig.stock).forward(prompt()))


@pytest.mark.parametrize("ids", [prompt(tokens=1), prompt()], ids=["one token", "no stop"])
def test_not_in_a_pass_over_one_token_nor_in_one_that_does_not_stop(rig: Rig, ids: torch.Tensor) -> None:
    session = rig.open()
    session.forward(ids, stop_after=3 if ids.shape[1] == 1 else None)
    assert session._holding.behind is None and not session._holding.draining
    assert sum(on_host(session)) == 0


def test_what_a_failed_pass_has_written_does_not_count(rig: Rig) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the third layer fails")

    session = rig.open()
    hook = rig.served.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="third layer"):
        session.forward(prompt(seed=9), stop_after=4)
    hook.remove()
    assert rig.device.copied.d2h_bytes == 2 * TOKENS * TOKEN_BYTES
    assert sum(on_host(session)) == 0 and not session._holding.draining
    session.forward(prompt(), stop_after=3)  # other bytes in the same places
    leave_and_return(session, Oracle(rig.stock).forward(prompt()))


def test_a_host_without_room_at_hand_leaves_it_to_the_pause(rig: Rig, monkeypatch) -> None:
    first = rig.served.model.layers[0]
    hook = first.register_forward_pre_hook(lambda *_: monkeypatch.setattr(rig.host, "take_ready", lambda *_: None))
    session, wanted = stopped(rig)
    hook.remove()
    monkeypatch.undo()
    assert rig.device.copied.d2h_bytes == TOKENS * HIDDEN_BYTES, "the boundary, and nothing else"
    leave_and_return(session, wanted)


def test_an_earlier_write_back_under_way_is_not_disturbed(rig: Rig) -> None:
    session = rig.open()
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    rig.device.link_gbps = LINK_GBPS
    session.pause()
    while not session._holding.draining:
        time.sleep(0.001)
    session.resume()
    session.forward(prompt(seed=2), stop_after=3)
    assert session._holding.behind is None
    rig.device.link_gbps = None
    leave_and_return(session, oracle.forward(prompt(seed=2)))


def test_a_second_stop_while_the_copies_of_the_first_are_under_way(rig: Rig, monkeypatch) -> None:
    monkeypatch.setattr(rig.sessions.pager, "_out", queue.SimpleQueue())  # the writer is busy elsewhere
    session, wanted = stopped(rig, 2)
    first = session._holding.behind
    session.resume(stop_after=4)
    assert first is not None and session._holding.behind is first, "one at a time"
    monkeypatch.undo()
    first.finish()
    assert on_host(session) == [TOKENS * TOKEN_BYTES] * 2 + [0] * 2
    leave_and_return(session, wanted)


def test_later_prompts_and_later_stops_of_one_pass_are_written_behind_too(rig: Rig) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    session.forward(prompt(seed=2), stop_after=1)
    behind_of(session)
    session.resume(stop_after=4)
    behind_of(session)
    assert on_host(session) == [2 * TOKENS * TOKEN_BYTES] * LAYERS
    leave_and_return(session, oracle.forward(prompt(seed=2)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_copy_that_fails_fails_nothing_else(make_rig: MakeRig, asynchronous: bool) -> None:
    """Each copy of a stopping prefill once. The boundary's own is the pass's business, and may fail it."""
    plan = FaultPlan()
    rig = make_rig()
    rig.device.faults = plan
    stopped(rig)
    total = plan.counts["copy"]
    assert total == 3 + 1
    rig.close()
    failed = 0
    for nth in range(1, total + 1):
        rig = make_rig()
        rig.device.faults = plan = FaultPlan().fail("copy", nth, asynchronous=asynchronous)
        try:
            session, wanted = stopped(rig)
        except DjinnError:
            failed += 1
        else:
            rig.device.faults = None
            leave_and_return(session, wanted)
        assert plan.fired
        rig.close()
    assert failed <= 1


@pytest.mark.parametrize("how", ["close", "evict", "adopt", "sibling", "displace", "unmap"])
def test_who_waits_for_the_copies_takes_them_in_himself(rig: Rig, monkeypatch, how: str) -> None:
    """The writer's thread may be the one that waits."""
    monkeypatch.setattr(rig.sessions.pager, "_out", queue.SimpleQueue())  # the writer is busy elsewhere
    session = rig.open()
    start = session.checkpoint()
    session.forward(prompt(), stop_after=3)
    wanted = Oracle(rig.stock).forward(prompt())
    assert session._holding.behind is not None
    pager, holding = rig.sessions.pager, session._holding
    if how in ("displace", "unmap"):
        some = list(holding.mapped.values())[:1]
        pager.displace(holding, []) if how == "displace" else pager._unmap(holding, some)
        assert not holding.draining
        return
    if how == "close":
        session.close()
        return
    if how == "adopt":
        session.resume(start)
        assert torch.equal(session.forward(prompt()), wanted)
        return
    if how == "sibling":
        twin = session.fork()
        assert torch.equal(twin.resume(), wanted)  # it shares the blocks that are being copied
        twin.pause()
        rig.sessions.pager._drain(twin._holding)
        assert twin._holding.is_clean()
    session.pause()
    assert rig.sessions.pager.evict(session._holding)
    assert torch.equal(session.resume(), wanted)


def test_two_threads_take_it_in_once(rig: Rig, monkeypatch) -> None:
    monkeypatch.setattr(rig.sessions.pager, "_out", queue.SimpleQueue())
    rig.device.link_gbps = LINK_GBPS
    session, wanted = stopped(rig)
    behind = session._holding.behind
    threads = [threading.Thread(target=behind.finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    behind_of(session)
    written = [event for event in rig.sessions.pager.events if event.event == "written behind"]
    assert [event.bytes for event in written] == [3 * TOKENS * TOKEN_BYTES]
    monkeypatch.undo()
    rig.device.link_gbps = None
    leave_and_return(session, wanted)


def test_a_branch_that_comes_to_share_what_is_being_copied_waits_for_the_pass(rig: Rig) -> None:
    """Its write-back is the writer's, which has to take the pass's copies in itself then."""
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    twin = session.fork()

    def share(*_: object) -> None:
        twin.resume()
        twin.wait_until("restored", 10)
        twin.pause()
        while not twin._holding.draining:
            time.sleep(0.001)

    hook = rig.served.model.layers[2].register_forward_pre_hook(share)
    session.forward(prompt(seed=2), stop_after=3)
    hook.remove()
    twin.wait_until("clean", 10)
    behind_of(session)
    leave_and_return(session, oracle.forward(prompt(seed=2)))
