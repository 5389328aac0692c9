"""What one session holds, as the pager sees it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING

from djinn_core.device.base import Device, Event
from djinn_core.errors import DeviceError, DjinnError, IntegrityError, SessionStateError
from djinn_core.interrupts import Uninterrupted
from djinn_core.memory.regions import Region
from djinn_core.sessions.blocks import Block, BlockTable, Layout, Stored
from djinn_core.sessions.state import SessionState, transition

if TYPE_CHECKING:
    from djinn_core.memory.extents import Extent
    from djinn_core.sessions.behind import Behind
    from djinn_core.sessions.bringin import BringIn
    from djinn_core.sessions.checkpoint import Boundary, Checkpoint

_NUMBERS = itertools.count(1)


class Holding:
    """A session's region, its lineage, its checkpoints, and where its bytes are. Guarded by the pager's lock.

    Attributes:
        mapped: the block at each offset of the region.
        pass_done: recorded on the compute stream when a pass has been issued.
        arrival: for each layer, recorded behind what was last brought in for it.
        jobs: bring-ins under way, or whose copies a pass may still have to wait for.
        orphans: blocks that its table no longer refers to; those without another holder are about to be given up.
        deferred: a bring-in that begins when the pass under way has been issued.
        queued, draining: a write-back is wanted, or under way.
        behind: what the last pass has written to the host while it ran, until that is taken in.
        unstarted: the wanted write-back has not been taken up by any thread yet.
        wanted: how many write-backs have been wanted; drains: how many threads do one now.
        in_pass: a pass uses its memory; a bring-in that fails meanwhile leaves the state to the end of the pass.
        needed: someone waits for that write-back, so it may take others' clean copies from the host.
        moving: its memory is being unmapped.
        changing: its owner gives it another lineage, or closes it; no prefetch begins.
        renewing: a resume waits for what was begun before it; its own bring-in decides about the state.
        leaving: how many are about to unmap it, and rely on its host copies.
        seeking: how many threads wait for host memory for it, or for others who may look for room themselves.
        reading: the boundary that the last resume copied in, and the event after which that is done.
        paused_s: since when it is paused, until someone tries to resume it.
        prefetch_failed: bringing it in early went wrong; it is not tried again before its next pause.
        pins: others that read its mapped blocks now.
        user, user_thread: held by the one caller who uses the session, and the thread that he is.
        stale: extents by offset that a bring-in mapped, did not use and could not unmap; they are of nobody else.
        found_clean: it was, and neither has its state changed since nor has the host given up a copy of it.
        found_own_bytes, found_missing_bytes: `own_device_bytes` and `missing_bytes`, when someone has asked since its
            state, its lineage or its maps changed last.
        shares: it is, or has, a fork: others may hold its blocks.
        displacing: blocks of its own have to go before they are copied; nobody borrows from it meanwhile.
        trouble: why the last write-back did not succeed; it is tried again at the next pause or eviction.
    """

    def __init__(self, device: Device, layout: Layout) -> None:
        self.id = f"s{next(_NUMBERS)}"
        self.layout = layout
        self.region = Region(device, layout.total_bytes)
        self.table = BlockTable(layout)
        self.checkpoints: list[Checkpoint] = []
        self.state = SessionState.RUNNING
        self.mapped: dict[int, Block] = {}
        self.pass_done = device.event(blocking=True)
        self.arrival = [device.event() for _ in range(layout.layers)]
        self.jobs: list[BringIn] = []
        self.orphans: list[Block] = []
        self.deferred: BringIn | None = None
        self.queued = self.unstarted = self.draining = self.needed = self.moving = self.release = self.changing = False
        self.renewing = False
        self.in_pass = False
        self.user = threading.Lock()
        self.user_thread: int | None = None
        self.displacing = False
        self.behind: Behind | None = None
        self.wanted = self.drains = 0
        self.leaving = self.seeking = 0
        self.pins = 0
        self.found_clean = False
        self.shares = False
        self.found_own_bytes: int | None = None
        self.found_missing_bytes: int | None = None
        self.stale: dict[int, Extent] = {}
        self.last_use_s = time.monotonic()
        self.expected_resume_s: float | None = None
        self.paused_s: float | None = None
        self.prefetch_failed = False
        self.reading: tuple[Boundary, Event] | None = None
        self.trouble: DjinnError | None = None
        self.failure: DjinnError | None = None

    def go(self, to: SessionState, doing: str) -> None:
        """Change the state, or refuse."""
        self.state = transition(self.id, self.state, to, doing)
        self.found_clean = False
        self.forget_bytes()

    def lose(self, failure: IntegrityError) -> None:
        """A part of its state is gone: FAILED, unless it is so already, or closed. The pager's lock is held."""
        if self.state not in (SessionState.CLOSED, SessionState.FAILED):
            self.go(SessionState.FAILED, "fail")
            self.failure = failure

    def forget_bytes(self) -> None:
        """Its lineage, or what is mapped of it, has changed."""
        self.found_own_bytes = self.found_missing_bytes = None

    def own(self, checkpoint: Checkpoint) -> Checkpoint:
        """This session's checkpoint of that id: a fork has its own of those that it shares."""
        for own in self.checkpoints:
            if own.id == checkpoint.id:
                return own
        known = ", ".join(own.id for own in self.checkpoints) or "none"
        raise SessionStateError(f"session {self.id} has no checkpoint {checkpoint.id}; it has {known}")

    def done_reading(self) -> None:
        """The last resume's boundary has been read, and may leave the host."""
        if self.reading is not None:
            boundary, ready = self.reading
            self.reading = None
            try:
                ready.synchronize()
            finally:
                with boundary.lock:
                    boundary.readers -= 1

    @contextmanager
    def changed(self, lock: threading.Condition) -> Iterator[None]:
        """Nothing is brought in meanwhile. Waits until what is under way has ended."""
        with lock:
            self.changing = True
        try:
            self.wait_issued(cancel=True)
            yield
        finally:
            with lock:
                self.changing = False

    @property
    def being_brought(self) -> bool:
        """A bring-in may still map something here."""
        return any(not job.done for job in self.jobs)

    @property
    def misled(self) -> bool:
        """A bring-in that is not forgotten failed, or a copy of it did."""
        for job in list(self.jobs):
            try:
                job.complete()
            except DjinnError:
                return True
        return False

    def in_motion(self) -> bool:
        """A transfer of its memory is under way, and ends by itself.

        What looks for room does not, on the host or on the device: it may wait for the very one who asks. So may a
        pass that maps its own layers: it waits for its turn.
        """
        if self.seeking:
            return False
        jobs = list(self.jobs)
        if self.draining or self.moving or self.leaving or any(job.moves for job in jobs):
            return True
        try:
            return not all(job.complete() for job in jobs if job.done)
        except DjinnError:  # it failed, which is an end too; whoever resumes it is told
            return False

    def wait_issued(self, *, cancel: bool = False, interruptible: bool = False) -> None:
        """Return when no bring-in will map anything more here; with `cancel`, as soon as may be.

        Where nothing is held yet the wait may be `interruptible`: another session may have to leave the device first.
        """
        for job in list(self.jobs):
            if (cancel or job.prefetch) and not job.done:
                job.cancel()
            job.wait_issued(interruptible=interruptible)

    def arrivals_of_jobs(self, layer: int | None = None) -> list[Event]:
        """The events behind what bring-ins that are not forgotten have copied, into `layer` or anywhere."""
        rows = [job.arrival if layer is None else job.arrival[layer : layer + 1] for job in list(self.jobs)]
        return [event for row in rows for event in row if event is not None]

    def lost(self) -> list[Block]:
        """Blocks whose bring-in failed on the way; the host has them whole. Waits for what is under way."""
        lost: list[Block] = []
        for layer, arrival in enumerate(self.arrival):
            arrived = [_arrives(event) for event in (arrival, *self.arrivals_of_jobs(layer))]  # each is waited for
            if not all(arrived):
                row = self.table.blocks[layer]
                lost += [b for b in row if self.mapped.get(b.offset) is b and b.host_valid_bytes >= b.end_bytes()]
        return lost

    @property
    def stored(self) -> set[Stored]:
        """All that it may have off the device: blocks, its checkpoints' too, and their boundaries."""
        points = list(self.checkpoints)
        boundaries = [point.boundary for point in points if point.boundary is not None]
        return {*self.table, *self.orphans, *boundaries}.union(*(point.table for point in points))

    @property
    def device_bytes(self) -> int:
        """Physical memory behind this region, shared blocks included."""
        return sum(block.size_bytes for block in list(self.mapped.values()))

    @property
    def own_device_bytes(self) -> int:
        """What its leaving would free."""
        return sum(block.size_bytes for block in list(self.mapped.values()) if len(block.places) == 1)

    def start_of(self, first: int, new: int) -> int:
        """The length at the beginning of a pass over `new` tokens that enters at layer `first`."""
        lengths = self.table.lengths
        return lengths[first] if first < len(lengths) else lengths[0] - new

    def is_resident(self) -> bool:
        """Every block of the lineage is mapped here."""
        return all(self.mapped.get(block.offset) is block for block in self.table)

    def dirty(self, block: Block) -> bool:
        """The block would lose bytes if it were unmapped here now."""
        return block.host_valid_bytes < block.end_bytes() and self.last_place(block)

    def last_place(self, block: Block) -> bool:
        """Nobody else keeps it on the device. Two that share it may be leaving at once: each must see to it then."""
        return all(place is self or place.moving or place.leaving for place in tuple(block.places))

    def is_clean(self) -> bool:
        """May be asked without the lock, for an answer that may be old by then."""
        return not any(self.dirty(block) for block in list(self.mapped.values()))

    @property
    def missing_bytes(self) -> int:
        """What its coming back would take."""
        return sum(block.size_bytes for block in self.table if block.device is None)

    # remembered, since who makes room asks everyone, and a walk over all blocks takes its time; cleanness may be wrong
    # where sessions share blocks, and whoever evicts looks again

    def seems_clean(self) -> bool:
        """`is_clean`, remembered."""
        if not self.found_clean:
            self.found_clean = self.is_clean()
        return self.found_clean

    def seems_to_free(self) -> int:
        """`own_device_bytes`, remembered. For a paused session; the pager's lock is held."""
        if self.shares:
            return self.own_device_bytes
        if self.found_own_bytes is None:
            self.found_own_bytes = self.own_device_bytes
        return self.found_own_bytes

    def seems_to_miss(self) -> int:
        """`missing_bytes`, remembered. For a session off the device; the pager's lock is held."""
        if self.shares:
            return self.missing_bytes
        if self.found_missing_bytes is None:
            self.found_missing_bytes = self.missing_bytes
        return self.found_missing_bytes


class Use(Uninterrupted):
    """A call of a session's one caller, entered around it; Ctrl-C waits for its end, or for the next layer.

    A generator would take longer than what a resume does here.

    Raises:
        SessionStateError: another thread is in such a call.
    """

    __slots__ = ("_doing", "_holding")

    def __init__(self, holding: Holding, doing: str) -> None:
        self._holding = holding
        self._doing = doing

    def __enter__(self) -> None:
        Uninterrupted.__enter__(self)
        if not self._holding.user.acquire(blocking=False):
            Uninterrupted.__exit__(self)
            user = "another thread is using it; a session has one caller at a time"
            if self._holding.user_thread == get_ident():
                user = "a call of it is under way on this thread (a hook of its pass?); let that end first"
            raise SessionStateError(f"session {self._holding.id} cannot {self._doing}: {user}")
        self._holding.user_thread = get_ident()

    def __exit__(self, *exception: object) -> None:
        self._holding.user_thread = None
        self._holding.user.release()
        Uninterrupted.__exit__(self)


def _arrives(event: Event) -> bool:
    """Wait for it; False when the copy before it failed."""
    try:
        event.synchronize()
    except DeviceError:
        return False
    return True
