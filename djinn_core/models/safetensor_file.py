"""One safetensors file: its header checked against its size, its bytes read into place.

Not taken: `safetensors.safe_open`, which maps the file, so that reading into pinned memory is a page-faulting copy on
one thread; here the kernel writes to the final place, many pieces at once.
Source: the format, https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from djinn_core.errors import WeightsError
from djinn_core.models.pieces import each_piece

READ_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 100 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    file: SafetensorFile
    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset_bytes: int
    size_bytes: int


class SafetensorFile:
    """An open file whose header has been checked.

    Raises:
        WeightsError: the header is corrupt, its tensors overlap or leave gaps, or the file is shorter or longer than
            it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"cannot open {path}: {error.strerror}") from error
        try:
            self.tensors = self._read_header()
        except OSError as error:
            self.close()
            raise WeightsError(f"cannot read {path}: {error.strerror}") from error
        except WeightsError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reads afterwards fail."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _read_header(self) -> dict[str, StoredTensor]:
        self._stamp = self._stat()
        file_bytes = self._stamp[0]
        head = os.pread(self._fd, 8, 0)
        if len(head) < 8:
            raise WeightsError(f"{self.path} is cut short: {file_bytes} bytes hold no safetensors header")
        (header_bytes,) = struct.unpack("<Q", head)
        if header_bytes > min(_HEADER_LIMIT_BYTES, file_bytes - 8):
            raise WeightsError(
                f"{self.path} is corrupt or cut short: a header of {header_bytes:,} bytes in a file of {file_bytes:,}"
            )
        try:
            header = json.loads(os.pread(self._fd, header_bytes, 8))
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{self.path} has a corrupt header, which is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise WeightsError(f"{self.path} has a corrupt header: it is no JSON object")
        fields = [self._entry(name, entry) for name, entry in header.items() if name != "__metadata__"]
        data = 8 + header_bytes
        tensors, end_of_last = {}, 0
        for name, dtype, shape, begin, end in sorted(fields, key=lambda field: field[3:5]):
            if begin != end_of_last or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                raise WeightsError(
                    f"{self.path} has a corrupt header: {name}, {dtype} {list(shape)}, cannot lie at {begin}:{end} "
                    f"behind {end_of_last}"
                )
            tensors[name] = StoredTensor(self, name, shape, DTYPES[dtype], data + begin, end - begin)
            end_of_last = end
        if data + end_of_last != file_bytes:
            what = "cut short" if file_bytes < data + end_of_last else "too long"
            raise WeightsError(
                f"{self.path} is {what}: {file_bytes:,} bytes, and its header describes {data + end_of_last:,}"
            )
        return tensors

    def _entry(self, name: str, entry: Any) -> tuple[str, str, torch.Size, int, int]:
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise WeightsError(
                f"{self.path} has a corrupt header: {name} must have a dtype, a shape and two data_offsets, "
                f"in whole numbers from 0 on, and has {str(entry)[:100]}; copy the file again"
            )
        if dtype not in DTYPES:
            raise WeightsError(f"{self.path}: {name} is stored as {dtype}; known are {', '.join(DTYPES)}")
        return name, dtype, torch.Size(shape), *offsets

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def read(self, tensor: StoredTensor, out: torch.Tensor) -> None:
        """Read a tensor's bytes into `out`, contiguous and of its dtype; several threads, each its own piece.

        Raises:
            WeightsError: the file ended early, could not be read, or changed since it was opened.
        """
        flat = out.reshape(-1).view(torch.uint8)
        self._refuse_changed()
        each_piece(tensor.size_bytes, READ_BYTES, lambda begin, end: self.read_range(tensor, begin, flat[begin:end]))
        self._refuse_changed()

    def read_converted(self, tensor: StoredTensor, out: torch.Tensor) -> None:
        """Read a tensor into `out` of another dtype, holding one small piece per thread in between."""
        flat, item = out.reshape(-1), tensor.dtype.itemsize

        def convert(begin: int, end: int) -> None:
            piece = torch.empty(end - begin, dtype=tensor.dtype)
            self.read_range(tensor, begin * item, piece.view(torch.uint8))
            flat[begin:end].copy_(piece)

        self._refuse_changed()
        each_piece(flat.numel(), READ_BYTES // item, convert)
        self._refuse_changed()

    def sample(self, tensor: StoredTensor, size_bytes: int) -> bytes:
        """The first, middle and last `size_bytes` of a tensor, for a digest. Raises WeightsError, as `read` does."""
        last = max(tensor.size_bytes - size_bytes, 0)
        parts = torch.empty(3, min(size_bytes, tensor.size_bytes), dtype=torch.uint8)
        for begin, part in zip((0, last // 2, last), parts, strict=True):
            self.read_range(tensor, begin, part)
        return parts.numpy().tobytes()

    def _refuse_changed(self) -> None:
        if self._stat() != self._stamp:
            raise WeightsError(f"{self.path} changed since it was opened; open the source again")

    def read_range(self, tensor: StoredTensor, begin: int, out: torch.Tensor) -> None:
        """Fill `out` (uint8) with the tensor's bytes from `begin` on."""
        view = memoryview(out.numpy())
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], tensor.offset_bytes + begin + done)
            except OSError as error:
                raise WeightsError(f"reading {tensor.name} from {self.path}: {error.strerror}") from error
            if count == 0:
                raise WeightsError(
                    f"{tensor.name} in {self.path} is cut short: {begin + done:,} of {tensor.size_bytes:,} bytes"
                )
            done += count


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
