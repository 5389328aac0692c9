"""Three tiers under pressure: everybody's state survives in each of them, in any order."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from functools import partial

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError, DjinnError, IntegrityError, OutOfDeviceMemory, SessionStateError
from djinn_core.sessions import Candidate, ExpectedLast, Session, SessionState
from djinn_core.sessions.checkpoint import Boundary
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, spill

KIB = 1 << 10
SESSION_BYTES = 4 * 64 * KIB


def run_all(rig, count: int, rounds: int = 2) -> None:
    """`count` sessions stop in a decode pass, then go on in random order; each must equal its oracle."""
    sessions, oracles, logits = [], [], []
    for seed in range(count):
        ids = prompt(seed=seed)
        oracle = Oracle(rig.stock)
        first = oracle.forward(ids)
        token = first.float().argmax(-1)[:, None]
        session = rig.open()
        assert torch.equal(session.forward(ids), first)
        session.forward(token, stop_after=2)
        session.pause()
        sessions.append(session)
        oracles.append(oracle)
        logits.append(oracle.forward(token))
    draw = random.Random(3)
    for _ in range(rounds):
        for seed in draw.sample(range(count), count):
            session = sessions[seed]
            out = session.resume()
            if out is not None:
                assert torch.equal(out, logits[seed])
            token = logits[seed].float().argmax(-1)[:, None]
            logits[seed] = oracles[seed].forward(token)
            assert torch.equal(session.forward(token), logits[seed])
            session.pause()
    for session in sessions:
        session.close()


def test_all_three_tiers(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES, host_bytes=10 * SESSION_BYTES, disk_bytes=32 * SESSION_BYTES)
    run_all(rig, 24)
    kinds = {event.event for event in rig.sessions.pager.events}
    assert {"swap_in", "swap_out", "evict", "disk_write", "disk_read"} <= kinds
    swaps = [event.copies for event in rig.sessions.pager.events if event.event in ("swap_in", "swap_out")]
    assert all(begin.elapsed_time(end) > 0 for begin, end in swaps)


def test_admission_names_every_tier(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES, host_bytes=4 * SESSION_BYTES)
    opened = []
    room = r"[\d,]+, now free [\d,]+"
    with pytest.raises(OutOfDeviceMemory, match=f"device {room}, host {room}, disk 0, now free 0") as caught:
        while True:
            opened.append(rig.open())
    assert caught.value.needed_bytes == SESSION_BYTES and caught.value.free_bytes < SESSION_BYTES
    assert 8 <= len(opened) <= 12
    opened[0].forward(prompt())
    opened[1].close()
    rig.open()
    with pytest.raises(OutOfDeviceMemory, match="does not fit the device"):
        rig.open(max_length=256, batch_size=64)


@pytest.mark.parametrize(
    ("device", "host", "disk", "admitted"),
    [(1, 1, 0, 1), (1, 2, 0, 2), (2, 1, 0, 2), (2, 2, 0, 3), (1, 1, 8, 1), (2, 1.5, 8, 2), (1, 2, 8, 10), (2, 2, 4, 7)],
)
def test_who_is_admitted_can_go_on(make_rig: MakeRig, device: int, host: float, disk: int, admitted: int) -> None:
    """All in turn, on tiers that have just room for them: more would never come back, or only by chance."""
    sizes = {
        "device_bytes": device + 1,
        "host_bytes": host,
        "disk_bytes": disk,
    }  # it has the slots for boundaries too
    rig = make_rig(**{name: int(size * SESSION_BYTES) for name, size in sizes.items()})
    opened: list[Session] = []
    with pytest.raises(OutOfDeviceMemory, match=r"device [\d,]+, now free [\d,]+, host [\d,]+, .*disk"):
        while True:
            opened.append(rig.open())
    assert len(opened) == admitted
    oracles = [Oracle(rig.stock) for _ in opened]
    ids = [prompt(seed=seed) for seed in range(admitted)]
    for _ in range(3):
        for number, session in enumerate(opened):
            if session.state is not SessionState.RUNNING:
                session.resume()
            wanted = oracles[number].forward(ids[number])
            assert torch.equal(session.forward(ids[number]), wanted)
            ids[number] = likely(wanted)
            session.pause()


def test_a_disk_that_returns_other_bytes_fails_the_session(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=4 * SESSION_BYTES, host_bytes=4 * SESSION_BYTES, disk_bytes=32 * SESSION_BYTES)
    sessions = []
    for seed in range(10):
        session = rig.open()
        session.forward(prompt(seed=seed))
        session.pause()
        sessions.append(session)
    for session in sessions[:-3]:
        session.wait_until("clean", 10)
    victim = next(s for s in sessions if any(b.disk for b in s._holding.table))
    block = next(b.disk for b in victim._holding.table if b.disk)
    corrupt(rig.disk, block.offset)
    victim.resume()
    with pytest.raises(IntegrityError, match="crc32"):
        victim.forward(torch.tensor([[5]]))
    assert victim.state is SessionState.FAILED
    for wait in (
        victim.prefetch,
        *(partial(victim.wait_until, what, 10) for what in ("clean", "released", "restored")),
    ):
        with pytest.raises(SessionStateError, match="a part of its state was lost") as refused:
            wait()
        assert isinstance(refused.value.__cause__, IntegrityError)
    healthy = next(s for s in sessions if s is not victim)
    healthy.resume()
    healthy.forward(torch.tensor([[5]]))
    victim.close()


def test_a_read_that_fails_names_the_session_and_can_be_tried_again(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=32 * SESSION_BYTES)
    oracle, session = Oracle(rig.stock), rig.open()
    token = oracle.forward(prompt()).float().argmax(-1)[:, None]
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    spill(rig, session)

    def fail(*_: object) -> None:
        raise DeviceError("reading 4,096 bytes from there failed: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(rig.disk, "read", fail)
        with pytest.raises(
            DeviceError, match=f"session {session.id}: a part of its state could not be read back, and is"
        ):
            session.resume()
            session.forward(token)
    session.resume()
    assert torch.equal(session.forward(token), oracle.forward(token))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_boundary_that_the_disk_has_lost_fails_who_stands_there(make_rig: MakeRig, earlier: bool) -> None:
    rig = make_rig(disk_bytes=32 * SESSION_BYTES)
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    point = session.stopped
    if earlier:
        session.resume()
    session.pause(release=True)
    session.wait_until("released", 10)
    lose(rig, session, point.boundary)
    with pytest.raises(IntegrityError, match="crc32"):
        session.resume(point)
    if earlier:
        session.drop(point)
        oracle = Oracle(rig.stock)
        oracle.forward(prompt())
        session.resume()
        assert torch.equal(session.forward(torch.tensor([[5]])), oracle.forward(torch.tensor([[5]])))
    else:
        assert session.state is SessionState.FAILED
        with pytest.raises(DjinnError, match="a part of its state was lost"):
            session.resume()
    session.close()


def test_who_has_another_checkpoint_goes_back_to_that(make_rig: MakeRig) -> None:
    rig = make_rig(disk_bytes=32 * SESSION_BYTES)
    session = rig.open()
    start = session.forward(prompt(), stop_after=2)
    lost = session.resume(stop_after=3)
    session.pause(release=True)
    session.wait_until("released", 10)
    lose(rig, session, lost.boundary)
    with pytest.raises(IntegrityError) as caught:
        session.resume()
    assert caught.value.__notes__ == ["the session's other checkpoints can still be resumed"]
    assert torch.equal(session.resume(start), Oracle(rig.stock).forward(prompt()))


def lose(rig: Rig, session: Session, boundary: Boundary) -> None:
    """Put a boundary on the disk, which returns other bytes from then on."""
    deadline = time.monotonic() + 10
    while not boundary.settled and time.monotonic() < deadline:  # the writer drops its device copy
        time.sleep(0.01)
    assert rig.sessions.pager.tiers._spill(session._holding, boundary)
    corrupt(rig.disk, boundary.disk.offset)


def corrupt(disk, offset: int) -> None:
    fd = os.open(f"/proc/self/fd/{disk._fd}", os.O_WRONLY)
    try:
        os.pwrite(fd, b"\xff" * 512, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def test_prefetch_ahead_of_the_expected_resume(make_rig: MakeRig) -> None:
    rig = make_rig()
    session = rig.open()
    first = session.forward(prompt())
    session.pause(expected_resume_s=0.6, release=True)
    session.wait_until("released", 10)
    deadline = time.monotonic() + 10
    while session.state is not SessionState.PAUSED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert session.device_bytes == SESSION_BYTES
    copied = rig.device.copied
    session.resume()
    oracle = Oracle(rig.stock)
    wanted = oracle.greedy(oracle.forward(prompt()), 1)[0]
    assert torch.equal(session.forward(first.float().argmax(-1)[:, None]), wanted)
    assert (rig.device.copied - copied).h2d_bytes == 0


def test_a_prefetch_that_finds_no_room_is_tried_again(make_rig: MakeRig) -> None:
    """While everyone on the device is expected sooner it waits, and comes back when one of them is put off."""
    rig = make_rig(device_bytes=8 * SESSION_BYTES)
    late = rig.open()
    late.forward(prompt(seed=99))
    soon_s = time.monotonic() + 0.2
    late.pause(expected_resume_s=0.4, release=True)
    late.wait_until("released", 10)
    others = []
    while late._pager.pool.free_bytes >= SESSION_BYTES:
        others.append(rig.open())
        others[-1].forward(prompt(seed=len(others)))
        others[-1].pause(expected_resume_s=soon_s - time.monotonic())  # sooner, however long all this takes
    time.sleep(0.6)
    assert late.state is SessionState.SWAPPED and all(s.state is SessionState.PAUSED for s in others)
    others[0].resume()
    others[0].pause(expected_resume_s=60.0)
    deadline = time.monotonic() + 10
    while late.state is not SessionState.PAUSED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert late.device_bytes == SESSION_BYTES and others[0].state is SessionState.SWAPPED


def paused(rig: Rig, count: int) -> list[Session]:
    """So many sessions, one after the other: each with a prompt of its own, paused and written back."""
    sessions = []
    for seed in range(count):
        session = rig.open()
        session.forward(prompt(seed=seed))
        session.pause()
        session.wait_until("clean", 10)
        sessions.append(session)
    return sessions


def test_the_policy_can_be_replaced(make_rig: MakeRig) -> None:
    class Newest:
        def choose(self, candidates, needed_bytes, now_s):
            return [max(candidates, key=lambda c: c.last_use_s).session] if candidates else []

    rig = make_rig(device_bytes=8 * SESSION_BYTES, policy=Newest())
    sessions = paused(rig, 9)
    assert sessions[0].state is SessionState.PAUSED
    assert any(s.state is SessionState.SWAPPED for s in sessions[3:])


def test_a_policy_that_names_who_has_left_ends_nobodys_wait_for_ever(make_rig: MakeRig) -> None:
    class Mine:
        """A list of its own, which forgets nobody."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def choose(self, candidates, needed_bytes, now_s):
            self.seen += [c.session for c in candidates if c.session not in self.seen]
            return self.seen

    rig = make_rig(device_bytes=3 * SESSION_BYTES, policy=Mine())
    leaves, *run = [rig.open() for _ in range(4)]
    leaves.forward(prompt())
    leaves.pause()
    with pytest.raises(OutOfDeviceMemory):
        for session in run:
            session.forward(prompt())
    assert leaves.state is SessionState.SWAPPED


