"""The device contract through the CUDA driver's virtual memory calls (`cuda.bindings.driver`).

Invariant: every call runs with this device's primary context current, the one that torch uses, so that torch's streams,
events and kernels and these calls see one device. Not taken: compiled code of our own, or `cudaMallocAsync` pools,
whose memory cannot leave its address.

A call costs a few microseconds of Python: property structures are built once, bound functions are kept.

Streams are made here, not taken from torch, which gives out 32 a priority in turn: what a caller's own streams do would
then queue in ours. A closed device leaves them to the next, since a tensor may still name one.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cuda.bindings import driver

from djinn_core.device.base import Device, Direction, Event, HostBytes, Stream, maps_within
from djinn_core.device.cudaevents import CudaEvent, CudaEvents
from djinn_core.device.cudagraphs import CudaGraphs
from djinn_core.device.drivercalls import checked, describe
from djinn_core.device.heldcalls import HeldCalls
from djinn_core.errors import DeviceError, OutOfDeviceMemory, PinningRefused, TransferError

_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_PORTABLE = driver.CU_MEMHOSTREGISTER_PORTABLE
_EQUAL = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
_idle_streams: dict[tuple[int, int], list[int]] = defaultdict(list)  # of closed devices, by index and priority
RECORDING_S = 1.0  # a layer takes some milliseconds


def check_copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Both sides are contiguous bytes, or TransferError."""
    if dst.dtype is not torch.uint8 or src.dtype is not torch.uint8:
        raise TransferError(f"a copy is of uint8 tensors, not {src.dtype} into {dst.dtype}")
    if not (dst.is_contiguous() and src.is_contiguous()):
        raise TransferError("a copy is of contiguous tensors")


