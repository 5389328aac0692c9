"""Write-back: what is new on the device goes to the pinned host, in contiguous pieces, on a stream of its own.

Invariant: a block's host copy counts (`host_valid_bytes`) only when the copy's event is complete and nothing of what it
read was overwritten meanwhile. KV only grows, so a second pause writes only what is new. All copies are issued at once,
since gaps between copies are the whole loss; then they are taken in group by group, and whoever gives his memory up
unmaps each group while the later ones are still on their way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from djinn_core.device.base import Direction, Event
from djinn_core.errors import CapacityError, DjinnError
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding

if TYPE_CHECKING:
    from djinn_core.sessions.room import Room

GROUP_BYTES = 96 << 20  # one call and one event, at least: three layers of a long session, or all of a short one


class Copy(NamedTuple):
    """What is new of one block."""

    block: Block
    begin: int
    end: int
    epoch: int


Group = tuple[list[Copy], Event]


def write_back(
    room: Room,
    holding: Holding,
    blocks: Iterable[Block],
    *,
    optional: bool = False,
    part: Callable[[list[Block]], None] | None = None,
) -> int:
    """Make the host copies of `blocks`, mapped in `holding`, whole; returns the bytes copied. Blocks the caller.

    Bytes that a pass under way writes are not waited for: they are beyond every holder's end.

    Args:
        optional: nobody needs it now, so it does not take room on the host from other sessions on the device.
        part: called with the blocks of each group as soon as they are whole on the host.

    Raises:
        CapacityError: the host has no room for all of them; those that had room are written back.
        TransferError: a copy failed, or could not be issued; what was taken in before it counts, and the rest can be
            tried again.
    """
    begun_s = time.perf_counter()
    if (behind := holding.behind) is not None:
        behind.settle()
    _wait_idle(room, holding)
    todo: list[Copy] = []
    groups: list[Group] = []
    full: CapacityError | None = None
    copied = 0
    try:
        _claim(room, holding, blocks, todo)
        if todo:
            begun = room.device.event(timing=True)
            _wait_for_bytes(room, todo)
            with room.lock:
                room.write_backs += 1
            try:
                full = _issue(room, holding, todo, groups, optional, begun)
                for group in groups:
                    copied += _take_in(room, group)
                    if part is not None:
                        part([copy.block for copy in group[0]])
            except BaseException:
                with contextlib.suppress(DjinnError):  # the failure is being raised; no copy reads any more
                    room.device.drain(room.d2h)
                raise
            finally:
                with room.lock:
                    room.write_backs -= 1
    finally:
        with room.lock:
            holding.draining = False
            for copy in todo:
                copy.block.copying_bytes = 0
            room.lock.notify_all()
    if copied:
        room.log(holding, "swap_out", copied, time.perf_counter() - begun_s, (begun, groups[-1][1]))
    if full is not None:
        raise full
    return copied


def _wait_idle(room: Room, holding: Holding) -> None:
    """One write-back per session at a time, and none while its memory is being unmapped."""
    with room.lock:
        room.lock.wait_for(lambda: not holding.draining and not holding.moving)
        holding.draining = True


def _claim(room: Room, holding: Holding, blocks: Iterable[Block], todo: list[Copy]) -> None:
    with room.lock:
        wanted = list(blocks)
        with room.tiers.seeking(holding):  # a sibling's write-back, which may wait for room
            room.lock.wait_for(lambda: not any(block.copying_bytes for block in wanted))
        for block in wanted:
            end = block.end_bytes()
            if holding in block.places and block.host_valid_bytes < end:  # it may have left this region meanwhile
                block.copying_bytes = end
                todo.append(Copy(block, block.host_valid_bytes, end, block.epoch))


def _wait_for_bytes(room: Room, todo: list[Copy]) -> None:
    """The stream goes on when what will be read is there."""
    for event in {place.pass_done for copy in todo for place in copy.block.places}:
        room.d2h.wait_event(event)
    for event in {copy.block.ready for copy in todo if copy.block.ready is not None}:
        room.d2h.wait_event(event)


def _issue(
    room: Room, holding: Holding, todo: list[Copy], groups: list[Group], optional: bool, begun: Event
) -> CapacityError | None:
    """Issue what the host has room for, `begun` before and an event behind each group; why it was not all."""
    memory = holding.region.tensor
    copies: list[Copy] = []
    size_bytes, full = 0, None
    for copy in todo:
        block, begin, end, _ = copy
        try:
            if block.host is None:
                block.host = room.tiers.allocate(block.size_bytes, holding.id, optional=optional)
        except CapacityError as error:
            full = error
            break
        copies.append(copy)
        size_bytes += end - begin
        if size_bytes >= GROUP_BYTES:
            _issue_group(room, memory, groups, copies, begun)
            copies, size_bytes = [], 0
    if copies:
        _issue_group(room, memory, groups, copies, begun)
    return full


def _issue_group(room: Room, memory: torch.Tensor, groups: list[Group], copies: list[Copy], begun: Event) -> None:
    """All copies of a group in one call, and the event behind them; `begun` before the first group."""
    pairs = [
        (block.host.tensor[begin:end], memory[block.offset + begin : block.offset + end])
        for block, begin, end, _ in copies
    ]
    event = room.device.event(timing=True, blocking=True)
    with room.tiers.host.issuing():
        room.device.copy_all(pairs, room.d2h, Direction.D2H, begun=None if groups else begun, done=event)
    groups.append((copies, event))


def _take_in(room: Room, group: Group) -> int:
    """Wait for one group, and count it; returns its bytes. Its blocks stay claimed to the end of the write-back."""
    copies, event = group
    event.synchronize()
    copied = 0
    with room.lock:
        for block, begin, end, epoch in copies:
            if block.epoch == epoch:
                block.host_valid_bytes = end
            copied += end - begin
    return copied