def test_the_default_policy() -> None:
    def candidate(name: str, clean: bool = True, last: float = 0.0, expected: float | None = None) -> Candidate:
        return Candidate(name, 10, clean, last, expected, guessed_resume_s=expected or 200.0 - last)

    choose = ExpectedLast().choose
    soon, late = candidate("soon", expected=100.5), candidate("late", expected=500.0)
    old, new = candidate("old", last=10.0), candidate("new", last=99.0)
    dirty = candidate("dirty", clean=False, last=1.0)
    assert choose([soon, late, old, new, dirty], 50, 100.0) == ["late", "old", "new", "soon", "dirty"]
    assert choose([soon, late, old], 11, 100.0) == ["late", "old"]
    due, overdue = candidate("due", expected=100.4), candidate("overdue", expected=99.9)
    assert choose([overdue, due, dirty, new], 40, 100.0) == ["new", "dirty", "due", "overdue"]
    lost = Candidate("lost", 10, True, 0.0, 70.0, guessed_resume_s=130.0)
    assert choose([due, new, lost], 30, 100.0) == ["lost", "new", "due"], "a hint that was not kept is none"
    assert choose([], 11, 100.0) == []


def test_the_default_policy_has_the_larger_one_leave_of_two_expected_about_as_late() -> None:
    def candidate(name: str, size_bytes: int, lead_s: float) -> Candidate:
        return Candidate(name, size_bytes, True, 0.0, None, guessed_resume_s=100.0 + lead_s)

    choose = ExpectedLast().choose
    small, large, soon = candidate("small", 10, 50.0), candidate("large", 30, 49.0), candidate("soon", 99, 5.0)
    assert choose([small, large, soon], 20, 100.0) == ["large"]
    assert choose([small, candidate("twin", 10, 49.0)], 5, 100.0) == ["small"], "of two alike the one expected last"
    assert choose([candidate("never", 1, math.inf), large], 1, 100.0) == ["never"]
    assert choose([candidate("over", 99, -3.0), candidate("due", 1, -1.0)], 1, 100.0) == ["due"]


