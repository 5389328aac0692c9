"""A plan of failures for the emulated device, so that tests can fail each call once and look at what is left."""

from __future__ import annotations

import threading
from collections import Counter

from djinn_core.errors import DeviceError, DjinnError, OutOfDeviceMemory, PinningRefused, TransferError

CALLS = ("create", "map", "grant", "unmap", "copy", "pin")


class FaultPlan:
    """Fails chosen calls, each once. Set it as `device.faults`; it counts every call from then on.

    Attributes:
        counts: calls seen so far, by name.
        fired: names of the calls that were failed, in order.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.fired: list[str] = []
        self._lock = threading.Lock()
        self._planned: dict[tuple[str, int], bool] = {}

    def fail(self, call: str, nth: int = 1, *, asynchronous: bool = False) -> FaultPlan:
        """Fail the `nth` `call` from now (1 is the next). `asynchronous`: a copy is taken and fails in its stream."""
        if call not in CALLS or nth < 1 or (asynchronous and call != "copy"):
            raise ValueError(f"cannot plan a fault for {call!r} number {nth}; calls are {', '.join(CALLS)}")
        with self._lock:
            self._planned[call, self.counts[call] + nth] = asynchronous
        return self

    def check(self, call: str, size_bytes: int) -> DjinnError | None:
        """Count one call. Raise its planned error, or return it when it has to fail in the stream."""
        with self._lock:
            self.counts[call] += 1
            number = self.counts[call]
            asynchronous = self._planned.pop((call, number), None)
            if asynchronous is None:
                return None
            self.fired.append(call)
        error = _error(call, number, size_bytes)
        if asynchronous:
            return error
        raise error


def _error(call: str, number: int, size_bytes: int) -> DjinnError:
    text = f"planned fault: {call} number {number}"
    if call == "create":
        return OutOfDeviceMemory(text, needed_bytes=size_bytes, free_bytes=0)
    if call == "pin":
        return PinningRefused(text, needed_bytes=size_bytes, free_bytes=0)
    if call == "copy":
        return TransferError(f"{text} of {size_bytes:,} bytes")
    return DeviceError(f"{text} of {size_bytes:,} bytes")
