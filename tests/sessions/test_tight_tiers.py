"""What the tight day found, each made certain: circles of waiters on a full host, and resumes that are not told."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DjinnError, OutOfDeviceMemory, OutOfHostMemory, TransferError
from djinn_core.memory.hosttier import HostBlock
from djinn_core.sessions import Session, SessionState, bringin, tiers
from djinn_core.sessions.bringin import BringIn
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, wait_for

BLOCK_BYTES = 64 << 10
SESSION_BYTES = 4 * BLOCK_BYTES

pytestmark = pytest.mark.timeout(60)


def begun(rig: Rig) -> tuple[Session, torch.Tensor, torch.Tensor]:
    """A session that holds a prompt; the next pass's ids and logits."""
    oracle, session = Oracle(rig.stock), rig.open()
    ids = likely(oracle.forward(prompt()))
    session.forward(prompt())
    return session, ids, oracle.forward(ids)


def leave(session: Session) -> None:
    session.pause(release=True)
    session.wait_until("released", 10)


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """`work` in a thread, which has ended afterwards, refused or not."""

    def quietly() -> None:
        with contextlib.suppress(DjinnError):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive(), "deadlock"


class NoRoom:
    """Whoever needs device memory gets none at hand, and waits for it in vain until `told`."""

    def __init__(self, rig: Rig, monkeypatch) -> None:
        self.waits, self.told = threading.Event(), threading.Event()
        self._patch = monkeypatch
        monkeypatch.setattr(rig.sessions.pager, "take_free", lambda *args, **options: None)
        monkeypatch.setattr(rig.sessions.pager, "acquire", self._acquire)

    def _acquire(self, *args, **options) -> None:
        self.waits.set()
        self.told.wait(10)
        self._patch.undo()
        raise OutOfDeviceMemory("as planned", needed_bytes=1, free_bytes=0)


# who waits for others, who may look for room themselves, is not waited for


@contextmanager
def a_pass_that_waits_for_its_turn(rig: Rig, asker: Session, away: Session, monkeypatch) -> Iterator[None]:
    other, turn = rig.open(), rig.served._djinn_boundary._turn
    turn.acquire()
    with beside(lambda: other.forward(prompt())):
        wait_for(lambda: turn.waiting)
        assert other._holding.jobs[0].by_pass
        yield
        turn.release()


@contextmanager
def an_eviction_behind_a_siblings_write_back(rig: Rig, asker: Session, away: Session, monkeypatch) -> Iterator[None]:
    pager, allocate, full = rig.sessions.pager, rig.host.allocate, threading.Event()
    asker.resume()
    twin = asker.fork()
    twin.resume()
    twin.wait_until("restored", 10)
    with monkeypatch.context() as patch:
        patch.setattr(pager, "_out", queue.SimpleQueue())  # nothing is written back at the pause
        asker.pause()
        twin.pause()

    def when_the_twin_waits(size_bytes: int, owner: str) -> HostBlock:
        if rig.host.free_bytes < size_bytes:
            full.set()
            wait_for(lambda: twin._holding.draining)
            both.close()
        return allocate(size_bytes, owner)

    monkeypatch.setattr(rig.host, "allocate", when_the_twin_waits)
    both = ExitStack()
    both.enter_context(pager.leaving(twin._holding))  # from here on neither relies on the other
    with both, beside(lambda: full.wait(10) and pager.evict(twin._holding)):
        yield


@contextmanager
def an_eviction_behind_a_borrower(rig: Rig, asker: Session, away: Session, monkeypatch) -> Iterator[None]:
    pager, lender = rig.sessions.pager, begun(rig)[0]
    lender.pause()
    wait_for(lambda: not lender._holding.queued)
    lender._holding.pins += 1
    with beside(lambda: pager.evict(lender._holding)):
        wait_for(lambda: lender._holding.leaving)
        yield
        with pager.lock:
            lender._holding.pins -= 1
            pager.lock.notify_all()


@contextmanager
def an_eviction_behind_a_bring_in(rig: Rig, asker: Session, away: Session, monkeypatch) -> Iterator[None]:
    pager, room = rig.sessions.pager, NoRoom(rig, monkeypatch)
    away.resume()
    assert room.waits.wait(10)
    away.pause()
    with beside(lambda: pager.evict(away._holding)):
        wait_for(lambda: away._holding.leaving)
        yield
        room.told.set()