def patiently(session, call, *args, **options):
    """Try again while running sessions leave no room; a refused session is whole, and may have to be resumed first."""
    while True:
        try:
            if call != session.resume and session.state in (SessionState.PAUSED, SessionState.SWAPPED):
                session.resume()
            return call(*args, **options)
        except OutOfDeviceMemory:
            time.sleep(0.01)


def test_many_threads_on_a_small_device(make_rig: MakeRig) -> None:
    """A seeded soak: a watchdog fails it, a wrong token fails it, a leak fails the rig's close."""
    rig = make_rig(device_bytes=8 * SESSION_BYTES, host_bytes=12 * SESSION_BYTES, disk_bytes=40 * SESSION_BYTES)
    wanted = {}
    for seed in range(8):
        oracle = Oracle(rig.stock)
        first = oracle.forward(prompt(seed=seed))
        wanted[seed] = [first, *oracle.greedy(first, 6)]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            session = rig.open()
            logits = patiently(session, session.forward, prompt(seed=seed))
            for want, _ in zip(wanted[seed], range(6), strict=False):
                assert torch.equal(logits, want)
                token = logits.float().argmax(-1)[:, None]
                stop = draw.choice([None, 1, 3, 4])
                logits = patiently(session, session.forward, token, stop_after=stop)
                session.pause(release=draw.random() < 0.5, expected_resume_s=draw.choice([None, 0.05]))
                time.sleep(draw.random() * 0.02)
                out = patiently(session, session.resume)
                logits = logits if stop is None else out
            session.close()
        except (AssertionError, DjinnError, RuntimeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not failures, failures


def test_a_resume_takes_the_host_copies_of_sessions_that_stay_on_the_device(make_rig: MakeRig) -> None:
    """The host is full of clean copies of paused sessions on the device, and one session lies on disk."""
    rig = make_rig(device_bytes=7 * SESSION_BYTES, host_bytes=5 * SESSION_BYTES, disk_bytes=8 * SESSION_BYTES)
    pager = rig.sessions.pager
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt(seed=0))
    away = rig.open()
    away.forward(prompt(seed=0))
    away.pause(release=True)
    away.wait_until("released", 10)
    spill(rig, away)
    resident = []
    for seed in range(1, 6):
        session = rig.open()
        session.forward(prompt(seed=seed))
        session.pause(expected_resume_s=10.0 * (6 - seed))
        session.wait_until("clean", 10)
        resident.append(session)
    assert all(candidate.clean for candidate in pager._candidates(None, None, set()))
    assert rig.host.free_bytes < SESSION_BYTES
    away.resume()
    wanted = oracle.greedy(first, 1)[0]
    assert torch.equal(away.forward(first.float().argmax(-1)[:, None]), wanted)
    dirty = [session for session in resident if not session._holding.is_clean()]
    assert dirty == resident[-1:], "the one expected soonest is taken from, and no other"
    seen = {candidate.session: candidate.clean for candidate in pager._candidates(None, None, set())}
    assert seen == {session.id: session not in dirty for session in resident}, "a policy is told so"
    dirty[0].wait_until("clean", 10)  # whoever waits has it written back again
    for seed, session in enumerate(resident, 1):
        mine = Oracle(rig.stock)
        logits = mine.forward(prompt(seed=seed))
        pager.evict(session._holding)
        session.resume()
        assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), mine.greedy(logits, 1)[0])


