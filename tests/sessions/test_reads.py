"""Reading from disk takes seconds: who needs no disk does not wait for it, and a resume reads before a prefetch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import pytest
import torch

from djinn_core.errors import OutOfDeviceMemory, OutOfDisk, OutOfHostMemory
from djinn_core.sessions import Session, SessionState, ahead, blocks, bringin, link, tiers
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, released, spill, wait_for

pytestmark = pytest.mark.timeout(60)  # the watchdog: a read that nobody lets through
UNIT = 64 << 10
SESSION_BYTES = LAYERS * UNIT


class SlowDisk:
    """Reads that wait, but for the first `free` ones, until they are let through. `begun`, `ended`: how many have."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch, free: int = 0) -> None:
        self.begun, self.ended, self.through, read = 0, 0, threading.Event(), rig.disk.read

        def slow(block: object, dst: torch.Tensor) -> None:
            self.begun += 1
            if self.begun > free:
                self.through.wait(10)
            read(block, dst)
            self.ended += 1

        monkeypatch.setattr(rig.disk, "read", slow)


@pytest.fixture
def full(make_rig: MakeRig) -> Iterator[Rig]:
    """A device that is full of clean sessions: whoever comes back has to make one leave."""
    rig = make_rig(device_bytes=4 * SESSION_BYTES, host_bytes=12 * SESSION_BYTES, disk_bytes=24 * SESSION_BYTES)
    yield rig
    wait_for(lambda: rig.sessions.pager.link.idle)


def on_disk(rig: Rig, seed: int) -> Session:
    session = released(rig, seed)
    spill(rig, session)
    return session


def fill(rig: Rig) -> None:
    for seed in range(10, 13):
        session = rig.open()
        session.forward(prompt(seed=seed))
        session.pause(expected_resume_s=100.0)
        session.wait_until("clean", 10)


@pytest.mark.parametrize("reads", ["prefetch", "resume"])
def test_who_only_needs_room_does_not_wait_for_a_read(full: Rig, monkeypatch: pytest.MonkeyPatch, reads: str) -> None:
    monkeypatch.setattr(ahead, "keep_room", lambda pager: None)
    far, near, oracle = on_disk(full, 1), released(full, 2), Oracle(full.stock)
    fill(full)
    assert full.pool.free_bytes < SESSION_BYTES
    slow, ids = SlowDisk(full, monkeypatch), likely(oracle.forward(prompt(seed=2)))
    getattr(far, reads)()
    wait_for(lambda: slow.begun)
    near.resume()
    assert torch.equal(near.forward(ids), oracle.forward(ids))
    assert slow.ended == 0, "the read was waited for"
    slow.through.set()


