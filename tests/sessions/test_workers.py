"""An error that nobody foresaw, in each thread that moves sessions: whoever waits is told, and nobody hangs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from djinn_core.device.cpu import CpuDevice
from djinn_core.errors import DjinnError, WorkerError
from djinn_core.sessions import Session, SessionState, bringin, link
from djinn_core.sessions.staging import INBOUND_SLOTS
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, spill, wait_for

SESSION_BYTES = 4 * (64 << 10)
WRITER, ISSUER, AHEAD, READER = "djinn-writer", "djinn-link", "djinn-ahead", "djinn-disk"
ERRORS = [RuntimeError("a bug"), MemoryError("no memory"), SystemExit("a thread that ends without a word")]

pytestmark = pytest.mark.timeout(60)  # the watchdog: a hang is what these tests are about


class Bomb:
    """Raises `error` in place of the next call of `owner.name` on the thread called `thread`, once."""

    def __init__(self, monkeypatch, owner: object, name: str, thread: str, error: BaseException) -> None:
        self.fired = 0
        call = getattr(owner, name)

        def explode(*args, **options):
            if not self.fired and threading.current_thread().name == thread:
                self.fired += 1
                raise error
            return call(*args, **options)

        monkeypatch.setattr(owner, name, explode)


def owner_of(rig: Rig, name: str) -> object:
    return {"device": rig.device, "pool": rig.pool, "host": rig.host, "disk": rig.disk}.get(
        name
    ) or rig.sessions.pager.tiers


def begun(rig: Rig, seed: int, stop_after: int | None = None) -> tuple[Session, torch.Tensor, torch.Tensor]:
    """A session that holds a prompt, and is in the next pass when `stop_after` is given; that pass's ids and logits."""
    oracle = Oracle(rig.stock)
    session = rig.open()
    ids = likely(oracle.forward(prompt(seed=seed)))
    session.forward(prompt(seed=seed))
    if stop_after is not None:
        session.forward(ids, stop_after=stop_after)
    return session, ids, oracle.forward(ids)


def away(rig: Rig, seed: int, stop_after: int | None = None) -> tuple[Session, torch.Tensor, torch.Tensor]:
    """`begun`, and off the device since."""
    session, ids, wanted = begun(rig, seed, stop_after)
    session.pause(release=True)
    session.wait_until("released", 10)
    return session, ids, wanted


def go_on(session: Session, ids: torch.Tensor) -> torch.Tensor:
    """Whatever it takes to get the logits of the next pass."""
    stopped = session.stopped is not None
    if stopped or session.state is not SessionState.RUNNING:
        out = session.resume()
        if stopped:
            return out
    return session.forward(ids)


def check_told(rig: Rig, caught: DjinnError, session: Session, error: BaseException) -> None:
    assert isinstance(caught, WorkerError) and caught.__cause__ is error
    assert f"session {session.id}, " in str(caught) and type(error).__name__ in str(caught) and "whole" in str(caught)
    assert any(type(error).__name__ in event.event for event in rig.sessions.pager.events)


def check_alive(rig: Rig) -> None:
    """Every worker lives, and someone else is served by each."""
    pager = rig.sessions.pager
    assert all(thread.is_alive() for thread in (pager._writer, *pager.link._threads))
    other, ids, wanted = away(rig, seed=9)
    other.prefetch()
    other.wait_until("restored", 10)
    assert torch.equal(go_on(other, ids), wanted)
    other.close()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["device.copy", "device.unmap", "device.bind_thread", "tiers.allocate"])
@pytest.mark.parametrize("stop_after", [None, 2])
def test_in_the_writer(rig: Rig, monkeypatch, call, error, stop_after) -> None:
    session, ids, wanted = begun(rig, 1, stop_after)
    if stop_after is not None:
        wait_settled(session)
    where, name = call.split(".")
    bomb = Bomb(monkeypatch, owner_of(rig, where), name, WRITER, error)
    session.pause(release=True)
    wait_for(lambda: bomb.fired)
    with pytest.raises(WorkerError) as caught:
        session.wait_until("released", 10)
    check_told(rig, caught.value, session, error)
    assert session.state is SessionState.PAUSED
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)
    session.pause(release=True)
    session.wait_until("released", 10)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_in_a_caller_who_helps(rig: Rig, monkeypatch, error) -> None:
    """Who waits does the write-back itself; an interrupt is raised as it is, and both leave the session whole."""
    session, ids, wanted = begun(rig, 1)
    bomb = Bomb(monkeypatch, rig.device, "copy", threading.current_thread().name, error)
    with rest_of_the_writer(rig, monkeypatch):
        session.pause(release=True)
        with pytest.raises(WorkerError if isinstance(error, Exception) else type(error)) as caught:
            session.wait_until("released", 10)
    assert bomb.fired
    if isinstance(error, Exception):
        check_told(rig, caught.value, session, error)
    assert session.state is SessionState.PAUSED
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)
    session.pause(release=True)
    session.wait_until("released", 10)


