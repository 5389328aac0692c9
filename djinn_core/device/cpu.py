"""The device contract without a GPU: one memfd, and `mmap(MAP_FIXED)` of its pieces into reserved addresses.

A real virtual memory with a real limit: what is not mapped is PROT_NONE and faults, a handle mapped twice shows the
same bytes, streams are threads. Stricter than a GPU where that helps tests: wrong spans, mapped handles that are
destroyed and copies from memory that was never pinned are errors. For tests and first contact only: no number taken
here says anything about a GPU.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass

import torch

from djinn_core.device import libc
from djinn_core.device.base import Device, Event, Stream, maps_within
from djinn_core.device.faults import FaultPlan
from djinn_core.device.hostgraph import HostGraphs
from djinn_core.device.hoststreams import CallerStream, HostEvent, WorkerStream
from djinn_core.device.spans import FreeSpans
from djinn_core.errors import DeviceError, DjinnError, OutOfDeviceMemory, TransferError

GRANULARITY_BYTES = 64 << 10


class _Spans:
    """Disjoint (start, size) spans of addresses."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, start: int) -> int | None:
        return self._sizes.get(start)

    def add(self, start: int, size_bytes: int) -> None:
        insort(self._starts, start)
        self._sizes[start] = size_bytes

    def remove(self, start: int) -> None:
        self._starts.remove(start)
        del self._sizes[start]

    def touching(self, start: int, size_bytes: int) -> list[tuple[int, int]]:
        """The spans that share a byte with this one, in order."""
        found = []
        i = max(0, bisect_right(self._starts, start) - 1)
        for first in self._starts[i:]:
            if first >= start + size_bytes:
                break
            if first + self._sizes[first] > start:
                found.append((first, self._sizes[first]))
        return found

    def cover(self, start: int, size_bytes: int) -> bool:
        """Whether every byte lies in some span."""
        at = start
        for first, size in self.touching(start, size_bytes):
            if first > at:
                return False
            at = first + size
        return at >= start + size_bytes


@dataclass
class _Handle:
    size_bytes: int
    pieces: list[tuple[int, int]]
    maps: int = 0


