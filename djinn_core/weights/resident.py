"""Device memory for weights, and the way in for those that stay.

A block is one extent in one region; the ring's slots are blocks too. Resident layers reach the device through two
pinned staging buffers of the largest block, read and copied in turn, so that weights that stay on the device are never
all on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from djinn_core.device.base import Device, Direction
from djinn_core.memory.extents import Extent, ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.memory.ledger import Kind
from djinn_core.memory.regions import Region
from djinn_core.weights.plan import round_up
from djinn_core.weights.store import BLOCK_ALIGNMENT_BYTES, Layout, Readable, read_all

STAGING_BUFFERS = 2


class DeviceBlocks:
    """Blocks of device memory side by side in one region.

    Attributes:
        blocks: a uint8 tensor per block.
        size_bytes: device memory held, rounding included.
    """

    def __init__(self, device: Device, pool: ExtentPool, sizes: Sequence[int], kind: Kind, owner: str) -> None:
        """Acquire and map a block for each of `sizes`.

        Raises:
            OutOfDeviceMemory, DeviceError: nothing is held.
        """
        rounded = [round_up(size, device.granularity_bytes) for size in sizes]
        self._pool = pool
        self.size_bytes = sum(rounded)
        self._region = Region(device, self.size_bytes)
        extents: list[Extent] = []
        try:
            for size in rounded:
                extents.append(pool.acquire(size, kind, owner))
            offsets = [sum(rounded[:i]) for i in range(len(rounded))]
            self._region.map(list(zip(offsets, extents, strict=True)))
        except BaseException:
            for extent in extents:
                pool.give_back(extent)
            self._region.close()
            raise
        self.blocks = [self._region.tensor[at : at + size] for at, size in zip(offsets, sizes, strict=True)]

    def close(self) -> None:
        """Give the memory back. No queued work may touch it, and its tensors must not be used again."""
        self.blocks = []
        for extent in self._region.unmap(list(self._region.mapped())):
            self._pool.give_back(extent)
        self._region.close()


def staging_bytes(layouts: Sequence[Layout]) -> int:
    """What `load_resident` takes of the host tier for these, while it runs."""
    size = round_up(max((layout.size_bytes for layout in layouts), default=0), BLOCK_ALIGNMENT_BYTES)
    return size * min(STAGING_BUFFERS, len(layouts))


def load_resident(
    device: Device,
    host: HostTier,
    source: Readable,
    items: Sequence[tuple[Layout, torch.Tensor]],
    owner: str,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Read each layout's tensors from `source` into its device block, through bounded staging. Complete on return.

    Raises:
        OutOfHostMemory, PinningRefused: no room for the staging buffers.
        WeightsError, TransferError: as the source and the device say.
    """
    if not items:
        return
    count = min(STAGING_BUFFERS, len(items))
    size = staging_bytes([layout for layout, _ in items]) // count
    staging = host.allocate_exact(size * count, owner, cuts=tuple(range(size, size * count, size)))
    stream = device.stream()
    sent = [device.event() for _ in range(count)]
    try:
        for i, (layout, block) in enumerate(items):
            turn = i % count
            buffer = staging.tensor[turn * size : turn * size + layout.size_bytes]
            sent[turn].synchronize()
            read_all(source, list(layout.views(buffer).items()), on_bytes)
            device.copy(block[: layout.size_bytes], buffer, stream, Direction.H2D)
            sent[turn].record(stream)
        stream.synchronize()
    except BaseException:
        stream.synchronize()
        raise
    finally:
        staging.free()
