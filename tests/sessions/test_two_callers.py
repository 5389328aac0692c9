"""Two threads at once: branches that append, an open beside a stop, a close beside a release or a pass."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch

from djinn_core.errors import DjinnError, OutOfHostMemory
from djinn_core.sessions import Session, SessionState
from djinn_core.sessions.snapshot import load_session
from djinn_core.turn import Way
from tests.sessions.alone import alone
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import MakeRig, Rig, wait_for

UNIT = 64 << 10
SESSION_BYTES = 4 * UNIT
pytestmark = pytest.mark.timeout(60)


BRANCHES = """
import os, sys, threading
from pathlib import Path
import torch
from djinn_core.sessions.bringin import BringIn
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import make_rig
rig = make_rig(Path(sys.argv[1]))
ids, oracle = torch.tensor([[5]]), Oracle(rig.stock)
oracle.forward(prompt())
wanted = oracle.forward(ids)
one = rig.open()
one.forward(prompt())
start = one.checkpoint()
one.forward(ids)
later = one.checkpoint()          # keeps the longer tail: whoever appends at `start` copies it first
one.resume(start)
two = one.fork()
two.resume()
two.wait_until("restored", 10)
both, plain = threading.Barrier(2), BringIn._prepare_sources
def together(self):               # both have planned before either displaces; nothing else is changed
    try:
        both.wait(2)
    except threading.BrokenBarrierError:
        pass
    return plain(self)
BringIn._prepare_sources = together
right = []
def run(session):
    right.append(torch.equal(session.forward(ids), wanted))
