"""Lineages: who refers to which blocks, when sessions go back, branch and end.

Invariant: before a block leaves its last place on the device, the host has all that any holder can see. What nobody
holds any more is given up at once, in every tier.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

from djinn_core.errors import DeviceError
from djinn_core.sessions.admission import admit
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.checkpoint import Boundary, Checkpoint
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.room import Room
from djinn_core.sessions.state import SessionState, transition
from djinn_core.sessions.writeback import write_back


class Lineages(Room):
    """Going back, branching and closing."""

    def close_session(self, holding: Holding) -> None:
        """Give up everything that only this session holds. Waits for its transfers to end."""
        with holding.changed(self.lock):
            self._close(holding)
        holding.region.close()
        self.log(holding, "close")

    def _close(self, holding: Holding) -> None:
        with self.lock:
            transition(holding.id, holding.state, SessionState.CLOSED, "be closed")
            self.lock.wait_for(lambda: not (holding.draining or holding.moving or holding.pins))
            holding.moving = True
        try:  # whatever fails, it can be closed again
            self._take_all(holding)
            for checkpoint in list(holding.checkpoints):
                self.drop_checkpoint(holding, checkpoint)
            with self.lock:
                holding.orphans += holding.table.clear()
            self.tiers.discard_orphans(holding)
            with self.lock:
                del self.holdings[holding.id]
                holding.go(SessionState.CLOSED, "be closed")
        finally:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()

    def _take_all(self, holding: Holding) -> None:
        """Unmap all that a closing session has mapped, after saving what others still want of it."""
        if (behind := holding.behind) is not None:
            behind.end(done=False)
        self._settle_device(holding)
        try:
            holding.done_reading()
        except DeviceError as error:
            self.log(holding, f"lost copy ({error})")
        with self.leaving(holding):
            with self.lock:
                shared = [b for b in holding.mapped.values() if self._wanted_by_others(holding, b)]
            if shared:
                write_back_of_closing(self, holding, shared)
            self._unmap(holding, list(holding.mapped.values()))
            self.sweep(holding)

    def _wanted_by_others(self, holding: Holding, block: Block) -> bool:
        if self.ending:
            return False
        own = {id(holding.table), *(id(c.table) for c in holding.checkpoints)}
        return any(id(table) not in own for table in block.holders) and holding.dirty(block)

    def adopt(self, holding: Holding, checkpoint: Checkpoint) -> None:
        """The lineage becomes the checkpoint's. Blocks that only others still want are written back and unmapped."""
        with holding.changed(self.lock):
            self._adopt(holding, checkpoint)
        if checkpoint.boundary is None:  # else the pass that goes on from there is waiting to be issued
            self.tiers.discard_orphans(holding)

    def _adopt(self, holding: Holding, checkpoint: Checkpoint) -> None:
        with self.lock:
            self.wait_unmoved(holding)
            keep = {
                block
                for row, n in zip(checkpoint.table.blocks, checkpoint.table.lengths, strict=True)
                for block in row[: holding.layout.count(n)]
            }
            leaving = [block for block in holding.mapped.values() if block not in keep]
        if leaving:
            self.way.leave()
            self.displace(holding, leaving)
        with self.lock:
            holding.orphans += holding.table.assign(checkpoint.table.lengths, checkpoint.table.blocks)
            holding.forget_bytes()
            self.lock.notify_all()

    def displace(self, holding: Holding, blocks: list[Block]) -> None:
        """Unmap `blocks` here; before the last place of one goes, the host has all that its holders can see."""
        try:
            self._displace(holding, blocks)
        finally:
            with self.lock:
                holding.displacing = False
                self.lock.notify_all()

    def _displace(self, holding: Holding, blocks: list[Block]) -> None:
        with self.leaving(holding):
            with self.lock:
                own = holding.table
                kept = [b for b in blocks if holding.last_place(b) and any(table is not own for table in b.holders)]
            if kept:
                write_back(self, holding, kept)
            self._unmap_alone(holding, blocks)

    def fork(self, holding: Holding) -> Holding:
        """Another session with the same past and checkpoints: it shares every block, and has none mapped yet.

        Raises:
            OutOfDeviceMemory: the tiers could not hold both at their longest.
        """
        with self.lock:
            admit(holding.layout, self.holdings.values(), self.pool, self.tiers)
            twin = Holding(self.device, holding.layout)
            twin.table = holding.table.copy()
            holding.shares = twin.shares = True
            twin.go(SessionState.PAUSED, "be forked")
            twin.go(SessionState.SWAPPED, "be forked")
            self.holdings[twin.id] = twin
        with ExitStack() as undo:
            undo.callback(self.close_session, twin)
            for point in holding.checkpoints:
                with self.lock:
                    own = replace(point, table=point.table.copy())
                self.add_checkpoint(twin, own)
            self.tiers.expect_sessions()
            undo.pop_all()
        self.log(twin, f"fork of {holding.id}")
        return twin

    def add_checkpoint(self, holding: Holding, checkpoint: Checkpoint) -> None:
        with self.lock:
            holding.checkpoints.append(checkpoint)
            if checkpoint.boundary is not None:
                checkpoint.boundary.refs += 1

    def drop_checkpoint(self, holding: Holding, checkpoint: Checkpoint) -> None:
        """Give up what only this checkpoint refers to."""
        with self.lock:
            holding.checkpoints.remove(checkpoint)
            holding.orphans += checkpoint.table.clear()  # mapped ones belong to a table; these are off the device
            boundary = checkpoint.boundary
            if boundary is not None:
                boundary.refs -= 1
        try:
            if boundary is not None and not boundary.refs:
                self.discard_boundary(boundary)
        finally:
            self.tiers.discard_orphans(holding)

    def discard_boundary(self, boundary: Boundary) -> None:
        if boundary.written is not None:
            try:
                boundary.written.synchronize()
            except DeviceError as error:
                self.log_id("-", f"lost copy ({error})")
        boundary.device = None
        with self.lock:
            self.tiers.discard(boundary)


def write_back_of_closing(room: Room, holding: Holding, blocks: Iterable[Block]) -> None:
    """A closing session's last copies, for those who share its blocks."""
    with room.lock:
        holding.moving = False
        room.lock.notify_all()
    try:
        write_back(room, holding, blocks)
    finally:
        with room.lock:  # someone may be taking it off the device just now
            room.lock.wait_for(lambda: not (holding.moving or holding.draining or holding.pins))
            holding.moving = True