@pytest.fixture
def branches(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> tuple[Rig, Session, Session, Session]:
    """Two forks, the first one running, the own blocks of the second one on disk; and a session off the device."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", UNIT)
    monkeypatch.setattr(ahead, "keep_room", lambda pager: None)
    rig = make_rig(device_bytes=60 * UNIT, host_bytes=200 * UNIT, disk_bytes=200 * UNIT)
    stranger, first = released(rig, 2), rig.open(max_length=250)
    first.forward(prompt(tokens=140, seed=5))
    second = first.fork()
    second.resume()
    second.forward(prompt(tokens=40, seed=6))
    first.forward(torch.tensor([[5]]))
    second.pause(release=True)
    second.wait_until("released", 10)
    own = [block for block in second._holding.table if block.device is None and block.host is not None]
    assert own and all(rig.sessions.pager.tiers._spill(second._holding, block) for block in own)
    return rig, first, second, stranger


@pytest.mark.parametrize("reads", ["prefetch", "resume"])
def test_who_lends_to_one_that_is_read_may_leave_meanwhile(
    branches, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """Nothing is claimed in the seconds of a read."""
    rig, first, second, stranger = branches
    oracle = Oracle(rig.stock)
    ids = likely(oracle.forward(prompt(seed=2)))
    first.pause(expected_resume_s=1000.0)
    first.wait_until("clean", 10)
    rig.sessions.pager.resize(rig.pool.held_bytes + 2 * UNIT)
    slow = SlowDisk(rig, monkeypatch)
    getattr(second, reads)()
    wait_for(lambda: slow.begun)
    stranger.resume()
    assert torch.equal(stranger.forward(ids), oracle.forward(ids))
    assert first.state is SessionState.SWAPPED and slow.ended == 0
    slow.through.set()
    wait_for(lambda: rig.sessions.pager.link.idle)


def test_a_fork_that_the_host_has_does_not_wait_for_the_others_read(branches, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, first, second, _ = branches
    first.pause(release=True)
    first.wait_until("released", 10)
    slow = SlowDisk(rig, monkeypatch)
    second.prefetch()
    wait_for(lambda: slow.begun)
    first.resume()
    first.wait_until("restored", 5)
    assert slow.ended == 0
    slow.through.set()
    wait_for(lambda: rig.sessions.pager.link.idle)


def test_a_read_under_way_is_waited_for_where_the_host_is_full(make_rig: MakeRig, monkeypatch) -> None:
    """What it reads can be spilled a moment later: nobody is refused for it."""
    monkeypatch.setattr(ahead, "keep_room", lambda pager: None)
    rig = make_rig(device_bytes=40 * UNIT, host_bytes=2 * SESSION_BYTES, disk_bytes=60 * SESSION_BYTES)
    oracle, pager, said = Oracle(rig.stock), rig.sessions.pager, []
    far, near, dirty = on_disk(rig, 1), released(rig, 2), rig.open()
    ids = likely(oracle.forward(prompt(seed=2)))
    dirty.forward(prompt(seed=3))
    pager.resize(rig.pool.held_bytes)
    slow = SlowDisk(rig, monkeypatch, free=LAYERS - 1)
    far.prefetch()
    wait_for(lambda: slow.begun == LAYERS)
    caller = threading.Thread(target=lambda: (near.resume(), said.append(near.forward(ids))))
    dirty.pause(expected_resume_s=1000.0)
    caller.start()
    time.sleep(0.2)
    slow.through.set()
    caller.join(10)
    assert torch.equal(said[0], oracle.forward(ids)) and dirty.state is SessionState.SWAPPED
    wait_for(lambda: pager.link.idle)


def test_room_is_kept_beside_a_read(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    far, slow = on_disk(full, 1), SlowDisk(full, monkeypatch)
    monkeypatch.setattr(ahead, "keep_room", lambda pager: looks.append(time.monotonic()))
    far.prefetch()
    wait_for(lambda: slow.begun)
    looks.clear()
    wait_for(lambda: len(looks) > 1)
    slow.through.set()


def test_a_resume_reads_before_the_rest_of_a_prefetch(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is read twice."""
    expected, wanted = on_disk(full, 1), on_disk(full, 2)
    slow, pager = SlowDisk(full, monkeypatch), full.sessions.pager
    expected.prefetch()
    wait_for(lambda: slow.begun)
    wanted.resume()
    wait_for(lambda: pager.link.reads_wanted)
    slow.through.set()
    for session, what in ((wanted, "restored"), (expected, "restored")):
        session.wait_until(what, 10)
    reads = [event.session for event in pager.events if event.event == "disk_read"]
    assert reads == [expected.id, *[wanted.id] * LAYERS, *[expected.id] * (LAYERS - 1)]


def test_a_prefetch_that_nobody_wants_any_more_stops_reading(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session, slow = on_disk(full, 1), SlowDisk(full, monkeypatch)
    session.prefetch()
    wait_for(lambda: slow.begun)
    closing = threading.Thread(target=session.close)
    closing.start()
    wait_for(lambda: session._holding.jobs and session._holding.jobs[0].cancelled)
    slow.through.set()
    closing.join(10)
    assert slow.begun == 1


def test_without_a_disk_no_thread_reads(make_rig: MakeRig) -> None:
    before = [each.name for each in threading.enumerate()].count("djinn-disk")
    rigs = [make_rig(), make_rig(disk_bytes=SESSION_BYTES)]
    assert [each.name for each in threading.enumerate()].count("djinn-disk") == before + 1
    for rig in rigs:
        rig.close()
    assert [each.name for each in threading.enumerate()].count("djinn-disk") == before


def test_what_flies_is_looked_at_by_one_thread_at_a_time(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who resumes looks whether he is alone, while the link's thread takes out what has arrived."""
    other: list[threading.Thread] = []

    class Flying(deque):
        """Another thread takes something out in the middle of a look."""

        def __iter__(self) -> Iterator:
            rows = super().__iter__()
            if other:
                yield from rows
                return
            yield next(rows)
            other.append(threading.Thread(target=of._has_room))
            other[-1].start()
            other[-1].join(0.2)
            yield from rows

    of = full.sessions.pager.link
    event = full.device.event()
    event.record(full.sessions.pager.h2d)
    event.synchronize()
    monkeypatch.setattr(of, "_flying", Flying([(None, event, 1), (None, event, 1)]))
    assert of._serves_nobody()
    other[0].join(10)
    assert not of._flying


def test_a_slow_disk_does_not_use_up_the_patience(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What spilling takes is work, not waiting."""
    of, left_s = full.sessions.pager.tiers, []
    taken = full.host.allocate(full.host.free_bytes, "all of it")
    answers = iter(
        [None, OutOfDisk("full", needed_bytes=1, free_bytes=0), OutOfDisk("full", needed_bytes=1, free_bytes=0)]
    )

    def make_room(*_: object) -> OutOfDisk | None:
        time.sleep(0.3)
        return next(answers)

    def wait_for_transfers(owner: str, give_up_s: float) -> bool:
        left_s.append(give_up_s - time.monotonic())
        return False

    monkeypatch.setattr(of, "_make_room", make_room)
    monkeypatch.setattr(of, "wait_for_transfers", wait_for_transfers)
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.5)
    with pytest.raises(OutOfHostMemory):
        of.allocate(64 << 10, "s")
    assert 0 < left_s[0] <= 0.25, "the second try took 0.3 s of 0.5"
    taken.free()


def test_who_waits_for_another_eviction_has_his_patience_left(full: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(full)
    pager, left_s, held = full.sessions.pager, [], threading.Event()
    session = full.open()
    wait_for_transfers = pager.tiers.wait_for_transfers

    def waits(owner: str, give_up_s: float, *of: object) -> bool:
        left_s.append(give_up_s - time.monotonic())
        return wait_for_transfers(owner, give_up_s, *of)

    def hold() -> None:
        with pager._acquiring:
            held.set()
            time.sleep(0.5)

    monkeypatch.setattr(pager.tiers, "wait_for_transfers", waits)
    monkeypatch.setattr(pager, "_make_room", lambda *_: False)
    monkeypatch.setattr(pager, "_able", lambda *_: [])
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(OutOfDeviceMemory, match="needs"):
        session.forward(prompt(tokens=40))
    holder.join()
    assert left_s[0] > tiers.PATIENCE_S - 0.3


def test_a_smaller_budget_waits_for_who_is_on_his_way(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bringin, "STEP_BYTES", 1)
    monkeypatch.setattr(link, "QUEUED_BYTES", 1)
    rig = make_rig(device_bytes=3 * SESSION_BYTES)
    session, oracle = released(rig, 1), Oracle(rig.stock)
    ids = likely(oracle.forward(prompt(seed=1)))
    rig.device.link_gbps = 20e-6
    session.prefetch()
    wait_for(lambda: session._holding.mapped)
    rig.sessions.pager.resize(rig.pool.budget_bytes - 2 * SESSION_BYTES)
    rig.device.link_gbps = None
    assert session.state is SessionState.SWAPPED
    rig.sessions.pager.resize(3 * SESSION_BYTES)
    session.resume()
    assert torch.equal(session.forward(ids), oracle.forward(ids))
