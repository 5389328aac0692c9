"""Events of a CUDA device that keep Python's interpreter where copies do (heldcalls.py).

One stands behind every step, write-back and pass. Torch's events give the interpreter away when they are recorded,
waited for by a stream, and destroyed (seen with torch 2.11: another thread that only wants to run gets in). What comes
behind the call, the next copy for instance, is then late by a switch interval, and what a pair of events times is the
interpreter, too. Within `Device.keeping_interpreter` these keep it; elsewhere they give it away, since a call waits
where a stream's queue is full, as that of a long pass may be.

An event that nobody holds any more leaves its handle to the next one: to destroy one may wait, and to make one takes
longer than to record it. Torch's streams take these events as their own ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from cuda.bindings import driver

from djinn_core.device.base import Stream
from djinn_core.device.drivercalls import checked, describe
from djinn_core.device.heldcalls import HeldCalls
from djinn_core.errors import DeviceError

_NOT_READY = driver.CUresult.CUDA_ERROR_NOT_READY
_idle: dict[tuple[int, int], list[int]] = defaultdict(list)  # handles that nobody holds, by GPU and flags
_HERE = nullcontext()


class CudaEvents:
    """What the events of one GPU have in common.

    Attributes:
        index: the GPU's, as torch counts them.
        held: calls that keep the interpreter.
        calls: what the calling thread calls the driver through now.
        enter: makes a context current on a thread that has none.
    """

    def __init__(self, index: int, held: HeldCalls, calls: Callable[[], Any], enter: Callable[[], None]) -> None:
        self.index, self.held, self.calls, self.enter = index, held, calls, enter

    def current(self, stream: int = 0) -> AbstractContextManager[Any]:
        """Within it this GPU is the current one, if it matters: each has a default stream 0, and makes events."""
        return _HERE if stream else torch.cuda.device(self.index)


class CudaEvent:
    """`torch.cuda.Event`, as far as Djinn uses it. Complete while recorded nowhere. Thread-safe."""

    def __init__(self, gpu: CudaEvents, timing: bool, blocking: bool) -> None:
        """`timing` and `blocking` as in `Device.event`."""
        flags = 0 if timing else int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        if blocking:
            flags |= int(driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
        self._gpu, self._timing, self._recorded = gpu, timing, False
        self._idle = _idle[gpu.index, flags]
        try:
            self._handle = self._idle.pop()
        except IndexError:
            gpu.enter()
            with gpu.current():
                self._handle = int(checked("cuEventCreate", driver.cuEventCreate(flags)))

    def record(self, stream: Stream) -> None:
        """Complete when `stream` has done all that was queued before this call. Raises DeviceError if refused."""
        self._gpu.enter()
        on = stream.cuda_stream
        self._recorded = True  # before it is: who is interrupted in between waits rather than goes on
        with self._gpu.current(on):
            checked("cuEventRecord", self._gpu.calls().cuEventRecord(self._handle, on))

    def wait(self, stream: Stream) -> None:
        """What `stream.wait_event` calls: its later work waits for this event; the caller does not."""
        if self._recorded:
            self._gpu.enter()
            on = stream.cuda_stream
            with self._gpu.current(on):
                checked("cuStreamWaitEvent", self._gpu.calls().cuStreamWaitEvent(on, self._handle, 0))

    def query(self) -> bool:
        """Whether it is complete, without giving the interpreter away. Raises DeviceError if work on the GPU failed."""
        if not self._recorded:
            return True
        self._gpu.enter()
        [code] = self._gpu.held.cuEventQuery(self._handle)
        if code and code != _NOT_READY:
            raise DeviceError(describe("cuEventQuery", code))
        return not code

    def synchronize(self) -> None:
        """Block until it is complete, without the interpreter. Raises DeviceError if work on the GPU failed."""
        if self._recorded:
            self._gpu.enter()
            checked("cuEventSynchronize", driver.cuEventSynchronize(self._handle))

    def elapsed_time(self, end: CudaEvent) -> float:
        """Milliseconds from this event to `end`; both were made with `timing` and are complete."""
        if not all(event._timing and event._recorded and event.query() for event in (self, end)):
            raise DeviceError("elapsed_time needs two complete events that were made with timing=True")
        return float(checked("cuEventElapsedTime", driver.cuEventElapsedTime(self._handle, end._handle)))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # else it could not be made
            self._idle.append(self._handle)
