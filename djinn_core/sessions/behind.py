"""Writing behind: a prefill that is going to stop copies each layer's KV to the host while the next ones compute.

Who sets a breakpoint is about to leave. A prefill computes for longer on a layer than the link takes for its KV, so at
the stop nearly all of it is on the host, and a pause only unmaps. Only blocks that the host has nothing of take part.

Invariant: until the pass has ended and someone `settle`s, the copies are this object's alone, in host memory that no
block knows of. So nobody waits for a pass that writes behind itself, and a pass that fails leaves nothing. Memory is
unmapped only after `settle`, like after any other transfer, and a host that is full takes these copies back first.

Not taken: claiming the blocks, as a write-back does. Whoever waits for a claim would wait for a pass, and could be the
one that the pass waits for. Nor doing so in every pass: most do not stop, and over one token there is nothing to gain.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from djinn_core.device.base import Direction, Event, Stream
from djinn_core.errors import DeviceError, DjinnError
from djinn_core.sessions.blocks import Block

if TYPE_CHECKING:
    from djinn_core.memory.hosttier import HostBlock
    from djinn_core.sessions.holding import Holding
    from djinn_core.sessions.room import Room


@dataclass(eq=False)
class Copy:
    """The first `end` bytes of a block on their way to `host`; `event` is behind them, None if they were not issued."""

    block: Block
    host: HostBlock
    end: int
    epoch: int
    event: Event | None = None


class Behind:
    """The copies behind one pass of `holding` over `new` tokens.

    The pass's thread calls `layer` and `end`, anyone the rest. Nothing here fails the pass: what could not be written
    behind is written at the pause.
    """

    def __init__(self, room: Room, holding: Holding, new: int) -> None:
        self._room = room
        self._holding = holding
        self._new = new
        self._stream = room.d2h_behind
        self._issuing = threading.Lock()  # guards the two below; taken before the room's
        self._going = True
        self._copies: list[Copy] = []
        self._over = self._counts = False

    def layer(self, layer: int, compute: Stream) -> None:
        """`layer` has been issued on `compute`: issue the copies of what it wrote behind it."""
        with self._issuing:
            if not self._going:
                return
            try:
                self._copy(layer, compute)
            except DjinnError as error:
                self._going = False
                self._room.log(self._holding, f"not written behind ({error})")

    def _copy(self, layer: int, compute: Stream) -> None:
        new = self._claim(layer)
        if not new:
            return
        memory, device = self._holding.region.tensor, self._room.device
        written, event = device.event(), device.event(blocking=True)
        written.record(compute)
        self._stream.wait_event(written)
        pairs = [(c.host.tensor[: c.end], memory[c.block.offset : c.block.offset + c.end]) for c in new]
        with self._room.tiers.host.issuing():
            device.copy_all(pairs, self._stream, Direction.D2H, done=event)
        for copy in new:
            copy.event = event

    def _claim(self, layer: int) -> list[Copy]:
        """Blocks of `layer` that the host has nothing of, with room for them that is at hand."""
        holding, table, first = self._holding, self._holding.table, len(self._copies)
        with self._room.lock:
            for block in table.blocks[layer]:
                end = table.layout.end_bytes(block.index, table.lengths[layer] + self._new)
                if not end or block.host or block.disk or block.behind_bytes or block.copying_bytes:
                    continue
                host = self._room.tiers.host.take_ready(block.size_bytes, holding.id)
                if host is not None and not host.pinned:  # a slab that came since the pass began
                    host.free()
                    host = None
                if host is None:
                    self._going = False
                    break
                self._copies.append(Copy(block, host, end, block.epoch))
                block.behind_bytes = end
        return self._copies[first:]

    def end(self, *, done: bool) -> None:
        """The pass has ended; its bytes count if it is `done`. What a later pass says does not matter."""
        if not self._over:
            self._counts, self._over = done, True

    @property
    def host_bytes(self) -> int:
        """Host memory that no block knows of yet. The room's lock is held."""
        return sum(copy.block.size_bytes for copy in self._copies)

    @property
    def idle(self) -> bool:
        """The pass has ended, and so have the copies."""
        try:
            return self._over and all(copy.event is None or copy.event.query() for copy in self._copies)
        except DeviceError:  # it failed, which is an end too
            return True

    def settle(self) -> None:
        """Return when no copy reads the device any more; after the pass what has come counts, once."""
        over = None
        while over is not self._over:  # it may end meanwhile, with more copies
            over = self._over
            lost = self._wait()
        if over:
            self._let_go(lost)

    def give_up(self) -> bool:
        """The host is full: begin no more copies, and give back what does not count yet. False if there was none."""
        with self._issuing:
            self._going = False
        some = bool(self._copies)
        self._let_go(self._wait())
        return some

    def _wait(self) -> set[Copy]:
        """Wait for the copies; those that failed."""
        with self._issuing:
            copies, lost = list(self._copies), set()
        for copy in copies:
            try:
                if copy.event is None:
                    self._room.device.drain(self._stream)
                else:
                    copy.event.synchronize()
            except DeviceError as error:
                lost.add(copy)
                self._room.log(self._holding, f"not written behind ({error})")
        return lost | {copy for copy in copies if copy.event is None}

    def _let_go(self, lost: set[Copy]) -> None:
        """Give each copy to its block, or its host memory back."""
        counted = 0
        with self._issuing, self._room.lock:
            while self._copies:  # one by one: who is interrupted leaves the rest to the next
                copy = self._copies[-1]
                block = copy.block
                block.behind_bytes = 0
                right = self._counts and copy not in lost and block.epoch == copy.epoch
                with block.lock:
                    if right and block.holders and not (block.host or block.disk or block.copying_bytes):
                        block.host, block.host_valid_bytes = copy.host, copy.end
                        counted += copy.end
                self._copies.pop()
                if block.host is not copy.host:
                    copy.host.free()
            if self._over and self._holding.behind is self:
                self._holding.behind = None
            self._room.lock.notify_all()
        if counted:
            self._room.log(self._holding, "written behind", counted)


def write_behind(room: Room, holding: Holding, new: int) -> Behind | None:
    """For a pass over `new` tokens that is going to stop; None when it had better not write behind itself."""
    earlier = holding.behind
    if earlier is not None and earlier.idle:
        earlier.settle()
    if new == 1 or holding.behind is not None or not room.tiers.host.pinned:  # pageable copies would hold up the pass
        return None
    holding.behind = Behind(room, holding, new)
    return holding.behind
