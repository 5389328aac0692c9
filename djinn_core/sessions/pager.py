"""The pager: moves sessions between the device and the host. Whom to move, the policy says.

One lock guards who holds what and in which state; maps, copies and waits happen outside of it. Both directions of the
link are used at once, each by a stream and a thread of its own: a writer, and `Link`, which brings sessions in.

Invariant: a running session's memory is never taken, and a paused one's only when it is clean. A move that fails leaves
the session where it was, or partly on the device with its host copy whole, and can be tried again.

Not taken: paging single blocks on demand. A session is wanted as a whole, and half of one on the device serves nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from djinn_core.device.base import Device
from djinn_core.errors import (
    ConfigError,
    DjinnError,
    IntegrityError,
    OutOfDeviceMemory,
    SessionStateError,
)
from djinn_core.interrupts import Uninterrupted, wait_for
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.extents import ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.sessions.admission import admit
from djinn_core.sessions.ahead import Callers
from djinn_core.sessions.blocks import Block, BlockTable, Layout
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.link import Link
from djinn_core.sessions.pauses import checked, seconds
from djinn_core.sessions.policy import Policy
from djinn_core.sessions.state import SessionState, refusal
from djinn_core.sessions.writer import Writer

AT_ONCE_BLOCKS = 4  # a few tenths of a millisecond to unmap
HELP_FROM_S = 1.0  # who waits this long for a write-back does it itself; who only looks is not held up


class Pager(Writer):
    """Sessions of one runtime, and their memory. Thread-safe.

    Attributes:
        link: bring-ins under way.
        callers: how many there are, who may resume while others do.
    """

    def __init__(
        self,
        device: Device,
        pool: ExtentPool,
        host: HostTier,
        disk: DiskTier | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(device, pool, host, disk, policy)
        self._closed = False
        self.callers = Callers()
        self.link = Link(self)
        self.link.start()

    def count_callers(self) -> None:
        """Take note of how many there are now."""
        with self.lock:
            calls = sum(holding.user.locked() for holding in self.holdings.values())
        self.callers.see(calls, time.monotonic())

    @property
    def shared(self) -> bool:
        """Another caller may resume at any time; what the link has in flight by then, he waits for."""
        return min(self.callers.most(time.monotonic()), len(self.holdings)) > 1

    def open(self, layout: Layout, boundary_bytes: int) -> Holding:
        """Admit a session that may become as long as `layout` says. It holds no device memory yet.

        Raises:
            OutOfDeviceMemory: it could not run even alone, or all tiers together could not hold everyone at their
                longest; nobody else is disturbed.
        """
        with self.lock:
            admit(layout, self.holdings.values(), self.pool, self.tiers, self.staging.growth_bytes(boundary_bytes))
            holding = Holding(self.device, layout)
            self.holdings[holding.id] = holding
        try:
            self.staging.grow(boundary_bytes)
        except BaseException:
            with self.lock:
                del self.holdings[holding.id]
            holding.region.close()
            raise
        self.tiers.expect_sessions()
        self.log(holding, "open", layout.total_bytes)
        return holding

    def close(self) -> None:
        """End the workers and give the staging extents back. Sessions have been closed."""
        if self._closed:
            return
        self._closed = True
        self.link.close()
        self.end_writer()
        self.staging.close()

    def claim(self, holding: Holding, first: int, last: int, new: int) -> None:
        """Make room for `new` tokens in layers `first` to `last` - 1: held on return, and mapped by the pass at last.

        Raises:
            OutOfDeviceMemory: running sessions leave no room; the session is as it was.
        """
        table = holding.table
        with self.lock:
            end = table.lengths[first] + new if first < last else 0
            if not holding.jobs and first == 0 and end <= table.writable_until:
                table.claimed = end
                return
        reach = self._reach(table, first, last, new)
        job = BringIn(self, holding, range(len(table.lengths)), reach)
        if not self._follow(holding, job):
            self._prune(holding)
            if not holding.jobs:
                self.sweep(holding)
            job.begin()
            if job.by_pass or any(job.arrival):
                holding.jobs.append(job)
        if first == 0 and last == len(table.lengths):
            with self.lock:
                layout = table.layout
                rows = min(map(layout.count, reach))
                table.writable_until = min(rows * layout.block_bytes // layout.token_bytes, layout.max_length)

    def _follow(self, holding: Holding, job: BringIn) -> bool:
        """Whether all that `job` needs is on its way already: a resume brings everything, and it claims the tails."""
        with self.lock:
            if len(holding.jobs) != 1:
                return False
            resume = holding.jobs[0]
            whole = len(resume.order) == len(holding.table.lengths)
            if resume.prefetch or resume.done or resume.cancelled or not whole or not job.claim_behind():
                return False
            resume.followed = True
        return True

    def _prune(self, holding: Holding) -> None:
        """Forget bring-ins that are complete.

        Raises:
            DjinnError: one failed; what it was to fill is off the device, the host has it, resume again.
        """
        holding.wait_issued()
        for job in list(holding.jobs):
            try:
                if job.complete():
                    holding.jobs.remove(job)
            except DjinnError:
                self._distrust(holding)
                raise

    def _reach(self, table: BlockTable, first: int, last: int, new: int) -> list[int]:
        return [n + new if first <= layer < last else n for layer, n in enumerate(table.lengths)]

    def settle(self, holding: Holding, first: int, last: int, new: int) -> None:
        """The pass has been issued: its layers hold `new` tokens more."""
        try:
            self._end_by_pass(holding, done=True)
        except BaseException:
            self._leave_pass(holding)
            raise
        self._leave_pass(holding, range(first, last), new)

    def enter_pass(self, holding: Holding) -> None:
        """From here to `settle` or `abandon` a pass uses its memory.

        Raises:
            DjinnError: the bring-in that the pass would rely on has failed already.
        """
        with self.lock:
            state = holding.state
            holding.in_pass = state in (SessionState.RUNNING, SessionState.RESUMING)
        if not holding.in_pass:
            self.raise_failed(holding)
            raise refusal(holding.id, state, "run") from holding.failure
        if (behind := holding.behind) is not None:
            behind.end(done=False)  # of an earlier pass: nothing, unless that one was interrupted at its end

    def _leave_pass(self, holding: Holding, layers: range = range(0), new: int = 0) -> None:
        """Nothing more is queued for the pass: `layers` hold `new` tokens more, and its memory is its own no longer.

        Both at once, or the session could be evicted as if it had no new tokens. What a bring-in that failed meanwhile
        would have done to the state is done now.
        """
        recorded = False
        try:
            holding.pass_done.record(self.device.current_stream())
            recorded = True
        finally:
            with self.lock:
                table = holding.table
                for layer in layers if recorded else ():
                    table.lengths[layer] += new
                table.claimed = 0
                if not (new and recorded):
                    table.writable_until = 0
                holding.last_use_s = time.monotonic()
                holding.in_pass = False
                for job in holding.jobs:
                    job.followed = False
                failed = any(job.error is not None and not job.prefetch for job in holding.jobs)
                if failed and holding.state is SessionState.RESUMING:
                    holding.go(SessionState.PAUSED, "fall back")
                    self.lock.notify_all()
            if (behind := holding.behind) is not None:
                behind.end(done=recorded and new > 0)
            self._begin_deferred(holding)

    def abandon(self, holding: Holding, lengths: Sequence[int]) -> None:
        """The pass failed: each layer holds its `lengths` of before it."""
        try:
            with self.lock:
                holding.table.lengths = list(lengths)
                holding.table.writable_until = 0
            self._end_by_pass(holding, done=False)
        finally:
            self._leave_pass(holding)
        if holding.jobs:
            holding.wait_issued()
            self._distrust(holding)

    def _end_by_pass(self, holding: Holding, *, done: bool) -> None:
        for job in [job for job in holding.jobs if job.by_pass]:
            holding.jobs.remove(job)
            if not job.done:
                job.end(done=done)

    def _distrust(self, holding: Holding) -> None:
        """Take back what failed copies were to fill; the host has it whole. A bring-in that failed is told of once."""
        lost = holding.lost()
        if lost or holding.misled:
            with self.lock:
                if holding.state in (SessionState.RESUMING, SessionState.RUNNING):
                    holding.go(SessionState.PAUSED, "fall back")
            self._take_back(holding, lost)

    def _take_back(self, holding: Holding, lost: Sequence[Block] | None = None) -> None:
        if lost is None:
            lost = holding.lost()
        if lost:
            self._unmap_alone(holding, lost)  # it may be leaving the device just now
        with self.lock:
            holding.jobs.clear()
            if holding.state is not SessionState.RESUMING:
                self._settle_state(holding, None)

    def pause(self, holding: Holding, expected_resume_s: float | None, release: bool) -> None:
        """PAUSED, and its write-back under way, or SWAPPED if there was little to do. Returns at once.

        One that is paused already stays where it is, and only what is expected of it changes.
        """
        hint_s = checked(expected_resume_s)
        with self.lock:
            again = holding.state in (SessionState.PAUSED, SessionState.SWAPPED)
            if not again:
                holding.go(SessionState.PAUSED, "be paused")
                holding.last_use_s = holding.paused_s = time.monotonic()
            holding.expected_resume_s = None if hint_s is None else time.monotonic() + hint_s
            holding.release, holding.prefetch_failed = release, False
            if holding.state is SessionState.PAUSED:
                self._want(holding)
                holding.trouble, holding.needed = None, False
        self.log(holding, "pause again" if again else "pause")
        gone = False
        try:
            gone = release and self._leave_at_once(holding)
        except Exception as error:  # noqa: BLE001 - the writer meets it again, and tells who waits
            self.log(holding, f"not released at once ({error!r})")
        finally:
            if not gone:
                self._out.put(holding)

    def _leave_at_once(self, holding: Holding) -> bool:
        """Unmap it, if nothing is left to copy or to wait for, and so little that to wake the writer takes longer."""
        behind = holding.behind
        if len(holding.mapped) > AT_ONCE_BLOCKS or holding.jobs or (behind is not None and not behind.idle):
            return False
        self.device.bind_thread()
        if not holding.pass_done.query():
            return False
        if behind is not None:
            behind.settle()
        begun_s, parted = time.perf_counter(), []
        with self.leaving(holding):
            with self.lock:
                busy = holding.moving or holding.draining or holding.pins
                if busy or holding.state is not SessionState.PAUSED or not holding.is_clean():
                    return False
                holding.moving = True
            self._leave(holding, parted)
            with self.lock:
                holding.unstarted, holding.queued = False, holding.drains > 0
                self.lock.notify_all()
        if any(parted):
            self.log(holding, "evict", sum(parted), time.perf_counter() - begun_s)
        return True

    def resume(self, holding: Holding, first: int, last: int, new: int) -> BringIn | None:
        """Bring back what a pass of layers `first` to `last` - 1 over `new` tokens wants, and then the rest.

        The pass may begin at once and gate each layer on `holding.jobs`; returns None when all was there.
        """
        if holding.state is SessionState.RESUMING:  # another place is wanted before the last one was reached
            holding.wait_issued(cancel=True, interruptible=True)
        with self.lock:
            self.wait_unmoved(holding)
            self._refuse_failed(holding, "resume")
            if holding.state not in (SessionState.RUNNING, SessionState.RESUMING):  # that one was interrupted
                holding.go(SessionState.RESUMING, "resume")
                self.pauses.ended(holding)
            holding.release, holding.renewing = False, True
        try:
            self._forget(holding)
        finally:
            holding.renewing = False
        if not holding.jobs:
            self.sweep(holding)
        if not holding.jobs and holding.is_resident():
            try:
                self.claim(holding, first, last, new)
            finally:
                self._settle_state(holding, None)
            return None
        layers, lengths = holding.layout.layers, holding.table.lengths
        reach = self._reach(holding.table, first, last, new)
        if first and not any(lengths[first:]):
            return self._resume_behind(holding, first, reach)
        job = BringIn(self, holding, [*range(first, layers), *range(first)], reach)
        holding.jobs.append(job)
        self.link.begin(job)
        return job

    def _resume_behind(self, holding: Holding, first: int, reach: list[int]) -> BringIn:
        """For a pass whose layers hold nothing yet: it maps them itself, as it comes to them.

        What lies before them comes when the pass has been issued, so that no thread takes the interpreter from it.
        """
        ahead = BringIn(self, holding, range(first, len(reach)), reach)
        behind = BringIn(self, holding, range(first), reach)
        ahead.begin()
        self._settle_state(holding, None)
        if ahead.by_pass:
            holding.jobs.append(ahead)
        holding.jobs.append(behind)
        holding.deferred = behind
        return behind

    def _begin_deferred(self, holding: Holding) -> None:
        job, holding.deferred = holding.deferred, None
        if job is not None:
            self.link.put(job)
        if holding.orphans:
            self.tiers.discard_orphans(holding)

    def _forget(self, holding: Holding) -> None:
        """End earlier bring-ins, before another attempt: what is complete is forgotten, what failed is taken back."""
        holding.wait_issued(cancel=True, interruptible=True)
        for job in list(holding.jobs):
            try:
                if job.error is None and not job.complete():
                    continue
            except DjinnError as error:
                job.error = job.error or error
            if job.error is not None:
                self._take_back(holding)
                return
            holding.jobs.remove(job)

    def raise_failed(self, holding: Holding) -> None:
        """Tell the caller of a bring-in that failed after `resume` had returned, once."""
        for job in list(holding.jobs):
            if job.error is not None and not job.prefetch:
                job.wait_issued()
                self._take_back(holding)
                raise job.error

    def ended(self, job: BringIn) -> None:
        """A bring-in will issue nothing more. Called once, before anyone who waits for it goes on."""
        holding = job.holding
        if job.error is not None:
            self.log(holding, f"not brought in ({job.error})")
        with self.lock:
            if job.prefetch and job.error is not None:
                holding.prefetch_failed |= not isinstance(job.error, OutOfDeviceMemory)
                if not any(job.arrival) and job in holding.jobs:
                    holding.jobs.remove(job)
            in_pass = holding.in_pass and job.error is not None  # it uses what has come; its end decides
            if not (holding.renewing or in_pass) or isinstance(job.error, IntegrityError):
                self._settle_state(holding, job.error)
            if job.prefetch and not job.error:
                self.log(holding, "prefetched", job.bytes)

    def fail(self, holding: Holding, error: IntegrityError) -> None:
        """It has lost what it cannot go on without: FAILED."""
        self._settle_state(holding, error)

    def _settle_state(self, holding: Holding, error: DjinnError | None) -> None:
        """RUNNING when a resume has succeeded, else paused again or off the device; FAILED when bytes were lost."""
        with self.lock:
            state = holding.state
            if isinstance(error, IntegrityError):
                holding.lose(error)
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
            self._refuse_failed(holding, "be prefetched")
            if holding.state is not SessionState.SWAPPED or holding.jobs or holding.changing:
                return
            reach = list(holding.table.lengths)
            job = BringIn(self, holding, range(len(reach)), reach, prefetch=True)
            holding.jobs.append(job)
        self.link.put(job)

    def _refuse_failed(self, holding: Holding, doing: str) -> None:
        if holding.state is SessionState.FAILED:
            raise refusal(holding.id, holding.state, doing) from holding.failure

    def wait_until(self, holding: Holding, what: str, timeout_s: float) -> None:
        """Block until the session is clean, released or restored.

        A write-back that no thread has taken up yet is done here, by a caller who is ready to wait: waking another
        thread, and being woken by it, takes as long as the copies of a layer. It is not cut short by `timeout_s`.
        """
        reached = {
            "clean": lambda: not holding.queued and not holding.draining and holding.is_clean(),
            "released": lambda: not holding.queued and holding.state is SessionState.SWAPPED,
            "restored": lambda: not holding.being_brought,
        }
        if what not in reached:
            raise ConfigError(f"cannot wait until {what!r}; known are {', '.join(reached)}")
        timeout_s = seconds("timeout_s", timeout_s)
        self._refuse_failed(holding, f"become {what}")
        with Uninterrupted():
            if what == "clean":
                self._ask_clean(holding)
            if what != "restored" and timeout_s >= HELP_FROM_S:
                self._drain(holding)
            self._wait_until(holding, what, reached[what], timeout_s)

    def _wait_until(self, holding: Holding, what: str, reached: Callable[[], bool], timeout_s: float) -> None:
        with self.lock:
            wait_for(self.lock, lambda: reached() or self._stuck(holding, what), timeout_s)
            if not reached():
                if self._stuck(holding, what):
                    if holding.trouble is None and what == "released" and holding.state is SessionState.PAUSED:
                        raise SessionStateError(
                            f"session {holding.id} will not be released: it is paused, and stays on the device until "
                            "someone needs its memory; pause it with release=True"
                        )
                    raise holding.trouble or refusal(holding.id, holding.state, f"become {what}")
                raise TimeoutError(
                    f"session {holding.id} was not {what} within {timeout_s} s; it is {holding.state.value}"
                )
        if what == "restored":
            for job in list(holding.jobs):
                try:
                    job.restored.synchronize()
                    job.complete()
                except DjinnError:
                    with self.lock:
                        idle = not holding.in_pass  # else the pass runs into the same
                        if idle and holding.state in (SessionState.RESUMING, SessionState.RUNNING):
                            holding.go(SessionState.PAUSED, "fall back")  # no pass begins from here on
                    if idle:
                        self._take_back(holding)
                    raise

    def _stuck(self, holding: Holding, what: str) -> bool:
        """It cannot become so any more without the caller doing something."""
        if what == "restored":
            return False
        if holding.trouble is not None and not holding.queued:
            return True
        if holding.state not in (SessionState.PAUSED, SessionState.SWAPPED):
            return what == "released" or not (holding.queued or holding.draining)
        return what == "released" and not (holding.release or holding.queued or holding.moving)
