"""The pager: moves sessions between the device and the host. Whom to move, the policy says.

One lock guards who holds what and in which state; maps, copies and waits happen outside of it. Two worker threads, each
with a stream of its own, use both directions of the link at once: one writes paused sessions back, one brings sessions
in (resumes first, then prefetches, which give way between two layers).

Invariant: a running session's memory is never taken, and a paused one's only when it is clean. A move that fails leaves
the session where it was, or partly on the device with its host copy whole, and can be tried again.

Not taken: paging single blocks on demand. A session is wanted as a whole, and half of one on the device serves nobody.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from djinn_core.device.base import Device, Event
from djinn_core.errors import ConfigError, DeviceError, DjinnError, IntegrityError, OutOfDeviceMemory
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.extents import Extent, ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.memory.ledger import Kind
from djinn_core.sessions.blocks import Block, BlockTable, Layout
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.checkpoint import Boundary, Checkpoint
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.policy import Candidate, ExpectedLast, Policy
from djinn_core.sessions.staging import Staging
from djinn_core.sessions.state import SessionState, refusal, transition
from djinn_core.sessions.tiers import Tiers
from djinn_core.sessions.writeback import write_back

EVENTS_KEPT = 100_000
PREFETCH_LEAD_S = 0.1  # how long before an expected resume its bring-in begins, besides the copy itself
PREFETCH_BYTES_PER_S = 20e9
TICK_S = 0.05


@dataclass(frozen=True)
class PagerEvent:
    """One thing that the pager did.

    Attributes:
        time_s: on the clock of `time.perf_counter`.
        ms: how long the host was at it; copies may still be in flight.
        copies: timing events around the copies of a swap, on the device's clock.
    """

    time_s: float
    session: str
    event: str
    bytes: int
    ms: float
    copies: tuple[Event, Event] | None = None

    def __str__(self) -> str:
        return f"{self.time_s:.6f} {self.session} {self.event} {self.bytes} bytes {self.ms:.3f} ms"


class Pager:
    """Sessions of one runtime, and their memory. Thread-safe.

    Attributes:
        lock: the condition that guards all holdings and blocks; notified on every change.
        events: what happened, oldest first, bounded.
        on_event: called with each event, if set.
    """

    def __init__(
        self,
        device: Device,
        pool: ExtentPool,
        host: HostTier,
        disk: DiskTier | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.device = device
        self.pool = pool
        self.policy: Policy = policy or ExpectedLast()
        self.lock = threading.Condition()
        self.holdings: dict[str, Holding] = {}
        self.tiers = Tiers(self, host, disk)
        self.staging = Staging(device, pool, self.acquire_one)
        self.h2d = device.stream()
        self.d2h = device.stream()
        self.events: deque[PagerEvent] = deque(maxlen=EVENTS_KEPT)
        self.on_event: Callable[[PagerEvent], None] | None = None
        self._acquiring = threading.RLock()
        self._in: queue.SimpleQueue[BringIn | None] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[Holding | Boundary | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work_in, name="djinn-pager-in", daemon=True),
            threading.Thread(target=self._work_out, name="djinn-pager-out", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def log(
        self,
        holding: Holding,
        event: str,
        size_bytes: int = 0,
        seconds: float = 0.0,
        copies: tuple[Event, Event] | None = None,
    ) -> None:
        self.log_id(holding.id, event, size_bytes, seconds, copies)

    def log_id(
        self,
        session: str,
        event: str,
        size_bytes: int = 0,
        seconds: float = 0.0,
        copies: tuple[Event, Event] | None = None,
    ) -> None:
        entry = PagerEvent(time.perf_counter(), session, event, size_bytes, seconds * 1e3, copies)
        self.events.append(entry)
        if self.on_event is not None:
            self.on_event(entry)

    # opening and closing

    def open(self, layout: Layout, boundary_bytes: int) -> Holding:
        """Admit a session that may become as long as `layout` says. It holds no device memory yet.

        Raises:
            OutOfDeviceMemory: it could not run even alone, or all tiers together could not hold everyone at their
                longest; nobody else is disturbed.
        """
        with self.lock:
            self._admit(layout)
            holding = Holding(self.device, layout)
            self.holdings[holding.id] = holding
        try:
            self.staging.grow(boundary_bytes)
        except BaseException:
            with self.lock:
                del self.holdings[holding.id]
            holding.region.close()
            raise
        self.log(holding, "open", layout.total_bytes)
        return holding

    def _admit(self, layout: Layout) -> None:
        device_bytes = self.pool.budget_bytes - sum(
            size for (kind, _), size in self.pool.usage().held.items() if kind is not Kind.KV
        )
        if layout.total_bytes > device_bytes:
            raise OutOfDeviceMemory(
                f"a session of {layout.max_length} tokens does not fit the device beside weights and staging; open it "
                "shorter, or give a larger budget_bytes",
                needed_bytes=layout.total_bytes,
                free_bytes=device_bytes,
            )
        tiers = {
            "device": device_bytes,
            "host": self.tiers.host.free_bytes + self._host_bytes(),
            "disk": self.tiers.disk.budget_bytes if self.tiers.disk else 0,
        }
        promised = sum(holding.layout.total_bytes for holding in self.holdings.values())
        free_bytes = sum(tiers.values()) - promised
        if layout.total_bytes > free_bytes:
            named = ", ".join(f"{name} {size:,}" for name, size in tiers.items())
            raise OutOfDeviceMemory(
                f"{len(self.holdings)} open sessions may take {promised:,} bytes of what sessions can have ({named}); "
                "close one, or raise budget_bytes, host_bytes or disk_bytes",
                needed_bytes=layout.total_bytes,
                free_bytes=max(0, free_bytes),
            )

    def _host_bytes(self) -> int:
        blocks = {b for h in self.holdings.values() for b in h.table if b.host is not None}
        blocks |= {b for h in self.holdings.values() for c in h.checkpoints for b in c.table if b.host is not None}
        return sum(block.size_bytes for block in blocks)

    def close_session(self, holding: Holding) -> None:
        """Give up everything that only this session holds. Waits for its transfers to end."""
        holding.wait_issued(cancel=True)
        with self.lock:
            transition(holding.id, holding.state, SessionState.CLOSED, "be closed")
            self.lock.wait_for(lambda: not (holding.draining or holding.moving or holding.pins))
            holding.moving = True
        try:
            self._take_all(holding)
        except DjinnError:  # it is as it was, and can be closed again
            with self.lock:
                holding.moving = False
                self.lock.notify_all()
            raise
        for checkpoint in list(holding.checkpoints):
            self.drop_checkpoint(holding, checkpoint)
        with self.lock:
            gone = holding.table.assign([0] * holding.layout.layers, [[] for _ in range(holding.layout.layers)])
            for block in gone:
                if not block.holders:
                    self.tiers.discard(block)
            del self.holdings[holding.id]
            holding.moving = False
            holding.go(SessionState.CLOSED, "be closed")
            self.lock.notify_all()
        holding.region.close()
        self.log(holding, "close")

    def _take_all(self, holding: Holding) -> None:
        """Unmap all that a closing session has mapped, after saving what others still want of it."""
        self._settle_device(holding)
        try:
            holding.done_reading()
        except DeviceError as error:
            self.log(holding, f"lost copy ({error})")
        with self.lock:
            shared = [b for b in holding.mapped.values() if len(b.places) == 1 and self._wanted_by_others(holding, b)]
        if shared:
            write_back_of_closing(self, holding, shared)
        self._unmap(holding, list(holding.mapped.values()))

    def _wanted_by_others(self, holding: Holding, block: Block) -> bool:
        own = {id(holding.table), *(id(c.table) for c in holding.checkpoints)}
        return any(id(table) not in own for table in block.holders) and block.host_valid_bytes < block.end_bytes()

    def _settle_device(self, holding: Holding) -> None:
        """Nothing queued on the device touches this session's memory any more."""
        for event in (holding.pass_done, *holding.arrival):
            try:
                event.synchronize()
            except DeviceError as error:
                self.log(holding, f"lost copy ({error})")

    def close(self) -> None:
        """End the workers and give the staging extents back. Sessions have been closed."""
        if self._closed:
            return
        self._closed = True
        self._in.put(None)
        self._out.put(None)
        for thread in self._threads:
            thread.join()
        self.staging.close()

    # passes

    def claim(self, holding: Holding, first: int, last: int, new: int) -> None:
        """Make room for `new` tokens in layers `first` to `last` - 1; all of it is mapped, or being issued, on return.

        Raises:
            OutOfDeviceMemory: running sessions leave no room; the session is as it was.
        """
        table = holding.table
        with self.lock:
            end = table.lengths[first] + new if first < last else 0
            if not holding.jobs and first == 0 and end <= table.writable_until:
                table.claimed = end
                return
        self._prune(holding)
        job = BringIn(self, holding, range(len(table.lengths)), self._reach(table, first, last, new))
        job.run()
        if any(job.copied):
            holding.jobs.append(job)
        if first == 0 and last == len(table.lengths):
            with self.lock:
                rows = min(len(row) for row in table.blocks)
                layout = table.layout
                table.writable_until = min(rows * layout.block_bytes // layout.token_bytes, layout.max_length)

    def _prune(self, holding: Holding) -> None:
        """Forget bring-ins that are complete.

        Raises:
            DjinnError: one failed; what it was to fill is off the device, the host has it, resume again.
        """
        holding.wait_issued()
        for job in list(holding.jobs):
            try:
                if job.error is not None:
                    raise job.error
                if job.restored.query():
                    holding.jobs.remove(job)
            except DjinnError:
                self._distrust(holding)
                raise

    def _reach(self, table: BlockTable, first: int, last: int, new: int) -> list[int]:
        return [n + new if first <= layer < last else n for layer, n in enumerate(table.lengths)]

    def settle(self, holding: Holding, first: int, last: int, new: int) -> None:
        """The pass has been issued: its layers hold `new` tokens more."""
        holding.pass_done.record(self.device.current_stream())
        with self.lock:
            table = holding.table
            for layer in range(first, last):
                table.lengths[layer] += new
            table.claimed = 0
            holding.last_use_s = time.monotonic()

    def abandon(self, holding: Holding) -> None:
        """The pass failed: no layer holds more than before it."""
        holding.pass_done.record(self.device.current_stream())
        with self.lock:
            holding.table.claimed = holding.table.writable_until = 0
        if holding.jobs:
            holding.wait_issued()
            self._distrust(holding)

    def _distrust(self, holding: Holding) -> None:
        """Take back what failed copies were to fill; the host has it whole."""
        failed = any(job.error for job in holding.jobs)
        lost = self._lost(holding)
        failed = failed or bool(lost)
        if failed:
            with self.lock:
                if holding.state in (SessionState.RESUMING, SessionState.RUNNING):
                    holding.go(SessionState.PAUSED, "fall back")
            self._take_back(holding, lost)

    def _take_back(self, holding: Holding, lost: Sequence[Block] | None = None) -> None:
        if lost is None:
            lost = self._lost(holding)
        if lost:
            self._unmap(holding, lost)
        with self.lock:
            holding.jobs.clear()
            if holding.state is not SessionState.RESUMING:
                self._settle_state(holding, None)

    def _lost(self, holding: Holding) -> list[Block]:
        """Blocks whose bring-in failed on the way; the host has them whole."""
        lost: list[Block] = []
        for layer, arrival in enumerate(holding.arrival):
            try:
                arrival.synchronize()
            except DeviceError:
                row = holding.table.blocks[layer]
                lost += [b for b in row if holding.mapped.get(b.offset) is b and b.host_valid_bytes >= b.end_bytes()]
        return lost

    # pause and resume

    def pause(self, holding: Holding, expected_resume_s: float | None, release: bool) -> None:
        """PAUSED, and its write-back under way. Returns at once."""
        with self.lock:
            holding.go(SessionState.PAUSED, "be paused")
            now_s = time.monotonic()
            holding.expected_resume_s = None if expected_resume_s is None else now_s + expected_resume_s
            holding.last_use_s = now_s
            holding.release, holding.queued, holding.prefetch_tried = release, True, False
            holding.trouble = None
        self._out.put(holding)
        self.log(holding, "pause")

    def resume(self, holding: Holding, first: int, last: int, new: int) -> BringIn | None:
        """Bring everything back that a pass of layers `first` to `last` - 1 over `new` tokens wants, and the rest after.

        The pass may begin at once and gate each layer on `holding.jobs`; returns None when all was there.
        """
        with self.lock:
            self.lock.wait_for(lambda: not holding.moving)
            if holding.state is SessionState.FAILED and holding.failure is not None:
                raise refusal(holding.id, holding.state, "resume") from holding.failure
            if holding.state is not SessionState.RUNNING:
                holding.go(SessionState.RESUMING, "resume")
            holding.release = False
        self._forget(holding)
        if not holding.jobs and holding.is_resident():
            try:
                self.claim(holding, first, last, new)
            finally:
                self._settle_state(holding, None)
            return None
        layers = range(holding.layout.layers)
        order = [*range(first, len(layers)), *range(first)]
        job = BringIn(self, holding, order, self._reach(holding.table, first, last, new))
        holding.jobs.append(job)
        self._in.put(job)
        return job

    def _forget(self, holding: Holding) -> None:
        """End earlier bring-ins, before another attempt: what is complete is forgotten, what failed is taken back."""
        holding.wait_issued(cancel=True)
        for job in list(holding.jobs):
            try:
                if job.error is None and not job.restored.query():
                    continue
            except DeviceError as error:
                job.error = job.error or error
            if job.error is not None:
                self._take_back(holding)
                return
            holding.jobs.remove(job)

    def raise_failed(self, holding: Holding) -> None:
        """Tell the caller of a bring-in that failed after `resume` had returned, once."""
        for job in list(holding.jobs):
            if job.done and job.error is not None:
                self._take_back(holding)
                raise job.error

    def ended(self, job: BringIn) -> None:
        """A bring-in will issue nothing more. Called once, before anyone who waits for it goes on."""
        holding = job.holding
        if job.error is not None:
            self.log(holding, f"not brought in ({job.error})")
        with self.lock:
            if job.prefetch and job in holding.jobs:
                holding.jobs.remove(job)
            self._settle_state(holding, job.error)
            if job.prefetch and not job.error:
                self.log(holding, "prefetched", job.bytes)

    def _settle_state(self, holding: Holding, error: DjinnError | None) -> None:
        """RUNNING when a resume has succeeded, else paused again, with or without memory; FAILED when bytes were lost."""
        with self.lock:
            state = holding.state
            if isinstance(error, IntegrityError) and state is not SessionState.CLOSED:
                holding.go(SessionState.FAILED, "fail")
                holding.failure = error
            elif state is SessionState.RESUMING and error is None:
                holding.go(SessionState.RUNNING, "run")
            elif state is SessionState.RESUMING:
                holding.go(SessionState.PAUSED, "fall back")
            if holding.state is SessionState.PAUSED and not holding.mapped:
                holding.go(SessionState.SWAPPED, "leave the device")
            elif holding.state is SessionState.SWAPPED and holding.mapped:
                holding.go(SessionState.PAUSED, "be brought in")
            self.lock.notify_all()

    def prefetch(self, holding: Holding) -> None:
        """Begin to bring a swapped session back, into free memory or at the cost of sessions expected later."""
        with self.lock:
            if holding.state is not SessionState.SWAPPED or holding.jobs:
                return
            holding.prefetch_tried = True
            reach = list(holding.table.lengths)
            job = BringIn(self, holding, range(len(reach)), reach, prefetch=True)
            holding.jobs.append(job)
        self._in.put(job)

    def wait_until(self, holding: Holding, what: str, timeout_s: float) -> None:
        """Block until the session is clean, released or restored."""
        reached = {
            "clean": lambda: not holding.queued and not holding.draining and holding.is_clean(),
            "released": lambda: not holding.queued and holding.state is SessionState.SWAPPED,
            "restored": lambda: not holding.being_brought,
        }
        if what not in reached:
            raise ConfigError(f"cannot wait until {what!r}; known are {', '.join(reached)}")
        with self.lock:
            self.lock.wait_for(lambda: reached[what]() or self._stuck(holding, what), timeout_s)
            if not reached[what]():
                if self._stuck(holding, what):
                    raise holding.trouble or refusal(holding.id, holding.state, f"become {what}")
                raise TimeoutError(
                    f"session {holding.id} was not {what} within {timeout_s} s; it is {holding.state.value}"
                )
        if what == "restored":
            for job in list(holding.jobs):
                try:
                    if job.error is not None:
                        raise job.error
                    job.restored.synchronize()
                except DjinnError:
                    self._distrust(holding)
                    raise

    def _stuck(self, holding: Holding, what: str) -> bool:
        """It cannot become so any more without the caller doing something."""
        if what == "restored":
            return False
        if holding.trouble is not None and not holding.queued:
            return True
        if what == "released":
            away = (SessionState.PAUSED, SessionState.SWAPPED)
            return holding.state not in away or not (holding.release or holding.queued or holding.moving)
        return False

    # going back, and branching

    def adopt(self, holding: Holding, checkpoint: Checkpoint) -> None:
        """The lineage becomes the checkpoint's. Blocks that only others still want are written back and unmapped."""
        with self.lock:
            self.lock.wait_for(lambda: not holding.moving)
            keep = {
                block
                for row, n in zip(checkpoint.table.blocks, checkpoint.table.lengths, strict=True)
                for block in row[: holding.layout.count(n)]
            }
            leaving = [block for block in holding.mapped.values() if block not in keep]
        if leaving:
            self.displace(holding, leaving)
        with self.lock:
            gone = holding.table.assign(checkpoint.table.lengths, checkpoint.table.blocks)
            for block in gone:
                if not block.holders:
                    self.tiers.discard(block)
            self.lock.notify_all()

    def displace(self, holding: Holding, blocks: list[Block]) -> None:
        """Unmap `blocks` here; before the last place of one goes, the host has all that its holders can see."""
        with self.lock:
            own = holding.table
            kept = [b for b in blocks if len(b.places) == 1 and any(table is not own for table in b.holders)]
        if kept:
            write_back(self, holding, kept)
        with self.lock:
            self.lock.wait_for(lambda: not (holding.draining or holding.moving or holding.pins))
            holding.moving = True
            there = [block for block in blocks if holding.mapped.get(block.offset) is block]
        try:
            self._unmap(holding, there)
        finally:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()

    def fork(self, holding: Holding) -> Holding:
        """Another session with the same past: it shares every block, and has none mapped yet.

        Raises:
            OutOfDeviceMemory: the tiers could not hold both at their longest.
        """
        with self.lock:
            self._admit(holding.layout)
            twin = Holding(self.device, holding.layout)
            twin.table = holding.table.copy()
            twin.go(SessionState.PAUSED, "be forked")
            twin.go(SessionState.SWAPPED, "be forked")
            self.holdings[twin.id] = twin
        self.log(twin, f"fork of {holding.id}")
        return twin

    def add_checkpoint(self, holding: Holding, checkpoint: Checkpoint) -> None:
        with self.lock:
            holding.checkpoints.append(checkpoint)
            if checkpoint.boundary is not None:
                checkpoint.boundary.refs += 1

    def drop_checkpoint(self, holding: Holding, checkpoint: Checkpoint) -> None:
        """Give up what only this checkpoint refers to."""
        with self.lock:
            holding.checkpoints.remove(checkpoint)
            gone = checkpoint.table.assign([0] * holding.layout.layers, [[] for _ in range(holding.layout.layers)])
            orphans = [block for block in gone if not block.holders]
            boundary = checkpoint.boundary
            if boundary is not None:
                boundary.refs -= 1
        if boundary is not None and not boundary.refs:
            self._discard_boundary(boundary)
        with self.lock:
            for block in orphans:  # mapped ones belong to a table; these are off the device
                self.tiers.discard(block)
            self.lock.notify_all()

    def _discard_boundary(self, boundary: Boundary) -> None:
        if boundary.written is not None:
            try:
                boundary.written.synchronize()
            except DeviceError as error:
                self.log_id("-", f"lost copy ({error})")
        boundary.device = None
        with self.lock:
            self.lock.wait_for(lambda: not boundary.readers)
            self.tiers.discard(boundary)

    def boundary_issued(self, boundary: Boundary) -> None:
        """Its copy to the host is under way; its device copy is dropped when that is complete."""
        self._out.put(boundary)

    # leaving the device

    def evict(self, holding: Holding) -> bool:
        """Take a paused session off the device, after writing back what is new. False when it is not paused any more."""
        while True:
            with self.lock:
                if holding.state is not SessionState.PAUSED or holding.moving or holding.pins:
                    return holding.state is SessionState.SWAPPED
                clean = holding.is_clean() and not holding.draining and not holding.being_brought
                if clean:
                    holding.moving = True
            if clean:
                break
            holding.wait_issued()
            write_back(self, holding, list(holding.mapped.values()))
        begun_s = time.perf_counter()
        size_bytes = holding.own_device_bytes
        try:
            self._settle_device(holding)
            self._unmap(holding, list(holding.mapped.values()))
        except DeviceError:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()
            raise
        with self.lock:
            holding.moving = False
            holding.jobs.clear()
            holding.go(SessionState.SWAPPED, "leave the device")
            self.lock.notify_all()
        self.log(holding, "evict", size_bytes, time.perf_counter() - begun_s)
        return True

    def _unmap(self, holding: Holding, blocks: Sequence[Block]) -> None:
        """Unmap here, and give back what is mapped nowhere else. Nobody borrows or copies from here meanwhile."""
        if not blocks:
            return
        with self.lock:
            self.lock.wait_for(lambda: not holding.draining and not holding.pins)
            before, holding.moving = holding.moving, True
        free: list[Extent] = []
        try:
            self._settle_device(holding)
            holding.region.unmap([block.offset for block in blocks])
            with self.lock:
                for block in blocks:
                    del holding.mapped[block.offset]
                    block.places.discard(holding)
                    if not block.places:
                        free.append(block.device)
                        block.device = None
                        block.ready = None
                holding.table.writable_until = 0
        finally:
            with self.lock:
                holding.moving = before
                self.lock.notify_all()
        for extent in free:
            self.pool.give_back(extent)

    # room on the device

    def acquire_one(self, size_bytes: int, kind: Kind, owner: str) -> Extent:
        """One extent, after evicting paused sessions if need be."""
        with self._acquiring:
            while True:
                try:
                    return self.pool.acquire(size_bytes, kind, owner)
                except OutOfDeviceMemory:
                    if not self._make_room(size_bytes, None, None):
                        raise

    def acquire(self, holding: Holding, sizes: Sequence[int], limit_s: float | None = None) -> list[Extent]:
        """Extents of all `sizes`, or none. Paused sessions make room; with `limit_s` only ones expected later.

        Raises:
            OutOfDeviceMemory: what is left belongs to running sessions; nothing changed for them.
        """
        got: list[Extent] = []
        left = sum(sizes)
        with self._acquiring:
            try:
                for size_bytes in sizes:
                    while True:
                        try:
                            got.append(self.pool.acquire(size_bytes, Kind.KV, holding.id))
                            break
                        except OutOfDeviceMemory as error:
                            if not self._make_room(left, holding, limit_s):
                                raise OutOfDeviceMemory(
                                    f"session {holding.id} needs {left:,} bytes more, and no other paused session can "
                                    "leave the device; pause or close one and try again",
                                    needed_bytes=left,
                                    free_bytes=error.free_bytes,
                                ) from error
                    left -= size_bytes
            except BaseException:
                for extent in got:
                    self.pool.give_back(extent)
                raise
        return got

    def _make_room(self, needed_bytes: int, keep: Holding | None, limit_s: float | None) -> bool:
        """Evict as the policy says until `needed_bytes` are free; False when nobody could leave."""
        tried: set[str] = set()
        freed_any = False
        while self.pool.free_bytes < needed_bytes or not freed_any:
            candidates = self._candidates(keep, limit_s, tried)
            chosen = self.policy.choose(candidates, needed_bytes - self.pool.free_bytes, time.monotonic())
            if not chosen:
                break
            for name in chosen:
                tried.add(name)
                holding = self.holdings.get(name)
                if holding is not None:
                    freed_any |= self._try_evict(holding)
        return freed_any

    def _try_evict(self, holding: Holding) -> bool:
        self.log(holding, "chosen", holding.own_device_bytes)
        try:
            return self.evict(holding)
        except DjinnError as error:  # it stays whole where it is; another one may leave instead
            holding.trouble = error
            self.log(holding, f"stays ({error})")
            return False

    def _candidates(self, keep: Holding | None, limit_s: float | None, tried: set[str]) -> list[Candidate]:
        with self.lock:
            return [
                Candidate(h.id, h.own_device_bytes, h.is_clean(), h.last_use_s, h.expected_resume_s)
                for h in self.holdings.values()
                if h is not keep
                and h.id not in tried
                and h.state is SessionState.PAUSED
                and h.mapped
                and not h.moving
                and not h.pins
                and not h.being_brought
                and (limit_s is None or h.expected_resume_s is None or h.expected_resume_s > limit_s)
            ]

    # workers

    def _work_out(self) -> None:
        self.device.bind_thread()
        while (item := self._out.get()) is not None:
            if isinstance(item, Boundary):
                self._settle_boundary(item)
            else:
                self._drain(item)

    def _settle_boundary(self, boundary: Boundary) -> None:
        try:
            boundary.written.synchronize()
        except DeviceError as error:
            self.log_id("-", f"boundary stays on the device ({error})")
            return
        with self.lock:
            boundary.host_valid_bytes = boundary.size_bytes
            boundary.device = None
            self.lock.notify_all()

    def _drain(self, holding: Holding) -> None:
        try:
            holding.wait_issued()
            if holding.state is SessionState.PAUSED:
                write_back(self, holding, list(holding.mapped.values()))
            if holding.release:
                self.evict(holding)
        except DjinnError as error:
            holding.trouble = error
            self.log(holding, f"stays dirty ({error})")
        finally:
            with self.lock:
                holding.queued = False
                self.lock.notify_all()

    def _work_in(self) -> None:
        self.device.bind_thread()
        while not self._closed:
            try:
                job = self._in.get(timeout=TICK_S)
            except queue.Empty:
                self._look_ahead()
                continue
            if job is None:
                return
            self._bring(job)

    def _bring(self, job: BringIn) -> None:
        try:
            job.run()
        except DjinnError as error:
            job.error = error  # whoever waits for it is told; `ended` has put the session where it can try again

    def _look_ahead(self) -> None:
        """Begin the bring-in of sessions whose owners said that they come back soon."""
        now_s = time.monotonic()
        with self.lock:
            due = [
                h
                for h in self.holdings.values()
                if h.state is SessionState.SWAPPED
                and h.expected_resume_s is not None
                and not h.prefetch_tried
                and h.expected_resume_s - now_s < PREFETCH_LEAD_S + h.layout.total_bytes / PREFETCH_BYTES_PER_S
            ]
        for holding in sorted(due, key=lambda h: h.expected_resume_s):
            self.prefetch(holding)


def write_back_of_closing(pager: Pager, holding: Holding, blocks: Iterable[Block]) -> None:
    """A closing session's last copies, for those who share its blocks."""
    holding.moving = False
    try:
        write_back(pager, holding, blocks)
    finally:
        holding.moving = True
