"""What an error or an interrupt at the end of a pass leaves: the session as it was, and nothing that nobody holds."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from djinn_core.errors import DeviceError, TransferError
from djinn_core.sessions import SessionState
from tests.ctrl_c import interrupted
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, spill
from tests.sessions.test_behind_races import ctrl_c_at_the_end_of_a_pass

UNIT = 64 << 10
pytestmark = pytest.mark.timeout(30)


def test_a_failed_stop_gives_its_boundary_back_only_after_the_copy(rig: Rig, monkeypatch) -> None:
    other, oracle = rig.open(), Oracle(rig.stock)
    first = oracle.forward(prompt(seed=5))
    (wanted,) = oracle.greedy(first, 1)
    other.forward(prompt(seed=5))

    session = rig.open()
    rig.host.prepare(16 * UNIT)
    gate = threading.Event()
    rig.device.launch(rig.sessions.pager.staging.out_stream, lambda: gate.wait(20))  # the device is busy
    threading.Timer(1.5, gate.set).start()
    provider = rig.served._djinn_boundary.provider
    with monkeypatch.context() as patch, pytest.raises(TransferError):

        def fail() -> None:
            raise TransferError("the pass moved other bytes than planned")

        patch.setattr(provider, "end_pass", fail)  # the streamer's own check after every pass
        session.forward(prompt(), stop_after=1)
    session._holding.behind.settle()
    other.pause(release=True)  # takes what the boundary had
    other.wait_until("released", 10)
    gate.set()
    rig.sessions.pager.staging.out_stream.synchronize()
    other.resume()
    assert torch.equal(other.forward(likely(first)), wanted), "another session's KV was overwritten"


@pytest.mark.parametrize("stop_after", [2, None])
def test_ctrl_c_after_the_lengths_have_moved(rig: Rig, monkeypatch, stop_after) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    wanted = oracle.forward(prompt())
    pager = rig.sessions.pager
    plain, calls = pager._begin_deferred, []

    def interrupted(holding) -> None:
        plain(holding)
        calls.append(holding)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pager, "_begin_deferred", interrupted)  # the last thing that `settle` does
        session.forward(prompt(), stop_after=stop_after)
    lengths = list(session._holding.table.lengths)
    assert len(set(lengths)) == 1, f"layers disagree, and the session is RUNNING between tokens: {lengths}"
    assert session.stopped is not None or torch.equal(session.forward(prompt()), wanted)


def test_settle_that_raises_gives_the_boundary_back(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=64 * UNIT)
    session = rig.open()
    session.forward(prompt(), stop_after=1)
    session.resume()
    session.pause(release=True)
    session.wait_until("released", 10)
    (point,) = session.checkpoints
    spill(rig, session)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, contextlib.suppress(DeviceError):
        patch.setattr("djinn_core.memory.disktier.libc.punch_hole", fail)
        session.resume(point, stop_after=3)
    session.close()
    assert rig.host.held_bytes == 0


def test_ctrl_c_in_settle_gives_the_boundary_back(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    plain, calls = rig.sessions.pager._end_by_pass, []

    def interrupted(*args, **options) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        plain(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rig.sessions.pager, "_end_by_pass", interrupted)
        session.forward(prompt(), stop_after=1)
    session.close()
    assert rig.host.held_bytes == 0


def test_ctrl_c_at_the_end_of_a_resumed_prefill_leaves_a_session_that_can_be_closed(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    ctrl_c_at_the_end_of_a_pass(rig, session, monkeypatch, session.resume)
    closing = threading.Thread(target=session.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive(), "close waits for a bring-in that nobody will ever begin"


def test_ctrl_c_in_a_resume_that_waits_for_a_prefetch(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    wanted = Oracle(rig.stock).forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    pager = rig.sessions.pager
    asked, go_on, acquire = threading.Event(), threading.Event(), pager.acquire

    def slow(*args, **options):
        asked.set()
        go_on.wait(10)
        return acquire(*args, **options)

    monkeypatch.setattr(pager, "acquire", slow)
    session.prefetch()
    assert asked.wait(10)
    with interrupted(0.2), pytest.raises(KeyboardInterrupt):
        session.resume()
    go_on.set()
    monkeypatch.undo()
    session.wait_until("restored", 10)
    try:
        assert session.state is not SessionState.RESUMING or torch.equal(session.resume(), wanted)
    finally:
        if session.state is SessionState.RESUMING:
            session.pause()
