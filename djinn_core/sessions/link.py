"""The link to the device: bring-ins under way share it step by step, the most urgent first.

A resume's first layer is issued by the thread that resumes, if nobody has to be waited for: it wants that layer before
anything else, and a worker would first have to wake and to get the interpreter. Where nobody else is on the link, or
about to be, it issues the second step too, or the link would idle until the worker is there. One worker issues what
comes after.
Before each step it asks again who is the most urgent, and it keeps so much in flight that the link never idles when the
worker is late, and no more: who resumes meanwhile gets his first layer after the step under way, since steps give way
to it (`Device.copy_all`), and the next behind all that is in flight. While that much is on its way the worker maps the
steps that come next. What may take long others do, so that it never does: a second one evicts, waits for other
sessions' transfers, and looks ahead; a third one reads from disk, resumes before prefetches.

Not taken: to issue whole sessions. Who resumes second would wait for all of the first one before his second layer. One
worker for all that may take long: who only needs room would wait for another session's seconds of disk.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

from djinn_core.device.base import Event
from djinn_core.errors import DeviceError
from djinn_core.sessions.ahead import look_ahead

if TYPE_CHECKING:
    from djinn_core.sessions.bringin import BringIn
    from djinn_core.sessions.pager import Pager

QUEUED_BYTES = 48 << 20  # behind the step under way, besides the next: time for a thread to get the interpreter
TICK_S = 0.05


class Stage(Enum):
    """How far a bring-in has come."""

    WANTED = "wanted"
    BLOCKED = "has to wait for someone first"
    WAITING = "is being prepared"  # by another worker than the link's, or by who resumes
    PREPARED = "holds all that its layers need"


_NEXT = {
    Stage.WANTED: {Stage.BLOCKED, Stage.PREPARED},
    Stage.BLOCKED: {Stage.WAITING, Stage.PREPARED},
    Stage.WAITING: {Stage.BLOCKED, Stage.PREPARED},
    Stage.PREPARED: set(),
}


class Link:
    """The bring-ins of one runtime. Thread-safe; a bring-in is forgotten when it has ended."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._changed = threading.Condition()
        self._stages: dict[BringIn, Stage] = {}
        self._flying: deque[tuple[BringIn, Event, int]] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._issue, name="djinn-link", daemon=True),
            threading.Thread(target=self._prepare, args=(False,), name="djinn-ahead", daemon=True),
        ]
        if pager.tiers.disk is not None:
            self._threads.append(threading.Thread(target=self._prepare, args=(True,), name="djinn-disk", daemon=True))

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def begin(self, job: BringIn) -> None:
        """`put`, and its first steps are issued here and now, on the caller's thread, if it has to wait for nobody."""
        with self._changed:
            self._stages[job] = Stage.WAITING  # the workers need not wake for it
        try:
            if prepared := job.prepare(wait=False):
                job.marks.append(("memory held", time.perf_counter()))
                alone = self._serves_nobody() and not self._pager.write_backs  # a grant takes long beside one
                self._step(job)
                job.marks.append(("first step issued", time.perf_counter()))
                if alone and job.left and not self._pager.way.shared:
                    self._step(job)
        except BaseException as error:
            self._end(job, error)  # the pass that waits for it is told, as by a worker
            if not isinstance(error, Exception):
                raise
            return
        self._go(job, Stage.PREPARED if prepared else Stage.BLOCKED)

    def put(self, job: BringIn) -> None:
        """Begin; returns at once. The job ends with `Pager.ended`, in any case."""
        with self._changed:
            self._stages[job] = Stage.BLOCKED if job.prefetch else Stage.WANTED
            self._changed.notify_all()

    def nudge(self) -> None:
        """A bring-in was cancelled."""
        with self._changed:
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """No bring-in is under way."""
        return not self._stages

    @property
    def quiet(self) -> bool:
        """None but such as are read from disk."""
        with self._changed:
            return all(job.reads and stage in (Stage.BLOCKED, Stage.WAITING) for job, stage in self._stages.items())

    @property
    def reads_wanted(self) -> bool:
        """A resume waits for the disk."""
        with self._changed:
            return any(stage is Stage.BLOCKED and job.reads and not job.prefetch for job, stage in self._stages.items())

    def close(self) -> None:
        """End the workers. Nothing is under way any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serves_nobody(self) -> bool:
        """Nothing is on the link, and nobody would be served next."""
        with self._changed:
            waits = any(stage in (Stage.WANTED, Stage.PREPARED) for stage in self._stages.values())
            flying = [event for _, event, _ in self._flying]
        return not waits and all(map(self._arrived, flying))

    def _pick(self, *stages: Stage, reads: bool | None = None) -> BringIn | None:
        """The most urgent in one of `stages`, of those whose `reads` is this if it is given. The lock is held."""
        jobs = [job for job, stage in self._stages.items() if stage in stages and reads in (None, job.reads)]
        return min(jobs, key=lambda job: job.urgency, default=None)

    def _to_issue(self) -> BringIn | None:
        """Whose turn it is on the link. The lock is held."""
        for job, stage in self._stages.items():
            if job.cancelled and stage is not Stage.WAITING:
                self._stages[job] = Stage.PREPARED  # nobody else takes it up
                return job
        return self._pick(Stage.WANTED, Stage.PREPARED)

    def _go(self, job: BringIn, to: Stage) -> None:
        with self._changed:
            if to not in _NEXT[self._stages[job]]:
                raise AssertionError(f"a bring-in that {self._stages[job].value} cannot become {to.value}")
            self._stages[job] = to
            self._changed.notify_all()

    def _end(self, job: BringIn, error: BaseException | None) -> None:
        with self._changed:
            del self._stages[job]
            self._changed.notify_all()
        if error is None:
            job.finish(None)
        else:
            job.fail(error)

    # the worker that issues

    def _issue(self) -> None:
        while True:
            job, stage = self._wait_for_one()
            if job is not None and job.left and not job.begins and self._pager.way.taken:
                self._pager.way.give()
                job, stage = self._wait_for_one()  # who came is more urgent
            if job is None:
                return
            try:
                self._pager.device.bind_thread()
                if not job.left:
                    self._end(job, None)
                elif stage is Stage.WANTED:
                    self._go(job, Stage.PREPARED if job.prepare(wait=False) else Stage.BLOCKED)
                elif job.begins or self._has_room():
                    self._step(job)
                elif not job.map_ahead():
                    self._wait_for_oldest()
            except BaseException as error:  # noqa: BLE001 - the thread's edge: whoever waits for the job is told
                self._end(job, error)  # and `ended` puts the session where it can try again

    def _wait_for_one(self) -> tuple[BringIn | None, Stage | None]:
        """Whose turn it is on the link, and how far that one has come; None when the link is closed."""
        with self._changed:
            while (job := self._to_issue()) is None and not self._closed:
                self._changed.wait()
            return job, self._stages.get(job)

    def _step(self, job: BringIn) -> None:
        event, size_bytes = job.step()
        if event is not None:
            with self._changed:
                self._flying.append((job, event, size_bytes))

    def _has_room(self) -> bool:
        """Whether another step may be issued: behind the oldest one that is still under way is little, or nothing."""
        with self._changed:
            while self._flying and self._arrived(self._flying[0][1]):
                self._flying.popleft()
            sizes = [size_bytes for _, _, size_bytes in self._flying]
        return not sizes or sum(sizes[1:]) <= QUEUED_BYTES

    def _wait_for_oldest(self) -> None:
        """Wait for the oldest in flight; someone else may be the most urgent then."""
        with self._changed:
            job, event, _ = self._flying.popleft()
        try:
            event.synchronize()
        except DeviceError as error:
            if self._stages.get(job) is Stage.PREPARED:  # else it has ended, or who prepares it finds the same
                self._end(job, error)

    def _arrived(self, event: Event) -> bool:
        try:
            return event.query()
        except DeviceError:  # found again by whoever asks its bring-in
            return True

    # the workers that wait

    def _prepare(self, reads: bool) -> None:
        """One of them: for those that have to read from disk, or for the others, and then it looks ahead, too."""
        look_s = time.monotonic()
        while True:
            with self._changed:
                job = self._pick(Stage.BLOCKED, reads=reads)
                if job is not None:
                    self._stages[job] = Stage.WAITING
                elif self._closed:
                    return
                elif reads or (left_s := look_s - time.monotonic()) > 0:
                    self._changed.wait(None if reads else left_s)
                    continue
            if job is None:
                self._look_ahead()
                look_s = time.monotonic() + TICK_S
                continue
            self._pager.count_callers()
            try:
                self._pager.device.bind_thread()
                self._go(job, Stage.PREPARED if self._prepared(job, reads) else Stage.BLOCKED)
            except BaseException as error:  # noqa: BLE001 - the thread's edge: whoever waits for the job is told
                self._end(job, error)

    def _prepared(self, job: BringIn, reads: bool) -> bool:
        """Whether it holds all that it needs, or nothing is wanted of it any more; else it goes to the other one."""
        if not job.left:
            return True
        if reads and not job.fetched:
            self._read(job)
            return False
        return job.prepare(wait=True, read=reads)

    def _read(self, job: BringIn) -> None:
        """Bring what it needs from disk to the host. A prefetch stops for a resume, and what it has read stays there.

        Nothing is claimed meanwhile: seconds in which what it shares with others could not leave. Where that costs it
        what was read, it is read again with all claimed.
        """
        for stored in job.on_disk():
            if job.prefetch and (job.cancelled or self.reads_wanted):
                return
            self._pager.tiers.fetch(stored, job.holding.id)
        job.reads, job.fetched = False, True

    def _look_ahead(self) -> None:
        self._pager.count_callers()
        try:
            self._pager.device.bind_thread()
            look_ahead(self._pager)
        except BaseException as error:  # noqa: BLE001 - nobody waits for it; the next look tries again
            self._pager.log_id("-", f"did not look ahead ({error!r})")