class _Bytes:
    """Device bytes in the form that torch reads."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class CudaDevice(Device):
    """GPU number `index`, as torch counts them.

    A thread that makes another GPU current makes this one current again before it uses this device.
    """

    is_gpu = True

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        torch.cuda.init()
        checked("cuInit", driver.cuInit(0))
        self._number = checked("cuDeviceGet", driver.cuDeviceGet(index))
        self._context = checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(self._number))
        self._bound = threading.local()
        self._held = HeldCalls()
        self._index = index
        self._events = CudaEvents(index, self._held, lambda: self._calls, self._enter)

        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = int(self._number)
        self._physical = driver.CUmemAllocationProp()
        self._physical.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._physical.location = location
        access = driver.CUmemAccessDesc()
        access.location = location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = [access]

        order = driver.CUmemcpyAttributes()
        order.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._in_stream_order = [order]

        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._enter()
        self.granularity_bytes = checked(
            "cuMemGetAllocationGranularity", driver.cuMemGetAllocationGranularity(self._physical, minimum)
        )
        self._capacity_bytes = checked("cuDeviceTotalMem", driver.cuDeviceTotalMem(self._number))
        self._one = int(checked("cuMemHostAlloc", driver.cuMemHostAlloc(4, driver.CU_MEMHOSTALLOC_PORTABLE)))
        ctypes.c_uint32.from_address(self._one).value = 1
        self._lock = threading.Lock()
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}  # sizes by address
        self._scratch: int | None = None
        self._streams: list[tuple[int, int]] = []  # priority and handle
        self._closed = False

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    def create(self, size_bytes: int) -> int:
        self._enter()
        code, handle = self._calls.cuMemCreate(size_bytes, self._physical, 0)
        if code:
            if code == _OUT_OF_MEMORY:
                free_bytes = self._memory()[0]
                raise OutOfDeviceMemory(
                    f"{self.name} is full ({describe('cuMemCreate', code)})",
                    needed_bytes=size_bytes,
                    free_bytes=free_bytes,
                )
            raise DeviceError(describe("cuMemCreate", code))
        return int(handle)

    def destroy(self, handle: int) -> None:
        self._enter()
        checked("cuMemRelease", driver.cuMemRelease(handle))

    def reserve(self, size_bytes: int) -> int:
        self._enter()
        address = int(
            checked("cuMemAddressReserve", driver.cuMemAddressReserve(size_bytes, self.granularity_bytes, 0, 0))
        )
        with self._lock:
            self._reserved[address] = size_bytes
        return address

    def release(self, address: int, size_bytes: int) -> None:
        self._enter()
        checked("cuMemAddressFree", driver.cuMemAddressFree(address, size_bytes))
        with self._lock:
            self._reserved.pop(address, None)

    def map(self, address: int, handle: int, size_bytes: int) -> None:
        self._enter()
        code = self._calls.cuMemMap(address, size_bytes, 0, handle, 0)[0]
        if code:
            raise DeviceError(f"{describe('cuMemMap', code)} at {address:#x} + {size_bytes:,}")
        self._mapped[address] = size_bytes

    def grant(self, address: int, size_bytes: int) -> None:
        self._enter()
        code = self._calls.cuMemSetAccess(address, size_bytes, self._access, 1)[0]
        if code:
            raise DeviceError(f"{describe('cuMemSetAccess', code)} at {address:#x} + {size_bytes:,}")

    def unmap(self, address: int, size_bytes: int) -> None:
        # the driver says nothing of what is not mapped (580), and then the caller's books are wrong
        whole = maps_within(self._mapped.get, address, size_bytes)
        self._enter()
        code = driver.cuMemUnmap(address, size_bytes)[0]
        if code:
            raise DeviceError(f"{describe('cuMemUnmap', code)} at {address:#x} + {size_bytes:,}")
        for begin in whole:
            del self._mapped[begin]

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """As the contract says. `address` begins a piece: one granule there is free, or a map begins at it."""
        self._enter()
        with self._lock:
            borrowed = address not in self._mapped
            if borrowed:  # torch asks the driver whose pointer this is, and the driver knows only mapped ones
                if self._scratch is None:
                    self._scratch = self.create(self.granularity_bytes)
                self.map(address, self._scratch, self.granularity_bytes)
            try:
                if borrowed:
                    self.grant(address, self.granularity_bytes)
                with torch.inference_mode(False):  # a caller's mode must not decide who may write to it later
                    return torch.as_tensor(_Bytes(address, size_bytes), device=self.torch_device)
            finally:
                if borrowed:
                    self.unmap(address, self.granularity_bytes)

    def stream(self, priority: int = 0) -> Stream:
        self._enter()
        try:
            handle = _idle_streams[self._index, priority].pop()
        except IndexError:
            flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            created = driver.cuStreamCreateWithPriority(flags, priority)
            handle = int(checked("cuStreamCreateWithPriority", created))
        self._streams.append((priority, handle))
        return torch.cuda.ExternalStream(handle, device=self.torch_device)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self._index)

    def event(self, timing: bool = False, *, blocking: bool = False) -> Event:
        return CudaEvent(self._events, timing, blocking)

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        self._enter()
        with torch.cuda.stream(stream):
            work()

    def graphs(self) -> CudaGraphs:
        with torch.cuda.device(self._index):
            return CudaGraphs(self._index, torch.cuda.MemPool(), self.stream())

    def synchronize(self) -> None:
        give_up_s = time.monotonic() + RECORDING_S
        try:
            while not self._synchronized(give_up_s):
                time.sleep(0.001)
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed in queued work, its context is lost: {error}") from error

    def _synchronized(self, give_up_s: float) -> bool:
        """Whether the device could be waited for; it cannot while another thread records a graph on it."""
        try:
            torch.cuda.synchronize(self._index)
        except RuntimeError as error:
            if "stream is capturing" not in str(error) or time.monotonic() > give_up_s:
                raise
            return False
        return True

    def _issue_copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        check_copy(dst, src)
        size_bytes = dst.numel()
        if size_bytes:
            self._copy(dst.data_ptr(), src.data_ptr(), size_bytes, stream.cuda_stream)

    def _copy(self, to: Any, there: int, size_bytes: int, stream: Any) -> None:
        self._enter()
        code = self._calls.cuMemcpyAsync(to, there, size_bytes, stream)[0]
        if code:
            raise TransferError(f"{describe('cuMemcpyAsync', code)} for {size_bytes:,} bytes; nothing was copied")

    def copier(self, target: torch.Tensor, stream: Stream, direction: Direction) -> Callable[[HostBytes], None]:
        check_copy(target, target)
        room_bytes, to, on = target.numel(), driver.CUdeviceptr(target.data_ptr()), driver.CUstream(stream.cuda_stream)

        def issue(source: HostBytes) -> None:
            size_bytes = source.size_bytes
            if size_bytes > room_bytes:
                raise ValueError(f"copy of {size_bytes} bytes into {room_bytes}")
            self._copy(to, source.address, size_bytes, on)
            self._count(direction, size_bytes)

        return issue

    def _issue_copies(
        self,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
        stream: Stream,
        direction: Direction,
        piece_bytes: int,
        begun: Event | None,
        done: Event | None,
    ) -> None:
        pieces: list[tuple[int, int, int]] = []
        for dst, src in copies:
            check_copy(dst, src)
            to, there, size_bytes = dst.data_ptr(), src.data_ptr(), dst.numel()
            for at in range(0, size_bytes, piece_bytes):  # sums of addresses: slices would take as long as the call
                pieces.append((to + at, there + at, min(piece_bytes, size_bytes - at)))
        if begun is not None:
            begun.record(stream)
        if len(pieces) > 1 and self._calls is self._held and self._held.takes_batches:
            self._batch(pieces, stream, direction)
        else:
            for to, there, size_bytes in pieces:
                self._copy(to, there, size_bytes, stream.cuda_stream)
                self._count(direction, size_bytes)
        if done is not None:
            done.record(stream)

    def _batch(self, pieces: list[tuple[int, int, int]], stream: Stream, direction: Direction) -> None:
        """Copies of so many bytes to here from there, in one call."""
        self._enter()
        targets, sources, sizes = map(list, zip(*pieces, strict=True))
        how, on = self._in_stream_order, stream.cuda_stream
        [code] = self._held.cuMemcpyBatchAsync(targets, sources, sizes, len(sizes), how, [0], 1, on)
        if code:
            what = f"{len(sizes)} copies of {sum(sizes):,} bytes"
            raise TransferError(f"{describe('cuMemcpyBatchAsync', code)} for {what}; nothing was copied")
        self._count(direction, sum(sizes))

    def _give_way(self, stream: Stream) -> None:
        """A wait for a word in host memory that is always 1: the engine takes up another stream before it goes on."""
        self._enter()
        checked("cuStreamWaitValue32", self._calls.cuStreamWaitValue32(stream.cuda_stream, self._one, 1, _EQUAL))

    def pin(self, address: int, size_bytes: int) -> None:
        self._enter()
        code = driver.cuMemHostRegister(address, size_bytes, _PORTABLE)[0]
        if code == _OUT_OF_MEMORY or code == driver.CUresult.CUDA_ERROR_NOT_PERMITTED:
            raise PinningRefused(
                f"host memory could not be page-locked ({describe('cuMemHostRegister', code)})",
                needed_bytes=size_bytes,
                free_bytes=0,
            )
        if code:
            raise DeviceError(f"{describe('cuMemHostRegister', code)} for {size_bytes:,} bytes at {address:#x}")

    def unpin(self, address: int, size_bytes: int) -> None:
        self._enter()
        checked("cuMemHostUnregister", driver.cuMemHostUnregister(address))

    def bind_thread(self) -> None:
        if hasattr(self._bound, "torch_too"):
            return
        checked("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context))
        torch.cuda.set_device(self._index)
        self._bound.ready = self._bound.torch_too = True

    def used_bytes(self) -> int:
        self._enter()
        free_bytes, total_bytes = self._memory()
        return total_bytes - free_bytes

    def close(self) -> None:
        if self._closed:
            return
        if self._reserved:
            raise DeviceError(f"{len(self._reserved)} reservations are still held; release them before close")
        self.synchronize()
        if self._scratch is not None:
            self.destroy(self._scratch)
            self._scratch = None
        checked("cuMemFreeHost", driver.cuMemFreeHost(self._one))
        for priority, handle in self._streams:
            _idle_streams[self._index, priority].append(handle)
        self._streams.clear()
        self._closed = True
        checked("cuDevicePrimaryCtxRelease", driver.cuDevicePrimaryCtxRelease(self._number))

    @contextmanager
    def keeping_interpreter(self, keeps: bool = True) -> Iterator[None]:
        before, self._bound.calls = self._calls, self._held if keeps else driver
        try:
            yield
        finally:
            self._bound.calls = before

    @property
    def _calls(self) -> Any:
        """What this thread calls the driver through."""
        return getattr(self._bound, "calls", driver)

    def _enter(self) -> None:
        """Make the context current on a thread that nobody bound."""
        if not hasattr(self._bound, "ready"):
            checked("cuCtxSetCurrent", driver.cuCtxSetCurrent(self._context))
            self._bound.ready = True

    def _memory(self) -> tuple[int, int]:
        code, free_bytes, total_bytes = self._calls.cuMemGetInfo()
        if code:
            raise DeviceError(describe("cuMemGetInfo", code))
        return free_bytes, total_bytes