def test_a_caller_who_only_looks_is_not_held_up(rig: Rig, monkeypatch) -> None:
    session, ids, wanted = begun(rig, 1)
    with rest_of_the_writer(rig, monkeypatch):
        session.pause(release=True)
        with pytest.raises(TimeoutError, match=r"not released within 0\.01 s"):
            session.wait_until("released", 0.01)
        assert session._holding.unstarted and session.state is SessionState.PAUSED
        session.wait_until("released", 10)
        assert not session._holding.unstarted
    assert torch.equal(go_on(session, ids), wanted)


@contextmanager
def rest_of_the_writer(rig: Rig, monkeypatch) -> Iterator[None]:
    """Meanwhile nobody gives it any work."""
    with monkeypatch.context() as patch:
        patch.setattr(rig.sessions.pager, "_out", queue.SimpleQueue())
        yield


def wait_settled(session: Session) -> None:
    with session._pager.lock:
        assert session._pager.lock.wait_for(lambda: session.stopped.boundary.settled, 10)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_at_a_boundary(rig: Rig, monkeypatch, error) -> None:
    """It stays on the device, where a resume finds it."""
    bomb = Bomb(monkeypatch, rig.device, "bind_thread", WRITER, error)
    session, ids, wanted = begun(rig, 1, stop_after=3)
    session.pause()
    session.wait_until("clean", 10)
    events = rig.sessions.pager.events
    wait_for(lambda: any("boundary stays on the device" in event.event for event in list(events)))
    assert bomb.fired and not session.stopped.boundary.settled
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["device.map", "device.grant", "pool.acquire_all"])
@pytest.mark.parametrize("stop_after", [None, 2])
def test_in_the_thread_that_resumes(rig: Rig, monkeypatch, call, error, stop_after) -> None:
    """It issues the first layer: the pass is told, an interrupt is raised as it is; the session is whole."""
    session, ids, wanted = away(rig, 1, stop_after)
    where, name = call.split(".")
    bomb = Bomb(monkeypatch, owner_of(rig, where), name, threading.current_thread().name, error)
    with pytest.raises(WorkerError if isinstance(error, Exception) else type(error)) as caught:
        go_on(session, ids)
    assert bomb.fired
    if isinstance(error, Exception):
        check_told(rig, caught.value, session, error)
    assert session.state is SessionState.SWAPPED
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["device.copy", "device.map", "device.grant", "device.bind_thread"])
@pytest.mark.parametrize("stop_after", [None, 1])
def test_in_the_thread_that_issues(rig: Rig, monkeypatch, call, error, stop_after) -> None:
    session, ids, wanted = away(rig, 1, stop_after)
    where, name = call.split(".")
    monkeypatch.setattr(bringin, "STEP_BYTES", 1)  # who resumes issues two of them himself
    bomb = Bomb(monkeypatch, owner_of(rig, where), name, ISSUER, error)
    with pytest.raises(WorkerError) as caught:
        go_on(session, ids)
    assert bomb.fired
    check_told(rig, caught.value, session, error)
    assert session.state in (SessionState.PAUSED, SessionState.SWAPPED)
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["tiers.fetch", "disk.read", "host.allocate", "pool.acquire_all"])
@pytest.mark.parametrize("stop_after", [None, 2])
def test_in_the_thread_that_waits(make_rig: MakeRig, monkeypatch, call, error, stop_after) -> None:
    """What lies on disk is read by a worker of its own; the other one does the rest."""
    monkeypatch.setattr(link, "look_ahead", lambda pager: None)
    rig = make_rig(disk_bytes=8 * SESSION_BYTES)
    where, name = call.split(".")
    session, ids, wanted = begun(rig, 1, stop_after)
    if stop_after is not None:
        wait_settled(session)
    session.pause(release=True)
    session.wait_until("released", 10)
    spill(rig, session)
    bomb = Bomb(monkeypatch, owner_of(rig, where), name, AHEAD if where == "pool" else READER, error)
    with pytest.raises(WorkerError) as caught:
        go_on(session, ids)
    assert bomb.fired
    check_told(rig, caught.value, session, error)
    assert session.state is SessionState.SWAPPED
    check_alive(rig)
    assert torch.equal(go_on(session, ids), wanted)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", ["copy", "unmap"])
