"""The device contract: physical memory apart from addresses, streams, and copies that are counted.

Physical memory (`create`, `destroy`) is mapped into reserved addresses (`reserve`, `map`, `grant`,
`unmap`). An address never changes while its reservation lives, so a tensor over it stays valid when the
memory behind it leaves and comes back: CUDA graphs and compiled code survive a swap.

Two implementations keep this contract: `djinn_core.device.cuda` (the driver's virtual memory calls) and
`djinn_core.device.cpu` (the same over one memfd, for tests and first contact). Not taken: torch's caching
allocator with a pluggable backend. It cannot separate an address from its memory, and it decides on its own
when memory is reused.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from djinn_core.errors import DeviceError


class Event(Protocol):
    """A point in a stream's work. The subset of `torch.cuda.Event` that Djinn uses."""

    def record(self, stream: Stream) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float: ...


class Stream(Protocol):
    """Work in order. The subset of `torch.cuda.Stream` that Djinn uses."""

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool: ...


class Graph(Protocol):
    """Torch operations that are recorded once, and issued in one call as often as wanted, on the same addresses."""

    def begin(self) -> None:
        """From now on the calling thread's operations are recorded, and not done."""

    def end(self) -> None: ...

    def abandon(self) -> None:
        """Instead of `end`, where recording failed."""

    def replay(self, stream: Stream) -> None:
        """Do what was recorded, in the order of `stream`."""


class Row(Protocol):
    """A part of a chain: two graphs, and a step between them that is not the same in every replay.

    Attributes:
        reads: the tensors that the step reads, besides the one that changes; in every row laid out alike.
        into: where what the step makes belongs.
    """

    @property
    def before(self) -> Graph: ...

    @property
    def behind(self) -> Graph: ...

    @property
    def reads(self) -> tuple[torch.Tensor, ...]: ...

    @property
    def into(self) -> torch.Tensor: ...


class Chain(Protocol):
    """Rows one behind the other, several of them issued in one call."""

    def record(self, key: Hashable, step: Callable[[int], torch.Tensor], changing: torch.Tensor) -> Hashable:
        """Prepare for steps of `key`, unless that has been done.

        Args:
            key: steps of the same key do the same, but for which tensors they are given.
            step: issues the step of a row. What it does in one row it does in all, with the row's tensors. It is called
                for the first one, and nothing of that is done; or not at all.
            changing: the first row's tensor that is another one from replay to replay; laid out alike in all.

        Returns:
            What the step consists of; where it is the same, steps differ in values, extents and addresses at most.

        Raises:
            DeviceError: steps like this cannot be changed from launch to launch. That, or what `step` raised, if it
                could not be recorded, as while another thread waits for the whole device.
        """

    def replay(
        self,
        stream: Stream,
        key: Hashable,
        step: Callable[[int], torch.Tensor],
        changing: Sequence[torch.Tensor],
        part: range,
    ) -> None:
        """Do the rows of `part`, in the order of `stream`. `key` has been recorded; `changing` is of these rows.

        Raises:
            DeviceError: nothing has been issued.
        """


class Graphs(Protocol):
    """Makes graphs that share memory: they are recorded and replayed one after the other, in stream order."""

    def new(self) -> Graph:
        """An empty one."""

    def chain(self, rows: Sequence[Row]) -> Chain:
        """A chain of graphs that were made here and recorded."""


class HostBytes(Protocol):
    """A piece of pinned host memory, as `HostTier` hands it out."""

    tensor: torch.Tensor
    address: int
    size_bytes: int


class Direction(Enum):
    """Which way a copy goes."""

    H2D = "h2d"
    D2H = "d2h"
    D2D = "d2d"


@dataclass(frozen=True)
class CopyCounts:
    """Bytes copied since the device was opened, by direction, counted where the copy is issued."""

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    d2d_bytes: int = 0

    def __sub__(self, other: CopyCounts) -> CopyCounts:
        return CopyCounts(
            self.h2d_bytes - other.h2d_bytes,
            self.d2h_bytes - other.d2h_bytes,
            self.d2d_bytes - other.d2d_bytes,
        )


def maps_within(size_at: Callable[[int], int | None], address: int, size_bytes: int) -> list[int]:
    """Where the maps begin that make up this range; `size_at` knows the size of the map that begins at an address.

    Raises:
        DeviceError: it is not made of whole maps.
    """
    begins, at, end = [], address, address + size_bytes
    while at < end:
        size = size_at(at)
        if not size or at + size > end:
            what = "nothing is mapped" if not size else f"a map of {size:,} bytes begins"
            raise DeviceError(f"{address:#x} + {size_bytes:,} cannot be unmapped: {what} at {at:#x}")
        begins.append(at)
        at += size
    return begins


