"""Host memory from the operating system in an exact size: mapped, faulted in by many threads, page-locked."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from djinn_core.device import libc
from djinn_core.device.base import Device
from djinn_core.errors import OutOfHostMemory, PinningRefused

PIECE_BYTES = 32 << 30  # the most that one registration takes
FAULT_BYTES = 64 << 20  # what one thread faults in at a time
HUGE_PAGE_BYTES = 2 << 20


class HostMapping:
    """`size_bytes` of host memory (rounded up to pages): mapped, faulted in by `threads`, registered.

    Registered in pieces of at most 32 GiB that end at `cuts`. With `optional`, memory that cannot be page-locked stays
    pageable, and `pinned` is False. A child process does not get it.

    Raises:
        OutOfHostMemory: the operating system has no room.
        PinningRefused: it would not page-lock the memory, and `optional` is not set.
    """

    def __init__(self, device: Device, size_bytes: int, threads: int, optional: bool, cuts: Sequence[int]) -> None:
        self._device = device
        self.size_bytes = -(-size_bytes // libc.PAGE_BYTES) * libc.PAGE_BYTES
        self._pieces: list[tuple[int, int]] = []
        pieces = cut_pieces(self.size_bytes, cuts, PIECE_BYTES)
        try:
            self.address = libc.map_aligned(self.size_bytes, HUGE_PAGE_BYTES)
        except OSError as error:
            raise OutOfHostMemory(
                f"the operating system gave no addresses: {error}", needed_bytes=self.size_bytes, free_bytes=0
            ) from error
        try:
            self._fault_in(threads)
            self.pinned = self._register(pieces, optional)
        except BaseException:
            self.close()
            raise

    def _fault_in(self, threads: int) -> None:
        try:  # a fork would copy every page-locked page: twice the memory, and the time for it
            libc.advise(self.address, self.size_bytes, libc.MADV_DONTFORK)
        except OSError as error:
            raise self._no_pages(error) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages: the same memory in small ones
            libc.advise(self.address, self.size_bytes, libc.MADV_HUGEPAGE)

        def fault(start: int) -> None:
            size_bytes = min(FAULT_BYTES, self.size_bytes - start)
            try:
                libc.advise(self.address + start, size_bytes, libc.MADV_POPULATE_WRITE)
            except OSError as error:
                if error.errno == errno.EINVAL:  # before Linux 5.14; writing to it does the same
                    libc.fill_bytes(self.address + start, 0, size_bytes)
                else:
                    raise self._no_pages(error) from error

        starts = range(0, self.size_bytes, FAULT_BYTES)
        if len(starts) == 1:
            fault(0)
            return
        with ThreadPoolExecutor(min(threads, len(starts)), "djinn-fault") as workers:
            for _ in workers.map(fault, starts):
                pass

    def _no_pages(self, error: OSError) -> OutOfHostMemory:
        return OutOfHostMemory(
            f"the operating system has no pages left: {error}",
            needed_bytes=self.size_bytes,
            free_bytes=available_bytes(),
        )

    def _register(self, pieces: list[tuple[int, int]], optional: bool) -> bool:
        try:
            for start, size_bytes in pieces:
                self._device.pin(self.address + start, size_bytes)
                self._pieces.append((start, size_bytes))
        except PinningRefused as error:
            if not optional:
                error.add_note(f"{locked_limit()}; raise it (`ulimit -l unlimited`), or set pinning='optional'")
                raise
            self._unregister()
            self._device.pageable_copies = True
            return False
        return True

    def _unregister(self) -> None:
        while self._pieces:
            start, size_bytes = self._pieces.pop()
            self._device.unpin(self.address + start, size_bytes)

    def close(self) -> None:
        self._unregister()
        libc.unmap(self.address, self.size_bytes)


def cut_pieces(size_bytes: int, cuts: Sequence[int], most_bytes: int) -> list[tuple[int, int]]:
    """(start, size) pieces of at most `most_bytes` that cover `size_bytes` and end only at `cuts`, as few as possible.

    Raises:
        ValueError: a needed cut is missing or no multiple of the page size.
    """
    pieces, start = [], 0
    while size_bytes - start > most_bytes:
        end = max((cut for cut in cuts if start < cut <= start + most_bytes), default=0)
        if not end or end % libc.PAGE_BYTES:
            raise ValueError(
                f"{size_bytes:,} bytes need a cut at most {most_bytes:,} bytes after {start:,}, at a multiple of "
                f"{libc.PAGE_BYTES}; the best given is {end:,}"
            )
        pieces.append((start, end - start))
        start = end
    return [*pieces, (start, size_bytes - start)]


def available_bytes() -> int:
    """What the operating system says it could still give."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def locked_limit() -> str:
    """The process's limit of page-locked memory, in words."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"`ulimit -l` is {'unlimited' if soft == resource.RLIM_INFINITY else f'{soft >> 10:,} KiB'}"
