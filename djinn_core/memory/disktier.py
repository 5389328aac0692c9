"""Session state on disk under a budget: one unlinked file, direct I/O where the file system has it, a checksum each.

Invariant: a block is either whole on disk with its checksum, or it does not exist. The file has no name while it is
open, so a process that dies leaves nothing behind. Not taken: a file per block, whose creation and removal cost more
than the write of a small block, and which a dead process would leave.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from djinn_core.device import libc
from djinn_core.device.spans import FreeSpans
from djinn_core.errors import ConfigError, DeviceError, IntegrityError, OutOfDisk, UsageError

UNIT_BYTES = 4096  # of offsets, lengths and addresses under O_DIRECT
SPARSE = 16  # offsets reach this many budgets, so that holes between blocks never turn a block away
PIECE_BYTES = 8 << 20  # one read or write, and one step of the checksum


@dataclass(eq=False)
class DiskBlock:
    """A block on disk: where it lies, how long it is and its crc32. Valid until it is freed.

    `held_bytes` is what it takes of the tier's budget.
    """

    offset: int
    size_bytes: int
    held_bytes: int
    crc32: int
    freed: bool = False


class DiskTier:
    """Blocks in a file in the folder `path`, at most `budget_bytes`. Thread-safe.

    Attributes:
        direct: the file system takes O_DIRECT; else reads and writes go through the page cache.
    """

    def __init__(self, path: str | Path, budget_bytes: int) -> None:
        self.path = Path(path)
        self._fd, self.direct = _open_unnamed(self.path)
        self._lock = threading.Lock()
        self._budget_bytes = budget_bytes // UNIT_BYTES * UNIT_BYTES
        self._spans = FreeSpans(SPARSE * self._budget_bytes, UNIT_BYTES)
        self._bounce = threading.local()
        self._closed = False

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def held_bytes(self) -> int:
        return self._spans.size_bytes - self._spans.free_bytes

    @property
    def free_bytes(self) -> int:
        return self._budget_bytes - self.held_bytes

    def write(self, src: torch.Tensor) -> DiskBlock:
        """Write a contiguous uint8 host tensor; it is on disk, or in the page cache without O_DIRECT, on return.

        Raises:
            OutOfDisk: the budget or the file system is full; nothing changed.
            DeviceError: the write failed; nothing changed.
        """
        _check(src)
        size_bytes = src.numel()
        with self._lock:
            if self._closed:
                raise UsageError("the disk tier is closed")
            fits = self._spans.rounded(size_bytes) <= self.free_bytes
            offset = self._spans.take(size_bytes) if fits else None
            if offset is None:
                raise OutOfDisk(
                    f"the disk budget of {self.budget_bytes:,} bytes in {self.path} is full; free blocks or raise it",
                    needed_bytes=size_bytes,
                    free_bytes=self.free_bytes,
                )
        try:
            crc32 = self._write(src, offset)
        except OSError as error:
            self._give(offset, size_bytes)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                room = os.statvfs(self.path)
                raise OutOfDisk(
                    f"the file system of {self.path} is full; the block was not written",
                    needed_bytes=size_bytes,
                    free_bytes=room.f_bavail * room.f_frsize,
                ) from error
            raise DeviceError(
                f"writing {size_bytes:,} bytes to {self.path} failed, nothing was kept: {error}"
            ) from error
        except BaseException:
            self._give(offset, size_bytes)
            raise
        return DiskBlock(offset, size_bytes, self._spans.rounded(size_bytes), crc32)

    def read(self, block: DiskBlock, dst: torch.Tensor) -> None:
        """Read a block into a contiguous uint8 host tensor of its size. The block stays.

        Raises:
            IntegrityError: the bytes do not match their checksum; `dst` is not to be used.
            DeviceError: the read failed; it can be tried again.
        """
        _check(dst)
        self._check_alive(block)
        if dst.numel() != block.size_bytes:
            raise ValueError(f"a block of {block.size_bytes} bytes read into {dst.numel()}")
        try:
            crc32 = self._read(block, dst)
        except OSError as error:
            raise DeviceError(f"reading {block.size_bytes:,} bytes from {self.path} failed: {error}") from error
        if crc32 != block.crc32:
            raise IntegrityError(
                f"the block of {block.size_bytes:,} bytes at {block.offset:,} in {self.path} has crc32 {crc32:08x}, "
                f"written was {block.crc32:08x}; the disk changed it, and what it held is lost"
            )

    def free(self, block: DiskBlock) -> None:
        """Give a block's room back, to the file system too."""
        self._check_alive(block)
        block.freed = True
        self._give(block.offset, block.size_bytes)

    def close(self) -> None:
        """Give the file back, and every block with it."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)

    def _check_alive(self, block: DiskBlock) -> None:
        if self._closed:
            raise UsageError("the disk tier is closed")
        if block.freed:
            raise UsageError(f"the disk block at {block.offset:,} was freed before")

    def _give(self, offset: int, size_bytes: int) -> None:
        with self._lock:
            try:
                libc.punch_hole(self._fd, offset, self._spans.rounded(size_bytes))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):  # then the room stays with the file for reuse
                    raise DeviceError(f"freeing {size_bytes:,} bytes in {self.path} failed: {error}") from error
            finally:
                self._spans.give(offset, size_bytes)

    def _pieces(self, tensor: torch.Tensor):
        """(position, memory, in_place) over the tensor; what is in place is aligned and whole units long."""
        size_bytes, address = tensor.numel(), tensor.data_ptr()
        in_place = not self.direct or address % UNIT_BYTES == 0
        at = 0
        while at < size_bytes:
            length = min(PIECE_BYTES, size_bytes - at)
            if self.direct and in_place and length > UNIT_BYTES:
                length -= length % UNIT_BYTES
            whole = in_place and (not self.direct or length % UNIT_BYTES == 0)
            yield at, memoryview((ctypes.c_uint8 * length).from_address(address + at)).cast("B"), whole
            at += length

    def _write(self, src: torch.Tensor, offset: int) -> int:
        crc32 = 0
        for at, memory, in_place in self._pieces(src):
            crc32 = zlib.crc32(memory, crc32)
            if not in_place:
                memory = self._bounced(memory)
            _write_all(self._fd, memory, offset + at)
        return crc32

    def _read(self, block: DiskBlock, dst: torch.Tensor) -> int:
        crc32 = 0
        for at, memory, in_place in self._pieces(dst):
            if in_place:
                _read_all(self._fd, memory, block.offset + at)
            else:
                bounce = self._bounce_for(len(memory))
                _read_all(self._fd, bounce, block.offset + at)
                memory[:] = bounce[: len(memory)]
            crc32 = zlib.crc32(memory, crc32)
        return crc32

    def _bounce_for(self, size_bytes: int) -> memoryview:
        """This thread's aligned buffer, as long as `size_bytes` rounded up to a unit."""
        if not hasattr(self._bounce, "memory"):
            self._bounce.memory = memoryview(mmap.mmap(-1, PIECE_BYTES))
        return self._bounce.memory[: -(-size_bytes // UNIT_BYTES) * UNIT_BYTES]

    def _bounced(self, memory: memoryview) -> memoryview:
        bounce = self._bounce_for(len(memory))
        bounce[: len(memory)] = memory
        return bounce


def _open_unnamed(folder: Path) -> tuple[int, bool]:
    """(file without a name in `folder`, whether it takes O_DIRECT)."""
    for direct in (os.O_DIRECT, 0):
        try:
            try:
                return os.open(folder, os.O_TMPFILE | os.O_RDWR | direct, 0o600), bool(direct)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) or not folder.is_dir():
                    raise
            fd, name = tempfile.mkstemp(prefix="djinn-", dir=folder)
            try:
                return os.open(name, os.O_RDWR | direct), bool(direct)
            finally:
                os.unlink(name)
                os.close(fd)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise ConfigError(f"disk_path {folder} cannot hold session state: {error}") from error
    raise AssertionError("unreachable")


def _whole_units(done_bytes: int, memory: memoryview) -> int:
    """How far a short read or write counts: the rest must start at a unit again. Raises OSError if it did nothing."""
    if done_bytes < len(memory):
        done_bytes -= done_bytes % UNIT_BYTES
    if not done_bytes:
        raise OSError(errno.EIO, "the disk made no progress")
    return done_bytes


def _write_all(fd: int, memory: memoryview, offset: int) -> None:
    while memory:
        done_bytes = _whole_units(os.pwritev(fd, [memory], offset), memory)
        memory, offset = memory[done_bytes:], offset + done_bytes


def _read_all(fd: int, memory: memoryview, offset: int) -> None:
    while memory:
        done_bytes = _whole_units(os.preadv(fd, [memory], offset), memory)
        memory, offset = memory[done_bytes:], offset + done_bytes


def _check(tensor: torch.Tensor) -> None:
    if tensor.dtype is not torch.uint8 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a disk block is contiguous uint8 on the host, not {tensor.dtype} on {tensor.device}")
