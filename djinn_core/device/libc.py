"""The few libc calls that Python does not offer, through ctypes (which releases the interpreter lock)."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

PROT_NONE, PROT_RW = 0, mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
MADV_DONTFORK, MADV_HUGEPAGE, MADV_POPULATE_WRITE = 10, 14, 23
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
MAP_FAILED = ctypes.c_void_p(-1).value
PAGE_BYTES = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_size, _address = ctypes.c_size_t, ctypes.c_void_p
_libc.mmap.argtypes = (_address, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (_address, _size)
_libc.mprotect.argtypes = (_address, _size, ctypes.c_int)
_libc.madvise.argtypes = (_address, _size, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)

copy_bytes = ctypes.memmove
fill_bytes = ctypes.memset


def _raise(call: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{call}: {os.strerror(code)}")


def map_anonymous(size_bytes: int, protection: int = PROT_RW, address: int | None = None) -> int:
    """Private anonymous memory, at `address` (replacing what is there) when given. Raises OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | (MAP_FIXED if address else 0)
    result = _libc.mmap(address, size_bytes, protection, flags, -1, 0)
    if result == MAP_FAILED:
        _raise("mmap")
    return result


def map_aligned(size_bytes: int, alignment: int, protection: int = PROT_RW) -> int:
    """Private anonymous memory that begins at a multiple of `alignment`. Raises OSError."""
    spare = alignment - PAGE_BYTES
    whole = map_anonymous(size_bytes + spare, protection)
    address = -(-whole // alignment) * alignment
    if head := address - whole:
        unmap(whole, head)
    if tail := spare - head:
        unmap(address + -(-size_bytes // PAGE_BYTES) * PAGE_BYTES, tail)
    return address


def map_file(address: int, size_bytes: int, fd: int, offset: int, protection: int = PROT_NONE) -> None:
    """Put a shared piece of a file at `address`, replacing what is there. Raises OSError."""
    if _libc.mmap(address, size_bytes, protection, mmap.MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED:
        _raise("mmap")


def unmap(address: int, size_bytes: int) -> None:
    if _libc.munmap(address, size_bytes):
        _raise("munmap")


def protect(address: int, size_bytes: int, protection: int) -> None:
    if _libc.mprotect(address, size_bytes, protection):
        _raise("mprotect")


def advise(address: int, size_bytes: int, advice: int) -> None:
    if _libc.madvise(address, size_bytes, advice):
        _raise("madvise")


def punch_hole(fd: int, offset: int, size_bytes: int) -> None:
    """Give the pages or blocks behind a piece of a file back; it reads as zeros afterwards. Raises OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size_bytes):
        _raise("fallocate")


def tensor_at(address: int, size_bytes: int) -> torch.Tensor:
    """A uint8 tensor over `size_bytes` at `address`; it neither touches nor keeps the memory."""
    with torch.inference_mode(False):  # a caller's mode must not decide who may write to the memory later
        return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
