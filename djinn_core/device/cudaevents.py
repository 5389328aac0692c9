"""Events of a CUDA device whose short calls keep Python's interpreter.

Djinn records one behind every step, write-back and pass, and torch's events give the interpreter away when they are
recorded, waited for by a stream, and destroyed (seen with torch 2.11: a thread that only wants to run gets in). What
comes behind the call, the next copy for instance, is then late by a switch interval, and what a pair of events times is
the interpreter, too.

An event that nobody holds any more leaves its handle to the next one: to destroy one may wait, and to make one takes
longer than to record it. Torch's streams take these events as its own ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from cuda.bindings import driver

from djinn_core.device.base import Stream
from djinn_core.device.drivercalls import checked, describe
from djinn_core.device.heldcalls import HeldCalls
from djinn_core.errors import DeviceError

_NOT_READY = driver.CUresult.CUDA_ERROR_NOT_READY
_idle: dict[tuple[int, int], list[int]] = defaultdict(list)  # handles that nobody holds, by GPU and flags


class CudaEvent:
    """`torch.cuda.Event` without giving the interpreter away. Complete while recorded nowhere. Thread-safe."""

    def __init__(self, index: int, calls: HeldCalls, enter: Callable[[], None], timing: bool, blocking: bool) -> None:
        """Args:
        index: the GPU's.
        enter: makes its context current on the calling thread.
        timing, blocking: as in `Device.event`.
        """
        flags = 0 if timing else int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        if blocking:
            flags |= int(driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
        self._calls, self._enter, self._timing = calls, enter, timing
        self._recorded = False
        self._idle = _idle[index, flags]
        try:
            self._handle = self._idle.pop()
        except IndexError:
            enter()
            self._handle = int(checked("cuEventCreate", driver.cuEventCreate(flags)))

    def record(self, stream: Stream) -> None:
        """Complete when `stream` has done all that was queued before this call."""
        self._enter()
        [code] = self._calls.cuEventRecord(self._handle, stream.cuda_stream)
        if code:
            raise DeviceError(describe("cuEventRecord", code))
        self._recorded = True

    def wait(self, stream: Stream) -> None:
        """What `stream.wait_event` calls: its later work waits for this event; the caller does not."""
        if self._recorded:
            self._enter()
            checked("cuStreamWaitEvent", self._calls.cuStreamWaitEvent(stream.cuda_stream, self._handle, 0))

    def query(self) -> bool:
        """Whether it is complete. Raises DeviceError if work on the device failed."""
        if not self._recorded:
            return True
        self._enter()
        [code] = self._calls.cuEventQuery(self._handle)
        if code and code != _NOT_READY:
            raise DeviceError(describe("cuEventQuery", code))
        return not code

    def synchronize(self) -> None:
        """Block until it is complete, without the interpreter. Raises DeviceError if work on the device failed."""
        if self._recorded:
            self._enter()
            checked("cuEventSynchronize", driver.cuEventSynchronize(self._handle))

    def elapsed_time(self, end: CudaEvent) -> float:
        """Milliseconds from this event to `end`; both were made with `timing` and are complete."""
        if not all(event._timing and event._recorded and event.query() for event in (self, end)):
            raise DeviceError("elapsed_time needs two complete events that were made with timing=True")
        self._enter()
        return float(checked("cuEventElapsedTime", driver.cuEventElapsedTime(self._handle, end._handle)))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # else it could not be made
            self._idle.append(self._handle)
