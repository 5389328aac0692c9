"""Lossless codecs for streamed weights: fewer bytes cross the link, and what is decoded is the block, bit for bit.

The contract (`Codec`): `encode` at load, which waits; `decoder` once for a block and its places, whose result queues
one decode on the codec's own stream and waits for nothing. Two implementations, like the devices: nvCOMP's ANS on a
GPU, and on the emulated device zlib, run on a worker stream, so that a forgotten wait shows there as well.

Not taken: kernels of our own, which every user's machine would have to build. Nor a smaller number format, under which
the logits are another model's.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from djinn_core.device.base import Device, Stream
from djinn_core.errors import ConfigError, DeviceError, TransferError

CODINGS = ("ans",)
DTYPES = (torch.bfloat16, torch.float16)
PACKAGE = "nvidia-nvcomp-cu13"
CHUNK_BYTES = 256 << 10  # what nvCOMP codes on its own; larger ones code no better, smaller ones add headers


@dataclass(frozen=True)
class Coded:
    """A block as it was coded.

    Attributes:
        size_bytes: of the coded block.
        how: what decoding needs besides the bytes, the codec's own; None for nothing.
    """

    size_bytes: int
    how: Any = None


class Codec(ABC):
    """Codes blocks of floats: contiguous uint8 tensors on the device, whose size is a multiple of the float's.

    Call it from one thread at a time (the turn sees to that).

    Attributes:
        name: the library and the method, for results.
        stream: where it decodes.
    """

    name: str
    stream: Stream

    @abstractmethod
    def bound_bytes(self, size_bytes: int) -> int:
        """The most that a block of `size_bytes` can take coded; never less than the block itself."""

    @abstractmethod
    def encode(self, block: torch.Tensor, out: torch.Tensor) -> Coded:
        """Code `block` into the first bytes of `out`, which has at least `bound_bytes`, and wait for it.

        A block that does not become smaller is coded all the same.

        Raises:
            DeviceError: the codec failed; `out` holds nothing of use.
        """

    def end_encoding(self) -> None:
        """Give back what only `encode` needs. It may be called again all the same."""
        return

    @abstractmethod
    def decoder(self, coded: Coded, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """What queues, on `stream`, a decode of `source` (`coded.size_bytes` long) into `out`, each time it is called.

        The call waits for nothing. It raises DeviceError where the decode could not be queued.
        """


def check(coding: str | None, dtype: torch.dtype, *, is_gpu: bool) -> None:
    """Whether weights of `dtype` can be coded by `coding` here; nothing is coded and no device is touched.

    Raises:
        ConfigError: the coding is unknown, it does not fit the dtype, or its library is not installed.
    """
    if coding is None:
        return
    if coding not in CODINGS:
        raise ConfigError(f"coding is {coding!r}; allowed are {', '.join(map(repr, CODINGS))} and None")
    if is_gpu and dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"coding={coding!r} codes 16-bit floats on a GPU, and these weights are {name}; load them as bfloat16 or "
            "float16, or without coding"
        )
    if is_gpu:
        _nvcomp()


def open_codec(device: Device, coding: str | None, dtype: torch.dtype) -> Codec | None:
    """The codec for `coding` on `device`; None without coding.

    Raises:
        ConfigError: as `check`.
        DeviceError: the library does not start on this device.
    """
    check(coding, dtype, is_gpu=device.is_gpu)
    if coding is None:
        return None
    return NvcompAns(device) if device.is_gpu else ZlibPlanes(device, dtype.itemsize)


class ZlibPlanes(Codec):
    """The emulated device's stand-in: zlib over the byte planes of the block. Same contract, no claim to speed.

    It takes float32 too, in which the emulated device computes fastest.
    """

    def __init__(self, device: Device, planes: int = 2) -> None:
        self._planes = planes
        self.name = f"zlib {zlib.ZLIB_RUNTIME_VERSION}, level 1, byte planes"
        self.stream = device.stream()
        self._device = device

    def bound_bytes(self, size_bytes: int) -> int:
        return size_bytes + size_bytes // 256 + 4096  # zlib's own bound adds 0.03 %, and 13 bytes

    def encode(self, block: torch.Tensor, out: torch.Tensor) -> Coded:
        sizes: list[int] = []

        def work() -> None:
            planes = np.ascontiguousarray(block.numpy().reshape(-1, self._planes).T)
            coded = np.frombuffer(zlib.compress(planes, 1), np.uint8)
            out.numpy()[: coded.size] = coded
            sizes.append(coded.size)

        self._device.launch(self.stream, work)
        self.stream.synchronize()
        return Coded(sizes[0])

    def decoder(self, coded: Coded, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        def work() -> None:
            try:
                planes = np.frombuffer(zlib.decompress(source.numpy()), np.uint8)
            except zlib.error as error:
                raise TransferError(f"a coded block of {source.numel():,} bytes is damaged: {error}") from error
            if planes.size != out.numel():
                raise TransferError(f"a coded block holds {planes.size:,} bytes, its layer has {out.numel():,}")
            out.numpy().reshape(-1, self._planes)[:] = planes.reshape(self._planes, -1).T

        return lambda: self._device.launch(self.stream, work)


class NvcompAns(Codec):
    """nvCOMP's ANS in its mode for 16-bit floats, which takes bits as they are: bfloat16's as well as float16's.

    What nvCOMP needs besides the two buffers it takes from torch's allocator, in the order of this codec's stream. So
    it is a part of `activation_bytes` and held to it. nvCOMP has one allocator in a process: another user of it there
    gets the same.
    """

    def __init__(self, device: Device) -> None:
        self._nvcomp = _nvcomp()
        self.name = f"nvCOMP {self._nvcomp.__version__}, ANS, <f2"
        self.stream = device.stream()
        self._device = device
        self._nvcomp.set_device_allocator(_TorchBytes)
        self._codec = self._open()
        self._encoder: Any = None  # apart, since what it took to encode would stay with it

    def _open(self) -> Any:
        try:
            return self._nvcomp.Codec(
                algorithm="ANS",
                data_type="<f2",
                device_id=self._device.torch_device.index,
                cuda_stream=self.stream.cuda_stream,
                uncomp_chunk_size=CHUNK_BYTES,
            )
        except RuntimeError as error:
            raise DeviceError(f"{self.name} does not start on {self._device.name}: {error}") from error

    def bound_bytes(self, size_bytes: int) -> int:
        # nvCOMP 6 says 1.1975 for a chunk, and adds sizes and offsets; a block is at least a chunk. `encode` asks again
        return size_bytes + size_bytes // 4 + 4 * CHUNK_BYTES

    def encode(self, block: torch.Tensor, out: torch.Tensor) -> Coded:
        if self._encoder is None:
            self._encoder = self._open()
        try:
            source = self._nvcomp.as_array(block.view(torch.float16))
            needed_bytes = self._encoder.get_max_comp_buffer_size(source)
            if needed_bytes > out.numel():
                raise DeviceError(
                    f"{self.name} may need {needed_bytes:,} bytes for a block of {block.numel():,}, and "
                    f"{out.numel():,} were planned; take another version of {PACKAGE}, or load without coding"
                )
            encoded = self._encoder.encode(source, out=self._nvcomp.as_array(out))
            self.stream.synchronize()
            size_bytes = int(encoded.buffer_size)
            how = self._codec.decompression_config(self._nvcomp.as_array(out[:size_bytes]))
        except (RuntimeError, ValueError) as error:
            raise self._failed("code", block.numel(), error) from error
        return Coded(size_bytes, how)  # with it a decode need not read the block's header back, which would wait

    def end_encoding(self) -> None:
        self._encoder = None
        torch.cuda.empty_cache()

    def decoder(self, coded: Coded, source: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        decode, how = self._codec.decode, coded.how
        into = out.view(torch.float16)
        coded_array, block_array = self._nvcomp.as_array(source), self._nvcomp.as_array(into)

        def queue() -> None:
            try:
                decode(coded_array, out=block_array, decompression_config=how)
            except (RuntimeError, ValueError) as error:
                raise self._failed("decode", out.numel(), error) from error

        return queue

    def _failed(self, what: str, size_bytes: int, error: Exception) -> DeviceError:
        return DeviceError(
            f"{self.name} could not {what} a block of {size_bytes:,} bytes: {error}; where memory was short, raise "
            "activation_bytes"
        )


class _TorchBytes:
    """Device memory for nvCOMP from torch's allocator, in the order of `stream`; `ptr` is where it begins."""

    def __init__(self, size_bytes: int, stream: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=stream.device)):
            self._tensor = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=f"cuda:{stream.device}")
        self.ptr = self._tensor.data_ptr()


def _nvcomp() -> Any:
    """The library, imported when it is first wanted.

    Raises:
        ConfigError: it is not installed, or does not load; with the package to install.
    """
    try:
        from nvidia import nvcomp
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"coding='ans' on a GPU needs {PACKAGE} ({error}); install it (`pip install 'djinn-core[coding]'`), or "
            "load without coding"
        ) from error
    return nvcomp