threads = [threading.Thread(target=run, args=(s,), daemon=True) for s in (one, two)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(5)
if any(thread.is_alive() for thread in threads):
    print("both wait for ever; pins", one._holding.pins, two._holding.pins, flush=True)
    os._exit(3)
assert right == [True, True]
rig.close()
"""


def test_two_branches_that_append_at_once(tmp_path: Path) -> None:
    done = alone(BRANCHES, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-600:])


STORE = """
import sys, threading
from pathlib import Path
from tests.sessions.oracle import prompt
from tests.sessions.rigs import make_rig
rig = make_rig(Path(sys.argv[1]))
session = rig.open()
staging = rig.sessions.pager.staging
slot = staging._outbound
wait, inside, opened = rig.device._caller.wait_event, threading.Event(), threading.Event()
def late(event):
    wait(event)
    if event is slot.free and not inside.is_set():
        inside.set()          # the pass's thread is between taking the slot and writing to it
        opened.wait(5)
rig.device._caller.wait_event = late
def other():
    inside.wait(10)
    rig.open(max_length=2000)    # its boundary is larger: new slots, and the old ones go
    opened.set()
thread = threading.Thread(target=other)
thread.start()
session.forward(prompt(), stop_after=2)
thread.join()
session.resume()
rig.close()
print("whole")
"""


def test_a_longer_session_is_opened_while_a_pass_stops(tmp_path: Path) -> None:
    done = alone(STORE, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr[-600:])


LOAD = """
import sys
from pathlib import Path
from djinn_core.errors import BreakpointError
from tests.sessions.oracle import prompt
from tests.sessions.rigs import make_rig
rig = make_rig(Path(sys.argv[1]))
session = rig.open()
session.forward(prompt(), stop_after=2)
session.pause(release=True)
session.wait_until("released", 10)
with rig.sessions.pager.lock:
    rig.sessions.pager.lock.wait_for(lambda: session.stopped.boundary.settled)
staging = rig.sessions.pager.staging
load = staging.load
def load_and_open(slot, source):
    rig.device.link_gbps = 0.00001            # 0.3 s for a boundary
    load(slot, source)
    rig.sessions.open(rig.served, max_length=2000)  # another thread's, at this moment
staging.load = load_and_open
try:
    session.resume(stop_after=1)              # a mistake: it has been executed to 2
except BreakpointError:
    pass
rig.device.synchronize()
rig.device.link_gbps = None
rig.close()
print("whole")
"""


def test_a_slot_goes_only_after_the_copy_into_it(tmp_path: Path) -> None:
    done = alone(LOAD, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr[-600:])


def test_a_slot_that_is_taken_while_larger_ones_are_made_stays_whole(rig: Rig) -> None:
    rig.open()
    staging = rig.sessions.pager.staging
    storing, taken = staging._storing, []

    class Between:
        """Another thread's resume takes a slot at this moment."""

        def __enter__(self) -> None:
            storing.acquire()

        def __exit__(self, *_: object) -> None:
            storing.release()
            other = threading.Thread(target=lambda: taken.append(staging.take(Way())))
            other.start()
            other.join(5)

    staging._storing = Between()
    staging.grow(1 << 20)
    staging._storing = storing
    assert taken[0]._region.mapped()
    staging.give_back(taken[0])
    assert not taken[0]._region.mapped() or taken[0] in staging._idle


def test_a_resume_goes_on_while_larger_slots_are_made(rig: Rig, monkeypatch) -> None:
    """They may need others' memory, and who gives that back has his own boundary to read."""
    session, staging = rig.open(), rig.sessions.pager.staging
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    acquire, waits, go_on = staging._acquire, threading.Event(), threading.Event()

    def slowly(*args: object) -> object:
        waits.set()
        go_on.wait(20)
        return acquire(*args)

    monkeypatch.setattr(staging, "_acquire", slowly)
    said: list[torch.Tensor] = []
    opening = threading.Thread(target=rig.open, args=(256, 2))
    resuming = threading.Thread(target=lambda: said.append(session.resume()), daemon=True)
    opening.start()
    assert waits.wait(10)
    resuming.start()
    resuming.join(5)
    went_on = bool(said)
    go_on.set()
    opening.join(10)
    resuming.join(10)
    assert went_on and torch.equal(said[0], Oracle(rig.stock).forward(prompt()))


def test_a_copy_into_a_slot_waits_for_its_last_reader(rig: Rig) -> None:
    rig.open()
    staging, reading, host = rig.sessions.pager.staging, rig.device.stream(), rig.host.allocate(64, "boundary")
    gate, slot = threading.Event(), staging.take(Way())
    rig.device.launch(reading, lambda: gate.wait(20))
    staging.read(slot, reading)
    staging.load(slot, host)
    time.sleep(0.05)
    assert not slot.ready.query()
    gate.set()
    slot.ready.synchronize()
    staging.give_back(slot)
    host.free()


def test_close_while_its_release_is_wanted(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt())
    twin = session.fork()  # the host has nothing of it: closing writes back for the branch
    pager, holding = rig.sessions.pager, session._holding
    plain, unmap, errors, log = pager.evict, holding.region.unmap, [], pager.log
    ready = threading.Event()

    def evict(h, **how):
        """The writer, as soon as the closing session looks as if it were nobody's."""
        ready.wait(5)
        try:
            return plain(h, **how)
        except BaseException as error:
            errors.append(error)
            raise

    def slowly(h, event, *rest):
        if event == "swap_out" and threading.current_thread().name != "djinn-writer":
            time.sleep(0.2)  # the interpreter is someone else's: the closing thread goes on later
        return log(h, event, *rest)

    at_once = threading.Barrier(2)

    def both(offsets):
        if offsets:
            with contextlib.suppress(threading.BrokenBarrierError):
                at_once.wait(0.5)
        return unmap(offsets)

    monkeypatch.setattr(pager, "evict", evict)
    monkeypatch.setattr(pager, "log", slowly)
    monkeypatch.setattr(holding.region, "unmap", both)
    from djinn_core.sessions import lineages

    back = lineages.write_back_of_closing

    def begun(*args):
        ready.set()
        return back(*args)

    monkeypatch.setattr(lineages, "write_back_of_closing", begun)
    session.pause(release=True)
    try:
        session.close()
    except DjinnError as error:
        errors.append(error)
    time.sleep(0.1)
    monkeypatch.undo()
    assert not errors
    assert session.state is SessionState.CLOSED
    twin.resume()


def test_drop_while_its_boundary_is_being_spilled(make_rig: MakeRig, monkeypatch, tmp_path: Path) -> None:
    rig = make_rig(host_bytes=16 * UNIT, disk_bytes=256 * UNIT)
    monkeypatch.setattr("djinn_core.sessions.link.look_ahead", lambda pager: None)
    small = rig.open()
    small.forward(prompt(seed=3))
    small.save(tmp_path / "small")
    small.close()
    session = rig.open()
    session.forward(prompt(), stop_after=1)
    session.resume()
    point = session.checkpoints[0]
    pager = rig.sessions.pager
    with pager.lock:
        assert pager.lock.wait_for(lambda: point.boundary.settled, 10)
    session._holding.behind.settle()
    filler = [rig.host.allocate(UNIT, "others") for _ in range(rig.host.free_bytes // UNIT - 3)]
    writing, go_on, write = threading.Event(), threading.Event(), rig.disk.write

    def slow(src):
        if src.numel() == point.boundary.size_bytes:
            writing.set()
            assert go_on.wait(10)
        return write(src)

    monkeypatch.setattr(rig.disk, "write", slow)
    monkeypatch.setattr(pager.tiers, "_repeated", lambda state: iter(()))  # it is the boundary's turn
    loaded = []
    loading = threading.Thread(target=lambda: loaded.append(load_session(tmp_path / "small", rig.served, rig.sessions)))
    loading.start()
    assert writing.wait(10)
    dropping = threading.Thread(target=session.drop, args=(point,), daemon=True)
    dropping.start()
    time.sleep(0.2)
    go_on.set()
    loading.join(10)
    dropping.join(3)
    hung = dropping.is_alive()
    with pager.lock:
        pager.lock.notify_all()
    dropping.join(3)
    assert not dropping.is_alive()
    for block in filler:
        block.free()
    assert loaded
    assert not hung, "the boundary has no readers, and nobody says so"


def test_a_block_is_not_given_back_while_it_is_written_to_disk(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=256 * UNIT)
    session = rig.open()
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    tiers, block = rig.sessions.pager.tiers, next(iter(session._holding.table))
    write, writing, go_on, held = rig.disk.write, threading.Event(), threading.Event(), []

    def slow(src):
        writing.set()
        go_on.wait(1)  # whoever closes has all the time he wants
        held.append(rig.host.held_bytes)
        return write(src)

    monkeypatch.setattr(rig.disk, "write", slow)
    spilling = threading.Thread(target=tiers._spill, args=(session._holding, block))
    spilling.start()
    assert writing.wait(10)
    closing = threading.Thread(target=session.close)
    closing.start()
    spilling.join(10)
    closing.join(10)
    assert held[0] >= UNIT, "its host memory was free, for anybody or the system, while it was read"


CLOSE = """
import sys, threading
from pathlib import Path
from djinn_core.errors import DjinnError, OutOfHostMemory
from tests.sessions.oracle import prompt
from tests.sessions.rigs import make_rig
rig = make_rig(Path(sys.argv[1]))
session = rig.open()
session.forward(prompt())
closing = threading.Thread(target=rig.sessions.close)
def close(*_):
    closing.start()
    closing.join(2)
rig.served.model.layers[1].register_forward_pre_hook(close)
try:
    session.forward(prompt())
except DjinnError as error:
    print("told:", error)
closing.join(10)
print("whole")
"""


def test_everything_is_closed_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    done = alone(CLOSE, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr[-600:])


@pytest.fixture
def full(make_rig: MakeRig) -> tuple[Rig, list[Session], Session]:
    """A device full of sessions that run, and one that has left."""
    rig = make_rig(device_bytes=4 * SESSION_BYTES)
    sessions = [rig.open() for _ in range(6)]
    for seed, session in enumerate(sessions):
        session.forward(prompt(seed=seed))
        session.pause()
        session.wait_until("clean", 10)
    fit = (rig.pool.free_bytes + rig.kv_bytes) // SESSION_BYTES
    for session in sessions[:fit]:  # others leave for it
        session.resume()
        session.wait_until("restored", 10)
    return rig, sessions[:fit], sessions[fit]


def test_what_comes_free_is_taken_while_another_one_evicts(full: tuple[Rig, list[Session], Session]) -> None:
    """Evicting may take long, where the host is full."""
    rig, there, away = full
    evicting, go_on = threading.Event(), threading.Event()

    def evict() -> None:
        with rig.sessions.pager._acquiring:
            evicting.set()
            go_on.wait(30)

    threads = [threading.Thread(target=evict), threading.Thread(target=away.resume)]
    threads[0].start()
    assert evicting.wait(10)
    threads[1].start()
    time.sleep(0.1)  # it waits by now
    there[0].close()
    wait_for(lambda: away.trace.job is not None and away.trace.job.done)
    assert away.trace.job.error is None and not go_on.is_set()
    go_on.set()
    for thread in threads:
        thread.join(10)


def test_who_is_on_his_way_may_leave_soon(full: tuple[Rig, list[Session], Session]) -> None:
    """A resume that needs the room of one who cannot leave this very moment is not refused for that."""
    rig, there, away = full
    victim, lock = there[0], rig.sessions.pager.lock
    victim.pause()
    victim.wait_until("clean", 10)
    with lock:
        victim._holding.moving = True
    resumed = threading.Thread(target=away.resume)
    resumed.start()
    time.sleep(0.1)
    with lock:
        victim._holding.moving = False
        lock.notify_all()
    resumed.join(10)
    wait_for(lambda: away.trace.job.done)
    assert away.trace.job.error is None and victim.state is SessionState.SWAPPED


def test_a_refusal_says_who_stays_and_why(full: tuple[Rig, list[Session], Session], monkeypatch) -> None:
    rig, there, away = full
    away.resume()
    wait_for(lambda: away.trace.job.done)
    assert f"({len(there)} running)" in str(away.trace.job.error)
    there[0].pause()
    there[0].wait_until("clean", 10)

    def refuse(*_: object, **__: object) -> bool:
        raise OutOfHostMemory("the host is full", needed_bytes=1, free_bytes=0)

    monkeypatch.setattr(rig.sessions.pager, "evict", refuse)
    away.resume()
    wait_for(lambda: away.trace.job.done)
    for part in (f"{len(there) - 1} running", "1 paused", f"; {there[0].id} stays: the host is full"):
        assert part in str(away.trace.job.error)
