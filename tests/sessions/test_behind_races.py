"""Writing behind: what two at once, or Ctrl-C at an awkward moment, could lose. Each made certain."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from threading import get_ident

import pytest
import torch

from djinn_core.sessions import Session, SessionState, snapshot, writeback
from djinn_core.sessions.staging import INBOUND_SLOTS
from tests.ctrl_c import python_handles_it
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig
from tests.sessions.test_behind import LINK_GBPS, TOKENS, UNIT, held_writer, stopped, take_in

pytestmark = pytest.mark.timeout(60)


def in_the_middle(rig: Rig, session: Session, do, *, stop_after: int = 3, seed: int = 1) -> None:
    """A prefill over a slow link; `do` begins in a thread before its second layer, and has ended when this returns."""
    rig.device.link_gbps = LINK_GBPS / 5  # 0.15 s a layer
    thread = threading.Thread(target=do)

    def begin(*_: object) -> None:
        thread.start()
        time.sleep(0.03)

    hook = rig.served.model.layers[1].register_forward_pre_hook(begin)
    session.forward(prompt(seed=seed), stop_after=stop_after)
    hook.remove()
    thread.join()


def ctrl_c_at_the_end_of_a_pass(rig: Rig, session: Session, monkeypatch, run: Callable[[], object]) -> None:
    """While the end of the pass that `run` makes waits for the pager's lock."""
    pager, taken, record, caller = rig.sessions.pager, threading.Event(), session._holding.pass_done.record, get_ident()

    def hold() -> None:
        with pager.lock:
            taken.set()
            time.sleep(0.1)
            signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(0.1)

    def busy(stream) -> None:
        record(stream)
        monkeypatch.undo()
        threading.Thread(target=hold).start()
        assert taken.wait(5)

    monkeypatch.setattr(session._holding.pass_done, "record", busy)
    with python_handles_it(), pytest.raises(KeyboardInterrupt):
        run()


def test_who_began_to_wait_in_the_pass_waits_for_its_last_copies_too(rig: Rig) -> None:
    session, ended = rig.open(), []

    def settle() -> None:
        session._holding.behind.settle()
        ended.append(session._holding.behind is not None or rig.sessions.pager.d2h_behind.query())

    in_the_middle(rig, session, settle)
    assert ended == [True]


def test_no_memory_goes_under_a_copy_after_a_write_back_in_the_pass(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    pager, holding, late = rig.sessions.pager, session._holding, []
    unmap = holding.region.unmap

    def guarded(offsets) -> None:
        late.append(pager.d2h_behind.query())
        pager.d2h_behind.synchronize()
        unmap(offsets)

    monkeypatch.setattr(holding.region, "unmap", guarded)
    in_the_middle(rig, session, lambda: writeback.write_back(pager, holding, []))
    session.pause(release=True)
    session.wait_until("released", 10)
    assert late and all(late)


def test_a_branch_that_is_saved_during_the_pass_has_all_its_bytes(rig: Rig, tmp_path: Path) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    ids = oracle.forward(prompt()).float().argmax(-1)[:, None]
    session.forward(prompt())
    twin = session.fork()
    in_the_middle(rig, session, lambda: twin.save(tmp_path / "twin"), stop_after=4, seed=2)
    rig.device.link_gbps = None
    again = snapshot.load_session(tmp_path / "twin", rig.served, rig.sessions)
    again.resume()
    assert torch.equal(again.forward(ids), oracle.forward(ids))


def test_a_write_back_from_before_the_pass_unmaps_nothing_under_its_copies(rig: Rig, monkeypatch) -> None:
    """The writer has found nothing to settle; before it claims, the owner runs a prefill that stops, and pauses."""
    at, go = held_writer(monkeypatch, writeback, "_wait_idle")
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    session.pause(release=True)
    assert at.wait(5)
    session.resume()
    gate, behind = threading.Event(), rig.sessions.pager.d2h_behind
    rig.device.launch(behind, lambda: gate.wait(20))  # others' copies come first on the stream that passes share
    session.forward(prompt(seed=2), stop_after=3)
    late, unmap = [], session._holding.region.unmap

    def guarded(offsets) -> None:
        late.append(gate.is_set() or not offsets)
        gate.set()
        behind.synchronize()
        unmap(offsets)

    monkeypatch.setattr(session._holding.region, "unmap", guarded)
    session.pause(release=True)
    go.set()
    threading.Timer(0.5, gate.set).start()
    session.wait_until("released", 10)
    assert late and all(late)
    assert torch.equal(session.resume(), oracle.forward(prompt(seed=2)))


def test_after_ctrl_c_at_its_end_a_pass_counts_for_nothing(rig: Rig, monkeypatch) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    for ids in (prompt(), prompt(tokens=1)):
        oracle.forward(ids)
        session.forward(ids)
    ctrl_c_at_the_end_of_a_pass(rig, session, monkeypatch, lambda: session.forward(prompt(seed=9), stop_after=3))
    assert session.length == TOKENS + 1 and session.state is SessionState.RUNNING
    logits = session.forward(prompt(seed=2))
    assert torch.equal(logits, oracle.forward(prompt(seed=2)))
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    (wanted,) = oracle.greedy(logits, 1)
    assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), wanted)
    session.close()
    assert rig.host.held_bytes == 0


def test_after_ctrl_c_at_the_end_of_a_pass_closing_gives_its_copies_back(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    ctrl_c_at_the_end_of_a_pass(rig, session, monkeypatch, lambda: session.forward(prompt(seed=9), stop_after=3))
    session.close()
    assert rig.host.held_bytes == 0


def test_ctrl_c_while_the_copies_are_given_to_their_blocks(rig: Rig) -> None:
    class Awkward:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    session, _ = stopped(rig)
    behind = session._holding.behind
    block = behind._copies[1].block
    plain, block.lock = block.lock, Awkward()
    with pytest.raises(KeyboardInterrupt):
        behind.settle()
    block.lock = plain
    session.close()
    assert rig.host.held_bytes == 0


@pytest.mark.parametrize("settled", [True, False])
def test_admission_counts_what_is_written_behind_as_the_sessions_own(make_rig: MakeRig, settled: bool) -> None:
    rig = make_rig(device_bytes=(LAYERS + INBOUND_SLOTS + 1) * UNIT, host_bytes=2 * LAYERS * UNIT)
    rig.host.prepare(2 * LAYERS * UNIT)
    session, _ = stopped(rig)
    if settled:
        take_in(session)
    rig.open()
    rig.close()
