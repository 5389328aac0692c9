"""Streams and events without a GPU: a stream is a worker thread with an ordered queue.

Invariant: a failure of queued work is never lost. It poisons every event that is recorded on the stream until someone
has been told (by `synchronize`, `query`, or a wait of the calling thread); a poisoned event stays so until it is
recorded again. After that the stream works on: unlike a CUDA context, which is lost, so that tests can retry.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from djinn_core.errors import DeviceError

POLL_S = 0.2  # how often a stream that waits for another one looks whether it was stopped


class Failure:
    """An error of queued work, and whether anyone was told."""

    def __init__(self, error: DeviceError) -> None:
        self.error = error
        self.told = False


class Mark:
    """One `record`: complete once the stream has come this far."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.time_s = 0.0
        self.failure: Failure | None = None

    def complete(self, failure: Failure | None) -> None:
        self.failure = failure
        self.time_s = time.perf_counter()
        self.done.set()

    def check(self) -> None:
        if self.failure is not None:
            self.failure.told = True
            raise type(self.failure.error)(str(self.failure.error)) from self.failure.error


class HostEvent:
    """`torch.cuda.Event` for host streams. Complete while recorded nowhere."""

    def __init__(self, timing: bool = False) -> None:
        self.timing = timing
        self.mark: Mark | None = None

    def record(self, stream: WorkerStream | CallerStream) -> None:
        """Complete when `stream` has done all that was queued before this call."""
        self.mark = stream.mark()

    def query(self) -> bool:
        """Whether it is complete. Raises DeviceError if the work before it failed."""
        mark = self.mark
        if mark is None:
            return True
        if not mark.done.is_set():
            return False
        mark.check()
        return True

    def synchronize(self) -> None:
        """Block until it is complete. Raises DeviceError if the work before it failed."""
        mark = self.mark
        if mark is not None:
            mark.done.wait()
            mark.check()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`; both were made with `timing` and are complete."""
        for event in (self, end):
            if not event.timing or event.mark is None or not event.mark.done.is_set():
                raise DeviceError("elapsed_time needs two complete events that were made with timing=True")
        return (end.mark.time_s - self.mark.time_s) * 1e3


class CallerStream:
    """The calling thread as a stream: all work is done at once, so it never has anything left."""

    def mark(self) -> Mark:
        mark = Mark()
        mark.complete(None)
        return mark

    def put(self, work: Callable[[], None]) -> None:
        work()

    def wait_event(self, event: HostEvent) -> None:
        """Block the caller. Raises DeviceError if the awaited work failed."""
        event.synchronize()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True


class WorkerStream:
    """Work in order, on a daemon thread that starts with the first work."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._queued = 0
        self._finished = 0
        self._failure: Failure | None = None
        self._stopped = False

    def put(self, work: Callable[[], None]) -> None:
        """Queue `work`; what it raises is kept for whoever synchronises."""
        with self._lock:
            if self._stopped:
                raise DeviceError(f"stream {self._name} is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._queued += 1
            self._queue.put(work)

    def mark(self) -> Mark:
        mark = Mark()
        with self._lock:
            idle = self._queued == self._finished
            failure = self._open_failure()
        if idle:
            mark.complete(failure)
        else:
            self.put(lambda: mark.complete(self._open_failure()))
        return mark

    def wait_event(self, event: HostEvent) -> None:
        """Later work waits for what `event` is recorded at now; the caller does not."""
        mark = event.mark
        if mark is None or (mark.done.is_set() and mark.failure is None):
            return
        self.put(lambda: self._await(mark))

    def synchronize(self) -> None:
        """Block until nothing is left. Raises DeviceError if work failed, once."""
        mark = self.mark()
        mark.done.wait()
        mark.check()

    def query(self) -> bool:
        """Whether nothing is left. Raises DeviceError if work failed, once."""
        with self._lock:
            if self._queued != self._finished:
                return False
            failure = self._open_failure()
        if failure is not None:
            mark = Mark()
            mark.complete(failure)
            mark.check()
        return True

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish what is queued, give up waits that cannot end, and end the thread."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _open_failure(self) -> Failure | None:
        failure = self._failure
        return failure if failure is not None and not failure.told else None

    def _await(self, mark: Mark) -> None:
        while not mark.done.wait(POLL_S):
            if self._stopped:
                raise DeviceError(f"stream {self._name} was closed while it waited for an event")
        if mark.failure is not None and not mark.failure.told and self._open_failure() is None:
            self._failure = mark.failure

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except DeviceError as error:
                self._keep(error)
            except Exception as error:  # noqa: BLE001 - the thread's edge: kept for whoever synchronises
                kept = DeviceError(f"work on stream {self._name} failed: {error!r}")
                kept.__cause__ = error
                self._keep(kept)
            finally:
                with self._lock:
                    self._finished += 1

    def _keep(self, error: DeviceError) -> None:
        if self._open_failure() is None:
            self._failure = Failure(error)
