"""A region: reserved addresses, and the extents that are mapped in them now.

Invariant: `mapped()` is what the device has mapped. A failed call is undone before it raises, so it can be retried.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import torch

from djinn_core.device.base import Device
from djinn_core.errors import DeviceError, UsageError
from djinn_core.memory.extents import Extent


class Region:
    """`size_bytes` of addresses (rounded up to the device's granularity) that stay the same until `close`.

    Not thread-safe: one owner maps and unmaps. The owner sees to it that no queued work touches what is unmapped.

    Attributes:
        address: the first address.
        tensor: uint8, over all of it; valid across unmap and map. Touching what is not mapped is a fault.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        granularity = device.granularity_bytes
        self._device = device
        self.size_bytes = max(1, -(-size_bytes // granularity)) * granularity
        self.address = device.reserve(self.size_bytes)
        try:
            self.tensor = device.tensor(self.address, self.size_bytes)
        except BaseException:
            device.release(self.address, self.size_bytes)
            raise
        self._extents: dict[int, Extent] = {}
        self._offsets: list[int] = []  # sorted
        self._closed = False

    def map(self, pieces: Sequence[tuple[int, Extent]]) -> None:
        """Put extents behind their (offset, extent) places, all or none, with one grant per contiguous span.

        Raises:
            UsageError: a place lies outside the region or is taken.
            DeviceError: the device refused; nothing stayed mapped.
        """
        self._check_open()
        added: list[int] = []
        mapped = 0
        try:
            for offset, extent in pieces:
                self._check_place(offset, extent.size_bytes)
                added.append(offset)  # before the call, so that what interrupts it is undone as well
                self._extents[offset] = extent
                insort(self._offsets, offset)
                self._device.map(self.address + offset, extent.handle, extent.size_bytes)
                mapped += 1
            for start, size_bytes in self._spans(added):
                self._device.grant(self.address + start, size_bytes)
        except BaseException:
            for offset in reversed(added):
                refused = contextlib.suppress(DeviceError) if offset in added[mapped:] else contextlib.nullcontext()
                with refused:
                    if offset in self._extents:
                        self._device.unmap(self.address + offset, self._extents[offset].size_bytes)
                self._forget(offset)
            raise

    def unmap(self, offsets: Sequence[int]) -> list[Extent]:
        """Take the extents at `offsets` out, all or none, neighbours in one call; they are the caller's again.

        Raises:
            UsageError: nothing is mapped at one of the offsets.
            DeviceError: the device refused; what had been unmapped is mapped again, or `at` says that it is not.
        """
        missing = [offset for offset in offsets if offset not in self._extents]
        if missing or len(set(offsets)) != len(offsets):
            raise UsageError(f"nothing is mapped, or it is named twice, at offsets {missing or list(offsets)}")
        extents = {offset: self._extents[offset] for offset in offsets}
        removed: list[tuple[int, Extent]] = []
        try:
            for start, size_bytes in self._spans(offsets):
                self._device.unmap(self.address + start, size_bytes)
                for offset in [offset for offset in extents if start <= offset < start + size_bytes]:
                    self._forget(offset)
                    removed.append((offset, extents[offset]))
        except BaseException:
            for piece in removed:
                with contextlib.suppress(DeviceError):
                    self.map([piece])
            raise
        return list(extents.values())

    def mapped(self) -> dict[int, Extent]:
        """Extents by offset, in order."""
        return {offset: self._extents[offset] for offset in self._offsets}

    def at(self, offset: int) -> Extent | None:
        """The extent that is mapped at this very offset."""
        return self._extents.get(offset)

    def view(self, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor over this place; it need not be mapped yet."""
        count = 1
        for length in shape:
            count *= length
        end = offset_bytes + count * dtype.itemsize
        if offset_bytes < 0 or end > self.size_bytes or offset_bytes % dtype.itemsize:
            raise UsageError(
                f"{tuple(shape)} {dtype} at byte {offset_bytes} does not fit a region of {self.size_bytes}"
            )
        with torch.inference_mode(False):  # a caller's mode must not decide who may write to it later
            return self.tensor[offset_bytes:end].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Give the addresses back; tensors over them die. Refused while something is mapped; twice is once."""
        if self._closed:
            return
        if self._extents:
            raise UsageError(f"{len(self._extents)} extents are still mapped in the region; unmap them first")
        self._device.release(self.address, self.size_bytes)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the region is closed")

    def _check_place(self, offset: int, size_bytes: int) -> None:
        if offset < 0 or offset % self._device.granularity_bytes or offset + size_bytes > self.size_bytes:
            raise UsageError(f"offset {offset} + {size_bytes} is not a place in a region of {self.size_bytes} bytes")
        i = bisect_left(self._offsets, offset)
        after = i < len(self._offsets) and self._offsets[i] < offset + size_bytes
        before = i and self._offsets[i - 1] + self._extents[self._offsets[i - 1]].size_bytes > offset
        if after or before:
            raise UsageError(f"offset {offset} + {size_bytes} has something mapped already")

    def _forget(self, offset: int) -> None:
        self._extents.pop(offset, None)
        at = bisect_left(self._offsets, offset)
        if self._offsets[at : at + 1] == [offset]:
            del self._offsets[at]

    def _spans(self, offsets: Iterable[int]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for offset in sorted(offsets):
            size_bytes = self._extents[offset].size_bytes
            if spans and sum(spans[-1]) == offset:
                spans[-1] = (spans[-1][0], spans[-1][1] + size_bytes)
            else:
                spans.append((offset, size_bytes))
        return spans