def test_while_one_is_evicted_for_another(make_rig: MakeRig, monkeypatch, call, error) -> None:
    """The victim stays whole where it was, and the one that needed its room is told."""
    rig = make_rig(device_bytes=2 * SESSION_BYTES + (INBOUND_SLOTS + 1) * (64 << 10))
    session, ids, wanted = away(rig, 1)
    running, running_ids, running_wanted = begun(rig, 2)
    victim, victim_ids, victim_wanted = begun(rig, 3)
    with monkeypatch.context() as patch:
        patch.setattr(rig.sessions.pager, "_out", queue.SimpleQueue())  # the writer hears nothing of it
        victim.pause()
    bomb = Bomb(monkeypatch, rig.device, call, AHEAD, error)
    with pytest.raises(WorkerError) as caught:
        go_on(session, ids)
    assert bomb.fired
    check_told(rig, caught.value, session, error)
    assert torch.equal(go_on(running, running_ids), running_wanted)
    assert torch.equal(go_on(victim, victim_ids), victim_wanted)
    victim.close()
    assert torch.equal(go_on(session, ids), wanted)
    session.close()
    check_alive(rig)


@pytest.mark.parametrize("call", ["map", "grant", "copy"])
def test_on_the_callers_own_thread(rig: Rig, monkeypatch, call) -> None:
    """A pass that could not get its memory is an error of that pass alone."""
    session, ids, wanted = begun(rig, 1)
    session.checkpoint()
    session.forward(ids)
    branch = session.fork()
    branch.resume(branch.checkpoints[0])
    branch.wait_until("restored", 10)
    error = RuntimeError("a bug")
    bomb = Bomb(monkeypatch, rig.device, call, "MainThread", error)
    with pytest.raises(DjinnError) as caught:  # a tail that is shared is copied first
        branch.forward(ids)
    assert bomb.fired
    check_told(rig, caught.value, branch, error)
    assert torch.equal(go_on(branch, ids), wanted)
    assert torch.equal(session.logits, wanted)
    check_alive(rig)


def test_an_eviction_that_ends_in_the_middle(rig: Rig, monkeypatch) -> None:
    session, ids, wanted = begun(rig, 1)
    session.pause()
    session.wait_until("clean", 10)
    bomb = Bomb(monkeypatch, rig.device, "unmap", "MainThread", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        rig.sessions.pager.evict(session._holding)
    assert bomb.fired
    assert rig.sessions.pager.evict(session._holding) and session.state is SessionState.SWAPPED
    assert torch.equal(go_on(session, ids), wanted)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_while_nobody_waits(make_rig: MakeRig, monkeypatch, error) -> None:
    """A look ahead that fails is in the log, and the next one is tried."""
    monkeypatch.setattr(CpuDevice, "bind_thread", lambda device: None)
    bombs = [
        Bomb(monkeypatch, CpuDevice, "bind_thread", AHEAD, error),
        Bomb(monkeypatch, link, "look_ahead", AHEAD, error),
    ]
    rig = make_rig()
    session, ids, wanted = begun(rig, 1)
    session.pause(expected_resume_s=0.05, release=True)
    session.wait_until("released", 10)
    events = rig.sessions.pager.events
    deadline_s = time.monotonic() + 10
    while not any(event.event == "prefetched" for event in list(events)) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert [bomb.fired for bomb in bombs] == [1, 1]
    assert sum("did not look ahead" in event.event for event in list(events)) == 2
    assert session.state is SessionState.PAUSED and session.device_bytes
    assert torch.equal(go_on(session, ids), wanted)
    check_alive(rig)