def test_a_write_back_that_nobody_waits_for_takes_nothing_from_others(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES, host_bytes=2 * SESSION_BYTES, disk_bytes=8 * SESSION_BYTES)
    sessions = []
    for seed in range(4):
        session = rig.open()
        session.forward(prompt(seed=seed))
        session.pause()
        sessions.append(session)
    deadline = time.monotonic() + 10
    while any(s._holding.queued for s in sessions) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [s._holding.is_clean() for s in sessions] == [True, True, False, False]
    copied = rig.device.copied.d2h_bytes
    sessions[3].wait_until("clean", 10)
    assert sessions[3]._holding.is_clean() and rig.device.copied.d2h_bytes > copied


def test_a_session_that_has_run_again_is_not_taken_for_clean(make_rig: MakeRig) -> None:
    rig = make_rig()
    session = rig.open()

    def taken_for_clean() -> bool:
        (candidate,) = rig.sessions.pager._candidates(None, None, set())
        return candidate.clean

    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    assert taken_for_clean()
    session.resume()
    session.forward(torch.tensor([[1]]))
    rig.device.faults = FaultPlan().fail("copy", 1)
    session.pause()
    while session._holding.queued:
        time.sleep(0.01)
    assert not taken_for_clean()
    rig.device.faults = None
    session.resume()
    session.pause()
    session.wait_until("clean", 10)
    assert taken_for_clean()