CIRCLES = [
    a_pass_that_waits_for_its_turn,
    an_eviction_behind_a_siblings_write_back,
    an_eviction_behind_a_borrower,
    an_eviction_behind_a_bring_in,
]


@pytest.mark.parametrize("circle", CIRCLES, ids=lambda circle: circle.__name__)
def test_nobody_waits_for_who_may_wait_for_him(make_rig: MakeRig, monkeypatch, circle) -> None:
    """The host has room for half a session more. Who needs the rest is refused at once, with what he has whole."""
    rig = make_rig(device_bytes=6 * SESSION_BYTES, host_bytes=SESSION_BYTES + 2 * BLOCK_BYTES)
    away = begun(rig)[0]
    leave(away)
    asker, ids, wanted = begun(rig)
    asker.pause()
    wait_for(lambda: not asker._holding.queued)
    with circle(rig, asker, away, monkeypatch):
        began_s = time.monotonic()
        with pytest.raises(OutOfHostMemory):
            rig.sessions.pager.evict(asker._holding)
        took_s = time.monotonic() - began_s
    assert took_s < tiers.PATIENCE_S / 2
    asker.resume()
    assert torch.equal(asker.forward(ids), wanted)


def test_a_write_back_takes_no_room_from_its_own_session(make_rig: MakeRig) -> None:
    """Else it ends as if all had been copied, and who waits for that is told nothing."""
    rig = make_rig(host_bytes=2 * BLOCK_BYTES)
    session = begun(rig)[0]
    session.pause()
    wait_for(lambda: not session._holding.queued)  # half of it is on the host now
    with pytest.raises(OutOfHostMemory):
        session.wait_until("clean", 2)


def test_a_transfer_that_ends_between_two_looks_makes_room_on_the_host(make_rig: MakeRig, monkeypatch) -> None:
    """It kept a session from being spilled at the first look, and is gone at the look at what is under way."""
    rig = make_rig(host_bytes=2 * SESSION_BYTES, disk_bytes=4 * SESSION_BYTES)
    pager = rig.sessions.pager
    for _ in range(2):
        leave(begun(rig)[0])
    sources, looks = pager.tiers._sources, []

    def none_at_first(*args):
        looks.append(args)
        return iter(()) if len(looks) == 1 else sources(*args)

    monkeypatch.setattr(pager.tiers, "_sources", none_at_first)
    pager.tiers.allocate(BLOCK_BYTES, "others").free()
    assert len(looks) == 2
    monkeypatch.setattr(pager.tiers, "_sources", lambda *args: looks.append(args) or iter(()))
    with pytest.raises(OutOfHostMemory):
        pager.tiers.allocate(2 * SESSION_BYTES, "others")
    assert len(looks) == 4, "once more, and no more"


# who is on his way on the device may leave soon


@pytest.mark.parametrize("place", ["_issue", "finish"])
def test_nobody_is_refused_for_a_prefetch(make_rig: MakeRig, monkeypatch, place: str) -> None:
    """Nobody waits for it; what it brings in may leave for who needs the room, as soon as it is there.

    Until then it is on its way, also when all of it has been issued.
    """
    rig = make_rig(device_bytes=2 * SESSION_BYTES)
    session, ids, wanted = begun(rig)
    leave(session)
    other, reached, go_on, plain = rig.open(), threading.Event(), threading.Event(), getattr(BringIn, place)

    def slowly(job: BringIn, *args):
        if job.prefetch:
            reached.set()
            go_on.wait(10)
        return plain(job, *args)

    monkeypatch.setattr(BringIn, place, slowly)
    session.prefetch()
    assert reached.wait(10) and rig.pool.free_bytes == 0
    threading.Timer(0.2, go_on.set).start()
    other.forward(prompt())
    assert session.state is SessionState.SWAPPED
    other.pause()
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def test_who_arrives_while_room_is_looked_for_may_leave(make_rig: MakeRig, monkeypatch) -> None:
    """On his way at the look at those who could leave, and there at the look at those who are on their way."""
    rig = make_rig(device_bytes=2 * SESSION_BYTES)
    pager, victim = rig.sessions.pager, begun(rig)[0]
    leave(victim)
    other, ids, wanted = begun(rig)
    leave(other)
    victim.prefetch()
    victim.wait_until("restored", 10)
    victim.wait_until("clean", 10)
    able, looks = pager._able, []

    def none_at_first(keep, *args):
        looks.append(keep)
        return [] if looks.count(other._holding) == 1 and keep is other._holding else able(keep, *args)

    monkeypatch.setattr(pager, "_able", none_at_first)
    other.resume()
    assert torch.equal(other.forward(ids), wanted)
    assert looks.count(other._holding) > 1 and victim.state is SessionState.SWAPPED