class CpuDevice(Device):
    """An emulated device of `capacity_bytes`.

    Attributes:
        faults: failures to inject, for tests.
        link_gbps: the emulated link's speed on worker streams; None does not slow copies down.
    """

    is_gpu = False

    def __init__(self, capacity_bytes: int, *, link_gbps: float | None = None) -> None:
        super().__init__()
        self.name = "cpu"
        self.torch_device = torch.device("cpu")
        self.granularity_bytes = GRANULARITY_BYTES
        self.faults: FaultPlan | None = None
        self.link_gbps = link_gbps
        self._lock = threading.RLock()
        self._free = FreeSpans(capacity_bytes, GRANULARITY_BYTES)
        self._fd = os.memfd_create("djinn-device")
        os.ftruncate(self._fd, self._free.size_bytes)
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 1
        self._reserved, self._mapped, self._pinned = _Spans(), _Spans(), _Spans()
        self._mapped_handle: dict[int, int] = {}
        self._caller = CallerStream()
        self._streams: list[WorkerStream] = []
        self._closed = False
        self._at_exit = _stop_at_exit(self)

    @property
    def capacity_bytes(self) -> int:
        return self._free.size_bytes

    def create(self, size_bytes: int) -> int:
        self._check_size(size_bytes)
        with self._lock:
            self._fault("create", size_bytes)
            pieces = self._free.take_scattered(size_bytes)
            if pieces is None:
                raise OutOfDeviceMemory(
                    f"the emulated device of {self.capacity_bytes:,} bytes is full",
                    needed_bytes=size_bytes,
                    free_bytes=self._free.free_bytes,
                )
            handle = self._next_handle
            self._next_handle += 1
            self._handles[handle] = _Handle(size_bytes, pieces)
            return handle

    def destroy(self, handle: int) -> None:
        with self._lock:
            record = self._known(handle)
            if record.maps:
                raise DeviceError(f"handle {handle} is still mapped at {record.maps} places; unmap it first")
            try:
                for piece in record.pieces:
                    libc.punch_hole(self._fd, *piece)
            except OSError as error:
                raise DeviceError(f"the memory of handle {handle} could not be given back: {error}") from error
            for piece in record.pieces:
                self._free.give(*piece)
            del self._handles[handle]

    def reserve(self, size_bytes: int) -> int:
        self._check_size(size_bytes)
        with self._lock:
            try:
                address = libc.map_aligned(size_bytes, self.granularity_bytes, libc.PROT_NONE)
            except OSError as error:
                raise DeviceError(f"no {size_bytes:,} bytes of addresses could be reserved: {error}") from error
            self._reserved.add(address, size_bytes)
            return address

    def release(self, address: int, size_bytes: int) -> None:
        with self._lock:
            if self._reserved.get(address) != size_bytes:
                raise DeviceError(f"no reservation of {size_bytes:,} bytes begins at {address:#x}")
            if inside := self._mapped.touching(address, size_bytes):
                raise DeviceError(f"reservation {address:#x} still has {len(inside)} maps in it; unmap them first")
            self._reserved.remove(address)
            libc.unmap(address, size_bytes)

    def map(self, address: int, handle: int, size_bytes: int) -> None:
        self._check_size(size_bytes)
        with self._lock:
            self._fault("map", size_bytes)
            record = self._known(handle)
            if record.size_bytes != size_bytes:
                raise DeviceError(f"handle {handle} has {record.size_bytes:,} bytes, asked to map {size_bytes:,}")
            if not self._reserved.cover(address, size_bytes):
                raise DeviceError(f"{address:#x} + {size_bytes:,} is not reserved")
            if address % self.granularity_bytes:
                raise DeviceError(f"{address:#x} is not a multiple of {self.granularity_bytes}")
            if self._mapped.touching(address, size_bytes):
                raise DeviceError(f"{address:#x} + {size_bytes:,} has something mapped already")
            at = address
            for offset, piece_bytes in record.pieces:
                libc.map_file(at, piece_bytes, self._fd, offset)
                at += piece_bytes
            self._mapped.add(address, size_bytes)
            self._mapped_handle[address] = handle
            record.maps += 1

    def grant(self, address: int, size_bytes: int) -> None:
        self._check_size(size_bytes)
        with self._lock:
            self._fault("grant", size_bytes)
            if not self._mapped.cover(address, size_bytes):
                raise DeviceError(f"{address:#x} + {size_bytes:,} is not fully mapped; map it before granting")
            libc.protect(address, size_bytes, libc.PROT_RW)

    def unmap(self, address: int, size_bytes: int) -> None:
        with self._lock:
            self._fault("unmap", size_bytes)
            whole = maps_within(self._mapped.get, address, size_bytes)
            libc.map_anonymous(size_bytes, libc.PROT_NONE, address)
            for begin in whole:
                self._mapped.remove(begin)
                self._handles[self._mapped_handle.pop(begin)].maps -= 1

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        with self._lock:
            if not self._reserved.cover(address, size_bytes):
                raise DeviceError(f"{address:#x} + {size_bytes:,} is not reserved")
        return libc.tensor_at(address, size_bytes)

    def stream(self, priority: int = 0) -> Stream:
        with self._lock:
            stream = WorkerStream(f"djinn-stream-{len(self._streams)}")
            self._streams.append(stream)
            return stream

    def current_stream(self) -> Stream:
        return self._caller

    def event(self, timing: bool = False, *, blocking: bool = False) -> Event:
        return HostEvent(timing)

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        inference = torch.is_inference_mode_enabled()  # modes belong to a thread; the work keeps its caller's

        def in_mode() -> None:
            with torch.inference_mode(inference):
                work()

        stream.put(in_mode)

    def graphs(self) -> HostGraphs:
        return HostGraphs()

    def synchronize(self) -> None:
        with self._lock:
            streams = tuple(self._streams)
        for stream in streams:
            stream.synchronize()

    def _issue_copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        size_bytes = dst.numel()
        error: DjinnError | None = None
        blocking = False
        with self._lock:
            if self.faults is not None:
                error = self.faults.check("copy", size_bytes)
            for side, tensor in (("destination", dst), ("source", src)):
                if tensor.dtype is not torch.uint8 or not tensor.is_contiguous():
                    raise TransferError(f"the copy's {side} is {tensor.dtype}, not contiguous uint8")
                if not self._reachable(tensor.data_ptr(), size_bytes):
                    if not self.pageable_copies:
                        raise TransferError(
                            f"the copy's {side} at {tensor.data_ptr():#x} is neither device memory nor pinned; "
                            "take host memory from HostTier"
                        )
                    blocking = True

        def work() -> None:
            if error is not None:
                raise error
            if self.link_gbps is not None and stream is not self._caller:
                time.sleep(size_bytes / self.link_gbps / 1e9)
            libc.copy_bytes(dst.data_ptr(), src.data_ptr(), size_bytes)

        stream.put(work)
        if blocking:
            event = self.event()
            event.record(stream)
            event.synchronize()

    def _reachable(self, address: int, size_bytes: int) -> bool:
        return size_bytes == 0 or self._reserved.cover(address, size_bytes) or self._pinned.cover(address, size_bytes)

    def pin(self, address: int, size_bytes: int) -> None:
        with self._lock:
            self._fault("pin", size_bytes)
            if self._pinned.touching(address, size_bytes):
                raise DeviceError(f"{address:#x} + {size_bytes:,} is pinned already, in part or whole")
            self._pinned.add(address, size_bytes)

    def unpin(self, address: int, size_bytes: int) -> None:
        with self._lock:
            if self._pinned.get(address) != size_bytes:
                raise DeviceError(f"no pinned range of {size_bytes:,} bytes begins at {address:#x}")
            self._pinned.remove(address)

    def bind_thread(self) -> None:
        """Every thread can use the emulated device."""

    def used_bytes(self) -> int:
        with self._lock:
            return self._free.size_bytes - self._free.free_bytes

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            if len(self._reserved):
                raise DeviceError(f"{len(self._reserved)} reservations are still held; release them before close")
            self._closed = True
            streams = tuple(self._streams)
        atexit.unregister(self._at_exit)
        for stream in streams:
            stream.stop()
        os.close(self._fd)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % self.granularity_bytes:
            raise ValueError(f"{size_bytes} bytes is not a positive multiple of {self.granularity_bytes}")

    def _known(self, handle: int) -> _Handle:
        if handle not in self._handles:
            raise DeviceError(f"handle {handle} does not exist")
        return self._handles[handle]

    def _fault(self, call: str, size_bytes: int) -> None:
        if self.faults is not None:
            self.faults.check(call, size_bytes)


def _stop_at_exit(device: CpuDevice) -> Callable[[], None]:
    """Stop a forgotten device's threads before the interpreter goes; a thread inside torch could abort it."""
    reference = weakref.ref(device)

    def stop() -> None:
        device = reference()
        if device is not None:
            for stream in device._streams:
                stream.stop(timeout_s=1.0)

    atexit.register(stop)
    return stop
