"""The packed layout of a layer, and the host memory that keeps the streamed ones.

Each layer is one contiguous block, its tensors at 256-byte borders, so that a layer crosses the link in a few large
copies. Blocks follow one another in one exact allocation of pinned memory, read straight from the source: no second
copy of a tensor's bytes exists on the host. The device sees the same layout, so a block is copied as it lies.

Not taken: torch's pinned allocator, which rounds each block up to a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from djinn_core.interrupts import Interruptible
from djinn_core.memory.hosttier import HostTier
from djinn_core.weights.plan import round_up

ALIGNMENT_BYTES = 256
BLOCK_ALIGNMENT_BYTES = 4096  # blocks begin on a page, as pinned pieces do
READERS = 3  # a source reads one tensor with all cores; a few at once keep them busy where one tensor ends

Progress = Callable[[int, int], None]
Spec = tuple[str, Sequence[int], torch.dtype]


class Readable(Protocol):
    """The part of a weight source that is needed here."""

    def read_into(self, name: str, out: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in its block."""

    name: str
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Tensors packed one after another at 256-byte borders.

    Attributes:
        tensors: in order.
        size_bytes: of the block, from the first byte to the last (no padding behind it).
        payload_bytes: of the tensors alone.
    """

    tensors: tuple[Placed, ...]
    size_bytes: int
    payload_bytes: int

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tensor as a view of `block`, a uint8 tensor of at least `size_bytes`."""
        return {t.name: view(block, t) for t in self.tensors}


def view(block: torch.Tensor, placed: Placed) -> torch.Tensor:
    """One tensor as a view of the block that holds it."""
    raw = block[placed.offset_bytes : placed.offset_bytes + placed.size_bytes]
    return raw.view(placed.dtype).view(placed.shape)


def pack(specs: Iterable[Spec]) -> Layout:
    """The layout of these tensors, in their order."""
    placed, end, payload = [], 0, 0
    for name, shape, dtype in specs:
        tensor = Placed(name, round_up(end, ALIGNMENT_BYTES), tuple(shape), dtype)
        placed.append(tensor)
        end = tensor.offset_bytes + tensor.size_bytes
        payload += tensor.size_bytes
    return Layout(tuple(placed), end, payload)


def read_all(
    source: Readable, targets: Sequence[tuple[str, torch.Tensor]], on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Read each named tensor into its place, several at once; the first failure is raised after all have ended."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="djinn-read") as readers:
        futures = [readers.submit(source.read_into, name, out) for name, out in targets]
        try:
            for future, (_, out) in zip(futures, targets, strict=True):
                with Interruptible():
                    future.result()
                on_bytes(out.nbytes)
        except BaseException:
            for other in futures:
                other.cancel()
            raise


def store_bytes(layouts: Iterable[Layout]) -> int:
    """What a `HostStore` of these takes of the host tier."""
    return sum(round_up(layout.size_bytes, BLOCK_ALIGNMENT_BYTES) for layout in layouts)


class HostStore:
    """The streamed layers' blocks in pinned host memory.

    Attributes:
        blocks: for each streamed layer its uint8 block.
        size_bytes: what the store takes of the host tier.
    """

    def __init__(self, host: HostTier, layouts: dict[int, Layout], owner: str) -> None:
        """Allocate room for `layouts` (by layer), and read nothing yet.

        Raises:
            OutOfHostMemory, PinningRefused: nothing was allocated.
        """
        offsets, end = {}, 0
        for layer, layout in layouts.items():
            offsets[layer] = end
            end += round_up(layout.size_bytes, BLOCK_ALIGNMENT_BYTES)
        self._layouts = layouts
        self._block = host.allocate_exact(end, owner, cuts=tuple(offsets.values()))
        self.size_bytes = end
        memory = self._block.tensor
        self.blocks = {layer: memory[at : at + layouts[layer].size_bytes] for layer, at in offsets.items()}

    def read(self, source: Readable, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Fill every block from `source`."""
        targets = [
            target for layer, layout in self._layouts.items() for target in layout.views(self.blocks[layer]).items()
        ]
        read_all(source, targets, on_bytes)

    def close(self) -> None:
        """Give the memory back. No copy out of it may be in flight."""
        self.blocks = {}
        self._block.free()
