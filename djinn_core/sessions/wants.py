"""What a bring-in has to map: of each layer, the blocks that a pass wants and that are not here yet.

Invariant: a block is written by one session at a time. Who appends to a tail that others hold too claims it, or gets a
copy of its own (copy on write). All methods want the pager's lock held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from djinn_core.memory.extents import Extent
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding


@dataclass(slots=True)
class Want:
    """One block to map. `source` is the shared block that it is a copy of, if any."""

    block: Block
    source: Block | None = None
    extent: Extent | None = None
    lender: Holding | None = None  # where a shared extent, or the source of a copy, is mapped now
    reading: bool = False  # the source is read from the host, which keeps it meanwhile


class Wants:
    """Of one session: the layers in the `order` in which a pass wants them, and how many tokens each must `reach`.

    More than a layer holds: the pass appends to it.
    """

    def __init__(self, holding: Holding, order: Sequence[int], reach: Sequence[int]) -> None:
        self._holding = holding
        self._order = order
        self._reach = reach

    def of(self, layer: int) -> list[Want]:
        """What is missing of one layer."""
        holding, layout, row = self._holding, self._holding.layout, self._holding.table.blocks[layer]
        tail = self._tail(layer)
        wants = []
        for index in range(layout.count(self._reach[layer])):
            if index >= len(row):
                wants.append(Want(Block(layout, layer, index)))
            elif index >= tail and self._others_past(row[index]):
                wants.append(Want(Block(layout, layer, index), source=row[index]))
            elif holding.mapped.get(row[index].offset) is not row[index]:
                wants.append(Want(row[index]))
        return wants

    def brought(self) -> bool:
        """Every block is there, or on its way, and none has to be copied before it is appended to."""
        table, layout = self._holding.table, self._holding.layout
        for layer in self._order:
            count = layout.count(self._reach[layer])
            brought = layout.count(table.lengths[layer])  # what a pass that failed had appended stays in the row
            if count > brought or any(map(self._others_past, table.blocks[layer][self._tail(layer) : count])):
                return False
        return True

    def claim_tails(self) -> None:
        """From here on this session is the one that appends to its own tails."""
        table = self._holding.table
        for layer in self._order:
            if self._reach[layer] > table.lengths[layer]:
                table.claimed = max(table.claimed, self._reach[layer])
            for block in table.blocks[layer][self._tail(layer) :]:
                if not self._others_past(block):
                    block.forget_past(table.end_bytes(block))
                    for other in block.holders:
                        if other is not table:
                            other.writable_until = 0

    def in_motion(self, block: Block) -> bool:
        """Another session is loading it, or taking it off the device."""
        return block.loading or any(p.moving or (p.displacing and p is not self._holding) for p in block.places)

    def lender(self, block: Block) -> Holding | None:
        """Another session that has it mapped."""
        return next((place for place in block.places if place is not self._holding), None)

    def replaces(self, want: Want) -> bool:
        """Its source is mapped here, and has to go before it is copied."""
        return want.source is not None and self._holding.mapped.get(want.source.offset) is want.source

    def on_disk(self, want: Want) -> bool:
        """It, or its source, has to be read from disk."""
        there = want.source or want.block
        return there.host_valid_bytes < there.disk_valid_bytes and self.lender(there) is None

    def _tail(self, layer: int) -> int:
        """The first block that the pass writes into; one behind the row's last if it appends nothing."""
        table, reach = self._holding.table, self._reach[layer]
        length = table.lengths[layer]
        return table.layout.tail(length) if reach > length else len(table.blocks[layer])

    def _others_past(self, block: Block) -> bool:
        """Someone else has, or is about to have, more in this block than this session: it must not be written."""
        mine, layer = self._holding.table, block.layer
        length = mine.lengths[layer]
        return any(
            (other.claimed > length or other.lengths[layer] > length)  # else it needs no arithmetic
            and other.reach_bytes(block) > mine.end_bytes(block)
            for other in block.holders
            if other is not mine
        )
