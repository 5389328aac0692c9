"""One safetensors file, written and read in a stream with a checksum over all of it.

Source: the format, https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from djinn_core.errors import IntegrityError
from djinn_core.interrupts import Interruptible
from djinn_core.models.safetensor_file import DTYPE_NAMES, DTYPES

PIECE_BYTES = 8 << 20
HEADER_LIMIT_BYTES = 100 << 20


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write host tensors to `path`, synced; returns the file's blake2b."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        size_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size_bytes],
        }
        at += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "wb") as file:
        for piece in (struct.pack("<Q", len(text)), text, *(_memory(t) for t in tensors.values() if t.numel())):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class TensorFile:
    """A file of `write_tensors`, checked against its checksum before anything is read from it.

    Raises:
        IntegrityError: the file is missing, or is not what was written.
    """

    def __init__(self, path: Path, blake2b: str) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
        try:
            with Interruptible():
                self._check(blake2b)
            self._entries, self._data = self._header()
        except BaseException:
            self._file.close()
            raise

    def _check(self, blake2b: str) -> None:
        digest = hashlib.blake2b(digest_size=32)
        while piece := self._file.read(PIECE_BYTES):
            digest.update(piece)
        if digest.hexdigest() != blake2b:
            raise IntegrityError(f"{self.path} is damaged: its bytes do not match their checksum")

    def _header(self) -> tuple[dict[str, dict], int]:
        self._file.seek(0)
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > HEADER_LIMIT_BYTES:
            raise IntegrityError(f"{self.path} has a header of {length} bytes")
        return json.loads(self._file.read(length)), 8 + length

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _entry(self, name: str) -> dict:
        if name not in self._entries:
            raise IntegrityError(f"{self.path} has no tensor {name}")
        return self._entries[name]

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name)["dtype"]]

    def size_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> torch.Tensor:
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        if out.numel():
            self.read_into(name, out.view(-1).view(torch.uint8))
        return out

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Read a tensor's bytes into uint8 `target` of its size."""
        begin, end = self._entry(name)["data_offsets"]
        self._file.seek(self._data + begin)
        if end - begin != target.numel() or self._file.readinto(_memory(target)) != end - begin:
            raise IntegrityError(f"{self.path}: {name} has {end - begin} bytes, {target.numel()} were to be read")