def test_who_lends_to_another_may_leave_soon(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=3 * SESSION_BYTES)
    lender, coming, other = begun(rig)[0], begun(rig)[0], rig.open()
    lender.pause()
    lender.wait_until("clean", 10)
    lock = rig.sessions.pager.lock
    with lock:
        lender._holding.pins, coming._holding.moving = 1, True

    def end() -> None:
        with lock:
            lender._holding.pins, coming._holding.moving = 0, False
            lock.notify_all()

    threading.Timer(0.2, end).start()
    other.forward(prompt())
    assert lender.state is SessionState.SWAPPED


# a resume that fails is told to who resumed


def test_a_resume_is_not_decided_by_an_earlier_one_that_fails(make_rig: MakeRig, monkeypatch) -> None:
    """Paused while it came back, and resumed again: what fails then is the first bring-in, and nobody wants that."""
    rig = make_rig()
    session, ids, wanted = begun(rig)
    leave(session)
    room = NoRoom(rig, monkeypatch)
    session.resume()
    assert room.waits.wait(10)
    session.pause()
    with beside(session.resume):
        wait_for(lambda: session.state is SessionState.RESUMING)
        room.told.set()
    assert torch.equal(session.forward(ids), wanted)


def test_a_resume_that_failed_half_way_is_told_after_an_eviction_too(rig: Rig, monkeypatch) -> None:
    monkeypatch.setattr(bringin, "STEP_BYTES", 1)  # a layer each
    session, ids, wanted = begun(rig)
    leave(session)
    rig.device.faults = FaultPlan().fail("copy", 2)
    session.resume()
    wait_for(lambda: session.state is SessionState.PAUSED)
    rig.device.faults = None
    assert session.device_bytes
    assert rig.sessions.pager.evict(session._holding)
    with pytest.raises(TransferError):
        session.forward(ids)
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def test_what_a_running_session_has_off_the_device_makes_room_on_the_host(make_rig: MakeRig, monkeypatch) -> None:
    """It went back, and what it went back to could not be brought in; then it forgot the checkpoint."""
    rig = make_rig(device_bytes=6 * SESSION_BYTES, host_bytes=SESSION_BYTES, disk_bytes=8 * SESSION_BYTES)
    session, ids, wanted = begun(rig)
    leave(session)
    holding = session._holding
    holding.state = SessionState.RUNNING
    other = begun(rig)[0]
    leave(other)
    assert rig.disk.held_bytes
    session.pause()
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def test_while_everyone_fits_a_pause_copies_what_is_new_and_no_more(make_rig: MakeRig) -> None:
    """The host has room for one of two: who pauses does not take it from who runs, who would copy all of it again."""
    rig = make_rig(host_bytes=3 * SESSION_BYTES // 2)
    one, other = rig.open(), rig.open()

    def pause(session: Session) -> int:
        before = rig.device.copied.d2h_bytes
        session.pause()
        wait_for(lambda: not session._holding.queued)
        return rig.device.copied.d2h_bytes - before

    one.forward(prompt())
    whole = pause(one)
    other.forward(prompt(seed=2))
    for _ in range(3):
        one.resume()
        pause(other)
        assert not other._holding.is_clean()
        other.resume()
        one.forward(torch.tensor([[1]]))
        assert 0 < pause(one) < whole and one._holding.is_clean()


def test_where_one_more_would_not_fit_a_paused_session_is_clean_before_someone_needs_its_place(
    make_rig: MakeRig,
) -> None:
    """The host has room for one of two, and the device for no third one: who runs cannot leave, so its copy goes."""
    rig = make_rig(device_bytes=3 * SESSION_BYTES, host_bytes=3 * SESSION_BYTES // 2)
    one, other = rig.open(), rig.open()
    one.forward(prompt())
    one.pause()
    one.wait_until("clean", 10)
    other.forward(prompt(seed=2))
    assert rig.pool.free_bytes < SESSION_BYTES
    one.resume()
    other.pause()
    wait_for(lambda: not other._holding.queued)
    assert other._holding.is_clean()