def test_a_policy_that_raises_is_an_error_of_whoever_needs_room(make_rig: MakeRig) -> None:
    """It ends no worker: once the policy works again, so does everyone."""

    class Broken(ExpectedLast):
        broken = False

        def choose(self, candidates, needed_bytes, now_s):
            if self.broken:
                raise KeyError("a bug")
            return super().choose(candidates, needed_bytes, now_s)

    policy = Broken()
    rig = make_rig(device_bytes=4 * SESSION_BYTES, policy=policy)
    sessions = paused(rig, 8)
    deadline = time.monotonic() + 10
    while sum(s.state is SessionState.SWAPPED for s in sessions) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    policy.broken = True
    time.sleep(0.2)  # the workers look ahead meanwhile
    raised = 0
    for session in sessions:
        try:
            session.resume()
            session.forward(torch.tensor([[5]]))
            session.pause()
        except DjinnError as error:
            assert "the policy Broken raised KeyError" in str(error)
            raised += 1
    assert raised > 0
    policy.broken = False
    for seed, session in enumerate(sessions):
        if session.state is not SessionState.RUNNING:
            session.resume()
        if session.length == 12:
            oracle = Oracle(rig.stock)
            logits = oracle.forward(prompt(seed=seed))
            wanted = oracle.greedy(logits, 1)[0]
            assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), wanted)
        session.pause()
