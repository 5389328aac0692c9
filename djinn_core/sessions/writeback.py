"""Write-back: what is new on the device goes to the pinned host, in contiguous pieces, on a stream of its own.

Invariant: a block's host copy counts (`host_valid_bytes`) only when the copy's event is complete and nothing of what it
read was overwritten meanwhile. KV only grows, so a second pause writes only what is new. All copies are issued, then
one event is waited for: gaps between copies are the whole loss.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from djinn_core.device.base import Direction, Event
from djinn_core.errors import DjinnError
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager


def write_back(pager: Pager, holding: Holding, blocks: Iterable[Block]) -> int:
    """Make the host copies of `blocks`, mapped in `holding`, whole; returns the bytes copied. Blocks the caller.

    Bytes that a pass under way writes are not waited for: they are beyond every holder's end.

    Raises:
        CapacityError: the host has no room for them; what was copied before counts.
        TransferError: a copy failed; nothing counts, and it can be tried again.
    """
    begun_s = time.perf_counter()
    _wait_idle(pager, holding)
    todo: list[tuple[Block, int, int, int]] = []
    try:
        _claim(pager, blocks, todo)
        for block, _, _, _ in todo:
            if block.host is None:
                block.host = pager.tiers.allocate(block.size_bytes, holding.id)
        copied, copies = _copy(pager, holding, todo)
    finally:
        with pager.lock:
            holding.draining = False
            for block, _, _, _ in todo:
                block.copying_bytes = 0
            pager.lock.notify_all()
    if copied:
        pager.log(holding, "swap_out", copied, time.perf_counter() - begun_s, copies)
    return copied


def _wait_idle(pager: Pager, holding: Holding) -> None:
    """One write-back per session at a time, and none while its memory is being unmapped."""
    with pager.lock:
        pager.lock.wait_for(lambda: not holding.draining and not holding.moving)
        holding.draining = True


def _claim(pager: Pager, blocks: Iterable[Block], todo: list[tuple[Block, int, int, int]]) -> None:
    with pager.lock:
        wanted = list(blocks)
        pager.lock.wait_for(lambda: not any(block.copying_bytes for block in wanted))  # a sibling's write-back
        for block in wanted:
            end = block.end_bytes()
            if block.places and block.host_valid_bytes < end:
                block.copying_bytes = end
                todo.append((block, block.host_valid_bytes, end, block.epoch))


def _copy(
    pager: Pager, holding: Holding, todo: list[tuple[Block, int, int, int]]
) -> tuple[int, tuple[Event, Event] | None]:
    """The bytes copied, and timing events around the copies."""
    if not todo:
        return 0, None
    stream, memory = pager.d2h, holding.region.tensor
    for event in {place.pass_done for block, _, _, _ in todo for place in block.places}:
        stream.wait_event(event)
    for event in {block.ready for block, _, _, _ in todo if block.ready is not None}:
        stream.wait_event(event)
    begun, done = pager.device.event(timing=True), pager.device.event(timing=True)
    begun.record(stream)
    try:
        for block, begin, end, _ in todo:
            source = memory[block.offset + begin : block.offset + end]
            pager.device.copy(block.host.tensor[begin:end], source, stream, Direction.D2H)
    finally:
        done.record(stream)
        failure = _outcome(done)
    if failure is not None:
        raise failure
    copied = 0
    with pager.lock:
        for block, begin, end, epoch in todo:
            if block.epoch == epoch:
                block.host_valid_bytes = end
            copied += end - begin
    return copied, (begun, done)


def _outcome(done: object) -> DjinnError | None:
    try:
        done.synchronize()
    except DjinnError as error:
        return error
    return None
