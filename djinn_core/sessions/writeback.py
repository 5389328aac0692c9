"""Write-back: what is new on the device goes to the pinned host, in contiguous pieces, on a stream of its own.

Invariant: a block's host copy counts (`host_valid_bytes`) only when the copy's event is complete and nothing of what it
read was overwritten meanwhile. KV only grows, so a second pause writes only what is new. Copies go out group by group,
so many at once that the link never idles, since gaps between copies are the whole loss, and no more: beside copies to
the host, a grant of device memory takes a millisecond for each extent, until they have come to an end. So the next
group waits for maps under way, and for who resumes and needs the interpreter and the driver. Groups are taken in as
they arrive, and whoever gives the memory up unmaps each while the later ones are still on their way.

Not taken: a word in host memory that copies on the device wait for, which lets a grant through sooner. A thread that
waits for the device with the driver's lock in hand would never see it change.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from djinn_core.device.base import Direction, Event
from djinn_core.errors import CapacityError, DjinnError
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding

if TYPE_CHECKING:
    from djinn_core.sessions.room import Room

GROUP_BYTES = 48 << 20  # one call and one event: a layer of a long session, or all of a short one
FLYING_BYTES = 2 * GROUP_BYTES  # behind the group under way: time for a thread to get the interpreter


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
        TransferError: a copy failed; what was copied before it counts, and the rest can be tried again.
    """
    begun_s = time.perf_counter()
    if (behind := holding.behind) is not None:
        behind.settle()
    _wait_idle(room, holding)
    todo: list[Copy] = []
    flying: deque[Group] = deque()
    full: CapacityError | None = None
    copied = 0
    with room.lock:
        room.write_backs += 1
    try:
        _claim(room, holding, blocks, todo)
        if todo:
            begun, done = (room.device.event(timing=True, blocking=True) for _ in range(2))
            _wait_for_bytes(room, todo)
            try:
                try:
                    for group in _issue(room, holding, todo, optional, begun):
                        flying.append(group)
                        while sum(map(_size_bytes, flying)) > FLYING_BYTES + _size_bytes(flying[0]):
                            copied += _take_in(room, flying.popleft(), part)
                except CapacityError as error:
                    full = error
                finally:
                    done.record(room.d2h)
                while flying:
                    copied += _take_in(room, flying.popleft(), part)
            finally:
                with contextlib.suppress(DjinnError):  # the failure is being raised; no copy reads any more
                    done.synchronize()
    finally:
        with room.lock:
            room.write_backs -= 1
            holding.draining = False
            for copy in todo:
                copy.block.copying_bytes = 0
            room.lock.notify_all()
    if copied:
        room.log(holding, "swap_out", copied, time.perf_counter() - begun_s, (begun, done))
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


def _issue(room: Room, holding: Holding, todo: list[Copy], optional: bool, begun: Event) -> Iterator[Group]:
    """Issue group by group, `begun` before the first one.

    Raises:
        CapacityError: the host has no room for the next one; those before it have been issued.
    """
    copies: list[Copy] = []
    full, first, until_s = None, True, room.way.until_s()
    for copy in todo:
        block = copy.block
        try:
            if block.host is None:
                block.host = room.tiers.allocate(block.size_bytes, holding.id, optional=optional)
        except CapacityError as error:
            full = error
            break
        if copies and sum(map(_new_bytes, copies)) + _new_bytes(copy) > GROUP_BYTES:
            yield _issue_group(room, holding, copies, begun if first else None)
            copies, first = [], False
            room.way.give(until_s)
            room.maps.give()
        copies.append(copy)
    if copies:
        yield _issue_group(room, holding, copies, begun if first else None)
    if full is not None:
        raise full


def _issue_group(room: Room, holding: Holding, copies: list[Copy], begun: Event | None) -> Group:
    """All copies of a group in one call, and the event behind them."""
    memory = holding.region.tensor
    pairs = [
        (block.host.tensor[begin:end], memory[block.offset + begin : block.offset + end])
        for block, begin, end, _ in copies
    ]
    room.device.copy_all(pairs, room.d2h, Direction.D2H, begun=begun)
    event = room.device.event(blocking=True)
    event.record(room.d2h)
    return copies, event


def _new_bytes(copy: Copy) -> int:
    return copy.end - copy.begin


def _size_bytes(group: Group) -> int:
    return sum(map(_new_bytes, group[0]))


def _take_in(room: Room, group: Group, part: Callable[[list[Block]], None] | None) -> int:
    """Wait for one group, and count it; returns its bytes. Its blocks stay claimed to the end of the write-back."""
    copies, event = group
    event.synchronize()
    with room.lock:
        for block, _, end, epoch in copies:
            if block.epoch == epoch:
                block.host_valid_bytes = end
    if part is not None:
        part([copy.block for copy in copies])
    return _size_bytes(group)