class Device(ABC):
    """One device: its physical memory, its addresses, its streams.

    All methods may be called from any thread. Sizes and addresses are in bytes; sizes given to `create`,
    `reserve`, `map`, `grant` and `unmap` are multiples of `granularity_bytes`.

    Attributes:
        name: as torch spells it, for example ``"cuda:0"`` or ``"cpu"``.
        torch_device: where tensors over reserved addresses live.
        granularity_bytes: the smallest piece of physical memory.
        is_gpu: False for the emulated device, on which no claim about a GPU can hold.
        pageable_copies: copies from and to host memory that is not pinned are allowed, though they block the caller;
            set by `HostTier` when pinning is optional and was refused.
    """

    name: str
    torch_device: torch.device
    granularity_bytes: int
    is_gpu: bool
    pageable_copies: bool = False

    def __init__(self) -> None:
        self._count_lock = threading.Lock()
        self._counts = dict.fromkeys(Direction, 0)

    # physical memory

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """The physical memory that `create` could hand out in all, were nothing created yet."""

    @abstractmethod
    def create(self, size_bytes: int) -> int:
        """Physical memory of `size_bytes`, as an opaque handle.

        Raises:
            OutOfDeviceMemory: the device has no such piece left; free extents and retry.
        """

    @abstractmethod
    def destroy(self, handle: int) -> None:
        """Give the physical memory behind `handle` back. It must be mapped nowhere."""

    # addresses

    @abstractmethod
    def reserve(self, size_bytes: int) -> int:
        """The first of `size_bytes` reserved addresses, with no memory behind them.

        Raises:
            DeviceError: there are none; nothing changed.
        """

    @abstractmethod
    def release(self, address: int, size_bytes: int) -> None:
        """Give a reservation back. Nothing may be mapped in it, and its tensors die with it."""

    @abstractmethod
    def map(self, address: int, handle: int, size_bytes: int) -> None:
        """Put the memory of `handle` behind `address`. It cannot be touched before `grant`.

        One handle may be mapped at several addresses at once.
        """

    @abstractmethod
    def grant(self, address: int, size_bytes: int) -> None:
        """Allow access to a fully mapped span; one call for neighbouring maps costs as much as for one."""

    @abstractmethod
    def unmap(self, address: int, size_bytes: int) -> None:
        """Take the memory from behind earlier maps that lie side by side, each of them whole, in one call.

        The caller has made sure that no queued work touches it.

        Raises:
            DeviceError: the range is not made of whole maps, or the device refused; all of it is mapped as before.
        """

    @abstractmethod
    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """A uint8 tensor of `size_bytes` over reserved addresses, valid while the reservation lives.

        Touching a part with nothing mapped behind it is a fault, as for any bad pointer.
        """

    # order

    @abstractmethod
    def stream(self, priority: int = 0) -> Stream:
        """A new stream. A lower `priority` number goes first, as in CUDA."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream on which the calling thread's torch operations run."""

    @abstractmethod
    def event(self, timing: bool = False, *, blocking: bool = False) -> Event:
        """A new event, recorded nowhere yet (so it counts as complete).

        Args:
            timing: `elapsed_time` may be asked of it.
            blocking: who synchronises with it sleeps, for a thread that waits beside another one's work. Otherwise the
                wait is a spin, which ends sooner and takes the driver's lock again and again, beside whoever launches
                kernels meanwhile (vLLM, pull request 47081).
        """

    @abstractmethod
    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        """Run `work`, a function of torch operations, in the order of `stream`."""

    @abstractmethod
    def graphs(self) -> Graphs:
        """What makes graphs that share memory."""

    def drain(self, stream: Stream) -> None:
        """Wait until `stream` has done all that was queued.

        Raises:
            DeviceError: some of it failed, or the device cannot be asked.
        """
        event = self.event(blocking=True)
        event.record(stream)
        event.synchronize()

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all streams of this device have nothing left to do.

        Raises:
            DeviceError: work on one of them failed.
        """

    # copies

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream, direction: Direction) -> None:
        """Copy `src` to `dst` in the order of `stream`, and count the bytes.

        Both are contiguous uint8 tensors of one length; the host side must be pinned, or the copy would block the
        caller (`HostTier` hands out only memory that is registered with the device).

        Raises:
            TransferError: the driver refused the copy; nothing was counted.
        """
        size_bytes = dst.numel()
        if size_bytes != src.numel():
            raise ValueError(f"copy of {src.numel()} bytes into {size_bytes}")
        self._issue_copy(dst, src, stream)
        self._count(direction, size_bytes)

    def copy_all(
        self,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
        stream: Stream,
        direction: Direction,
        *,
        piece_bytes: int = 1 << 62,
        gives_way: bool = False,
        begun: Event | None = None,
        done: Event | None = None,
    ) -> None:
        """`copy` for each (dst, src), in one call where the device can. They must not overlap, and run in any order.

        A thread asks for Python's interpreter again after every call, and beside a busy thread that takes longer than
        the call. No copy is of more than `piece_bytes`, so that small ones of other streams get in between. When it is
        the turn of copies that give way, those of other streams go first, however late these were issued: otherwise a
        copy engine serves in the order of issue. `begun` is recorded right before the first copy, and `done` right
        behind the last: to prepare many takes longer than to do them, and whoever calls again may have to wait for the
        interpreter before.

        Raises:
            TransferError: a copy was refused; those before it may have been issued, and `done` is not recorded.
        """
        for dst, src in copies:
            if dst.numel() != src.numel():
                raise ValueError(f"copy of {src.numel()} bytes into {dst.numel()}")
        if gives_way:
            self._give_way(stream)
        self._issue_copies(copies, stream, direction, piece_bytes, begun, done)

    def _issue_copies(
        self,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
        stream: Stream,
        direction: Direction,
        piece_bytes: int,
        begun: Event | None,
        done: Event | None,
    ) -> None:
        """Issue and count all of them. Here one by one; a device that takes a batch overrides it."""
        if begun is not None:
            begun.record(stream)
        for dst, src in copies:
            for at in range(0, dst.numel(), piece_bytes):
                self.copy(dst[at : at + piece_bytes], src[at : at + piece_bytes], stream, direction)
        if done is not None:
            done.record(stream)

    def _give_way(self, stream: Stream) -> None:  # noqa: B027 - nothing to do where no engine serves several streams
        """Let copies of other streams go before what is issued on `stream` from now on."""

    def copier(self, target: torch.Tensor, stream: Stream, direction: Direction) -> Callable[[HostBytes], None]:
        """`copy` into the beginning of `target`, prepared: what can be asked beforehand is not asked at the copy.

        For copies that someone waits for. Each question to a tensor is a call into code that is in no cache by then,
        and a copy asks a dozen, which take longer than the driver's own call.

        Raises:
            ValueError: by the function: the source is larger than `target`.
            TransferError: by the function: the driver refused the copy; nothing was counted.
        """

        def issue(source: HostBytes) -> None:
            self.copy(target[: source.size_bytes], source.tensor, stream, direction)

        return issue

    def _count(self, direction: Direction, size_bytes: int) -> None:
        with self._count_lock:
            self._counts[direction] += size_bytes

    @abstractmethod
    def _issue_copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        """Issue the copy; `copy` counts it."""

    @property
    def copied(self) -> CopyCounts:
        """Bytes copied so far, by direction."""
        with self._count_lock:
            return CopyCounts(*(self._counts[d] for d in (Direction.H2D, Direction.D2H, Direction.D2D)))

    # host memory and the machine

    @abstractmethod
    def pin(self, address: int, size_bytes: int) -> None:
        """Page-lock and register existing host memory for asynchronous copies.

        Raises:
            PinningRefused: the operating system or the driver refused; the memory is as it was.
        """

    @abstractmethod
    def unpin(self, address: int, size_bytes: int) -> None:
        """Undo `pin`."""

    def keeping_interpreter(self, keeps: bool = True) -> AbstractContextManager[None]:
        """Within it, short calls of this thread into the driver keep Python's interpreter, as far as the device can.

        For what someone waits for: each call that gives it away has to stand in line for it again, and beside busy
        threads that takes longer than the call. Not for calls that may block: nobody can run Python meanwhile. Without
        `keeps` they give it away, within another such context, too.
        """
        return nullcontext()

    @abstractmethod
    def bind_thread(self) -> None:
        """Make the calling thread ready to use the device; a worker calls it before its work, and twice is once."""

    @abstractmethod
    def used_bytes(self) -> int:
        """Memory in use on the whole device, by everyone, as the driver sees it."""

    @abstractmethod
    def close(self) -> None:
        """Stop streams and give everything back. Reservations must have been released."""
