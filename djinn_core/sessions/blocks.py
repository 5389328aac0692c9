"""Blocks: the unit that is mapped, shared, written back, spilled and counted.

A session's KV lies in one region: for each layer a span for the longest length, token-major [T, 2, B, H_kv, D], cut
into blocks of at most 64 MiB. Tokens only ever arrive at the end, so a block's content is a prefix that grows, each
lineage (a session or a checkpoint) sees a prefix of its own length, and "what is new since the last write-back" is one
contiguous piece.

Invariant: a block with a device extent is mapped in at least one region (`places`), and before it leaves its last
region its host copy covers all that any holder can see. Its watermark is not stored but is the furthest of its
holders' ends, so what nobody holds any more can be overwritten in place: resuming a checkpoint twenty times copies
nothing.

Not taken: a page table of small pages. A map, a grant and an unmap cost the same for 2 MiB as for 64, and attention
wants one contiguous view.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from djinn_core.memory.disktier import DiskBlock
    from djinn_core.memory.extents import Extent
    from djinn_core.memory.hosttier import HostBlock
    from djinn_core.sessions.holding import Holding

MAX_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Layout:
    """Where the KV of each layer and token lies in a session's region. Pure arithmetic.

    Attributes:
        layers, batch_size, max_length, kv_heads, head_dim, dtype: the model's, and what the session was opened for.
        granularity_bytes: the device's; spans and blocks are multiples of it.
    """

    layers: int
    batch_size: int
    max_length: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    granularity_bytes: int

    @cached_property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.batch_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def span_bytes(self) -> int:
        """One layer's span."""
        return math.ceil(self.max_length * self.token_bytes / self.granularity_bytes) * self.granularity_bytes

    @cached_property
    def block_bytes(self) -> int:
        """All blocks of a span but the last one, which may be smaller."""
        whole = MAX_BLOCK_BYTES // self.granularity_bytes * self.granularity_bytes
        return min(self.span_bytes, max(whole, self.granularity_bytes))

    @cached_property
    def total_bytes(self) -> int:
        """The region: the longest that the session can become."""
        return self.layers * self.span_bytes

    def size_of(self, index: int) -> int:
        return min(self.block_bytes, self.span_bytes - index * self.block_bytes)

    def offset_of(self, layer: int, index: int) -> int:
        return layer * self.span_bytes + index * self.block_bytes

    def count(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens of a layer."""
        return -(-tokens * self.token_bytes // self.block_bytes)

    def tail(self, tokens: int) -> int:
        """The first block that appending to a layer of `tokens` tokens writes into; it may not be there yet."""
        return tokens * self.token_bytes // self.block_bytes

    def end_bytes(self, index: int, tokens: int) -> int:
        """How much of block `index` is filled when the layer holds `tokens` tokens."""
        return max(0, min(tokens * self.token_bytes - index * self.block_bytes, self.size_of(index)))


class Stored:
    """Bytes that live on the host or on disk. `size_bytes` is the room it takes; the valid part is a prefix.

    Attributes:
        host, host_valid_bytes: the pinned copy, and how much of it is right.
        disk, disk_valid_bytes: the same on disk.
        readers: transfers that read the host copy now; it is not given up meanwhile.
    """

    __slots__ = ("__weakref__", "disk", "disk_valid_bytes", "host", "host_valid_bytes", "lock", "readers", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.host: HostBlock | None = None
        self.host_valid_bytes = 0
        self.disk: DiskBlock | None = None
        self.disk_valid_bytes = 0
        self.readers = 0
        self.lock = threading.Lock()

    @property
    def stored_bytes(self) -> int:
        """How much of it survives without the device."""
        return max(self.host_valid_bytes, self.disk_valid_bytes)


def host_held_bytes(stored: Iterable[Stored]) -> int:
    """What they take of the host's budget, one by one."""
    return sum(host.held_bytes for each in stored if (host := each.host) is not None)


class Block(Stored):
    """A piece of one layer's span.

    Attributes:
        device: its physical memory, None while it is off the device.
        holders: the tables that refer to it.
        places: the holdings in whose region it is mapped.
        copying_bytes: how far a write-back under way reads, 0 when there is none.
        behind_bytes: how far a pass has written it to the host behind itself, 0 when that counts already, or never.
        epoch: grows when something of that is about to be overwritten, so that copies under way do not count.
        ready: the event after which what was last brought in is there.
        loading: a bring-in of it is planned or under way.
    """

    __slots__ = (
        "behind_bytes",
        "copying_bytes",
        "device",
        "epoch",
        "holders",
        "index",
        "layer",
        "loading",
        "offset",
        "places",
        "ready",
    )

    def __init__(self, layout: Layout, layer: int, index: int) -> None:
        super().__init__(layout.size_of(index))
        self.layer = layer
        self.index = index
        self.offset = layout.offset_of(layer, index)
        self.device: Extent | None = None
        self.holders: set[BlockTable] = set()
        self.places: set[Holding] = set()
        self.copying_bytes = 0
        self.behind_bytes = 0
        self.epoch = 0
        self.ready = None
        self.loading = False

    def end_bytes(self) -> int:
        """The furthest that any holder can see."""
        return max([table.end_bytes(self) for table in tuple(self.holders)], default=0)

    def forget_past(self, end_bytes: int) -> None:
        """What lies past `end_bytes` will be overwritten: no copy of it is right any more."""
        self.host_valid_bytes = min(self.host_valid_bytes, end_bytes)
        self.disk_valid_bytes = min(self.disk_valid_bytes, end_bytes)
        if max(self.copying_bytes, self.behind_bytes) > end_bytes:
            self.epoch += 1


class BlockTable:
    """One lineage: how many tokens each layer holds, and in which blocks.

    Attributes:
        lengths: tokens per layer; they grow only when a pass has ended.
        claimed: the length that a pass under way will reach, 0 between passes.
        writable_until: tokens that may be appended without asking anyone; 0 when that has to be looked up again.
    """

    __slots__ = ("blocks", "claimed", "layout", "lengths", "writable_until")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lengths = [0] * layout.layers
        self.blocks: list[list[Block]] = [[] for _ in range(layout.layers)]
        self.claimed = 0
        self.writable_until = 0

    def __iter__(self) -> Iterator[Block]:
        for row in self.blocks:
            yield from row

    def end_bytes(self, block: Block) -> int:
        return self.layout.end_bytes(block.index, self.lengths[block.layer])

    def reach_bytes(self, block: Block) -> int:
        """The same, with what a pass under way may write."""
        return self.layout.end_bytes(block.index, max(self.lengths[block.layer], self.claimed))

    def hold(self, layer: int, index: int, block: Block) -> Block | None:
        """Put `block` at its place; returns the one that it replaces."""
        row = self.blocks[layer]
        block.holders.add(self)
        if index == len(row):
            row.append(block)
            return None
        old, row[index] = row[index], block
        old.holders.discard(self)
        return old

    def assign(self, lengths: Sequence[int], blocks: Sequence[Sequence[Block]]) -> list[Block]:
        """Become another lineage; returns the blocks that this one no longer refers to."""
        old = set(self)
        self.lengths = list(lengths)
        self.blocks = [list(row[: self.layout.count(n)]) for row, n in zip(blocks, lengths, strict=True)]
        self.claimed = self.writable_until = 0
        new = set(self)
        for block in new - old:
            block.holders.add(self)
        for block in old - new:
            block.holders.discard(self)
        return list(old - new)

    def clear(self) -> list[Block]:
        """Refer to nothing any more; returns what it has referred to."""
        return self.assign([0] * self.layout.layers, [[] for _ in range(self.layout.layers)])

    def copy(self) -> BlockTable:
        """Another lineage with the same past."""
        twin = BlockTable(self.layout)
        twin.assign(self.lengths, self.blocks)
        self.writable_until = 0
        return twin


def pieces(blocks: Iterable[Block], limit_bytes: int) -> Iterator[list[Block]]:
    """Neighbours together, `limit_bytes` at most, or one block."""
    piece: list[Block] = []
    size_bytes = 0
    for block in sorted(blocks, key=lambda block: block.offset):
        if piece and size_bytes + block.size_bytes > limit_bytes:
            yield piece
            piece, size_bytes = [], 0
        piece.append(block)
        size_bytes += block.size_bytes
    if piece:
        yield piece
