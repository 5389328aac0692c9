"""Writing behind: a prefill that is going to stop copies each layer's KV to the host while the next ones compute.

Who sets a breakpoint is about to leave. A prefill computes longer on a layer than the link takes for its KV, so at
the stop nearly all of it is on the host, and a pause only unmaps. If the session goes on instead, the copies are kept
as any other, and are the first that the host drops when it needs room.

Invariant: until the pass has ended, nothing of this counts; then it does as in `writeback`. Between the first copy and
`finish` the session is `draining`, so its memory is not unmapped; whoever waits for that calls `finish` first, since
the writer's thread may be the one that waits.

Not taken: doing so in every pass. A pass over one token has 20 KB a layer to write and no time to issue copies in.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from djinn_core.device.base import Stream
from djinn_core.errors import DeviceError, DjinnError
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.writeback import Copy, Group, issue_group, take_in

if TYPE_CHECKING:
    from djinn_core.sessions.room import Room


class Behind:
    """The copies behind one pass over `new` tokens. Only the pass's thread calls `layer` and `end`.

    Nothing here fails the pass: what could not be written behind is written at the pause.

    Attributes:
        over: the pass has ended, so that `finish` has something to wait for.
    """

    def __init__(self, room: Room, holding: Holding, new: int) -> None:
        self._room = room
        self._holding = holding
        self._new = new
        self._groups: list[Group] = []
        self._going = True
        self._counts = False
        self.over = False

    def layer(self, layer: int, compute: Stream) -> None:
        """`layer` has been issued on `compute`: issue the copies of what it wrote behind it."""
        if not self._going:
            return
        room, todo = self._room, self._claim(layer)
        if not todo:
            return
        try:
            written = room.device.event()
            written.record(compute)
            room.d2h.wait_event(written)
            self._groups.append(issue_group(room, self._holding.region.tensor, todo))
        except BaseException as error:
            self._going = False
            with contextlib.suppress(DeviceError):  # the same failure; no copy reads any more
                room.d2h.synchronize()
            self._let_go(todo)
            if not isinstance(error, DjinnError):
                raise
            room.log(self._holding, f"not written behind ({error})")

    def _claim(self, layer: int) -> list[Copy]:
        """What is new in `layer`, where nobody else is at it and the host has room at hand."""
        holding, table, todo = self._holding, self._holding.table, []
        with self._room.lock:
            if holding.draining and holding.behind is not self:  # an earlier write-back is still under way
                self._going = False
                return todo
            length = table.lengths[layer] + self._new
            for block in table.blocks[layer]:
                end = table.layout.end_bytes(block.index, length)
                if block.host_valid_bytes >= end or block.copying_bytes:
                    continue
                if block.host is None:
                    block.host = self._room.tiers.host.take_ready(block.size_bytes, holding.id)
                if block.host is None:
                    self._going = False
                    break
                block.copying_bytes = end
                todo.append(Copy(block, block.host_valid_bytes, end, block.epoch))
            if todo:
                holding.draining, holding.behind = True, self
        return todo

    def end(self, *, done: bool) -> None:
        """The pass is over; its bytes count when it is `done`. Then `finish`."""
        with self._room.lock:
            self._counts, self.over = done, True
            self._room.lock.notify_all()

    def finish(self) -> None:
        """Wait for the copies, and count them; by whoever comes first. Nothing while the pass is under way."""
        room, holding = self._room, self._holding
        room.device.bind_thread()
        with room.lock:
            if not self.over or holding.behind is not self:
                return
            holding.behind = None
        copied = 0
        try:
            for group in self._groups:
                copied += self._wait_for(group)
        finally:
            self._let_go([copy for copies, _ in self._groups for copy in copies], last=True)
        if copied:
            room.log(holding, "written behind", copied)

    def _wait_for(self, group: Group) -> int:
        """Wait until its copies have ended; the bytes of it that count."""
        try:
            if self._counts:
                return take_in(self._room, group)
            group[1].synchronize()
        except DeviceError as error:
            self._room.log(self._holding, f"not written behind ({error})")
        return 0

    def _let_go(self, copies: list[Copy], *, last: bool = False) -> None:
        with self._room.lock:
            for copy in copies:
                copy.block.copying_bytes = 0
            if last:
                self._holding.draining = False
            self._room.lock.notify_all()
