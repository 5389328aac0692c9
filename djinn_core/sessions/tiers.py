"""Below the device: pinned host memory, and disk under it.

Invariant: the host copy of anything is given up only after the disk copy that replaces it is complete with its checksum
(two phases), or while the device holds the same bytes in a running session. Room is made in this order: host copies
that a running session's device memory repeats cost nothing to drop; then sessions that are off the device go to disk,
the one expected last first. Nothing is dropped for good: when no room can be made, the caller gets the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from djinn_core.errors import OutOfDisk, OutOfHostMemory
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.hosttier import HostBlock, HostTier
from djinn_core.sessions.blocks import Block, Stored
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.state import SessionState

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager


class Tiers:
    """Host and disk of one runtime, and what moves between them."""

    def __init__(self, pager: Pager, host: HostTier, disk: DiskTier | None) -> None:
        self._pager = pager
        self.host = host
        self.disk = disk

    @property
    def disk_free_bytes(self) -> int:
        return self.disk.free_bytes if self.disk else 0

    def allocate(self, size_bytes: int, owner: str) -> HostBlock:
        """Pinned host memory, after making room for it if need be.

        Raises:
            OutOfHostMemory: the host is full, and so is the disk or there is none; nothing changed.
            PinningRefused: the operating system would not pin more; nothing changed.
        """
        while True:
            try:
                return self.host.allocate(size_bytes, owner)
            except OutOfHostMemory as error:
                try:
                    made = self._make_room(size_bytes)
                except OutOfDisk as full:
                    raise OutOfHostMemory(
                        f"session {owner}: the host is full, and nothing more can be spilled to disk: {full}",
                        needed_bytes=size_bytes,
                        free_bytes=error.free_bytes,
                    ) from full
                if not made:
                    raise

    def fetch(self, stored: Stored, owner: str) -> None:
        """Bring what is only on disk back to the host.

        Raises:
            IntegrityError: the disk returned other bytes than were written; they are lost.
            CapacityError: no room on the host; the disk copy is as it was.
        """
        if stored.disk is None or stored.host_valid_bytes >= stored.disk_valid_bytes:
            return
        block = self.allocate(stored.size_bytes, owner)
        begun_s = time.perf_counter()
        try:
            self.disk.read(stored.disk, block.tensor[: stored.disk.size_bytes])
        except BaseException:
            block.free()
            raise
        with self._pager.lock, stored.lock:
            old, stored.host = stored.host, block
            stored.host_valid_bytes = stored.disk_valid_bytes
            self._drop_disk(stored)
        if old is not None:
            old.free()
        self._pager.log_id(owner, "disk_read", stored.host_valid_bytes, time.perf_counter() - begun_s)

    def discard(self, stored: Stored) -> None:
        """Nobody refers to it any more. Its device memory, if any, is the pager's to take. The lock is held."""
        with stored.lock:
            if stored.host is not None:
                stored.host.free()
                stored.host = None
            self._drop_disk(stored)
            stored.host_valid_bytes = 0

    def _drop_disk(self, stored: Stored) -> None:
        if stored.disk is not None:
            self.disk.free(stored.disk)
            stored.disk = None
            stored.disk_valid_bytes = 0

    # making room on the host

    def _make_room(self, size_bytes: int) -> bool:
        """Free about `size_bytes` of the host; False when nothing can be freed."""
        freed = 0
        for block in self._repeated():
            freed += self._drop_repeated(block)
            if freed >= size_bytes:
                return True
        for holding in self._away():
            for stored in self._stored_of(holding):
                freed += self._spill(holding, stored)
                if freed >= size_bytes:
                    return True
        return freed > 0

    def _repeated(self) -> list[Block]:
        """Blocks of running sessions whose host copies repeat what the device holds."""
        with self._pager.lock:
            return [
                block
                for holding in self._pager.holdings.values()
                if holding.state is SessionState.RUNNING
                for block in holding.mapped.values()
                if block.host is not None
            ]

    def _drop_repeated(self, block: Block) -> int:
        with self._pager.lock, block.lock:
            running = any(place.state is SessionState.RUNNING for place in block.places)
            busy = block.loading or block.copying_bytes or block.readers
            if not running or busy or block.host is None or (block.ready is not None and not block.ready.query()):
                return 0
            block.host.free()
            block.host = None
            block.host_valid_bytes = 0
            return block.size_bytes

    def _away(self) -> list[Holding]:
        """Sessions off the device, the one expected last first."""
        now_s = time.monotonic()
        with self._pager.lock:
            away = [h for h in self._pager.holdings.values() if h.state is SessionState.SWAPPED and not h.jobs]
        return sorted(away, key=lambda h: h.expected_resume_s or 2 * now_s - h.last_use_s, reverse=True)

    def _stored_of(self, holding: Holding) -> Iterator[Stored]:
        with self._pager.lock:
            blocks = list(holding.table)
            for checkpoint in holding.checkpoints:
                blocks += list(checkpoint.table)
            boundaries: list[Stored] = [c.boundary for c in holding.checkpoints if c.boundary is not None]
        yield from dict.fromkeys([*blocks, *boundaries])

    def _spill(self, holding: Holding, stored: Stored) -> int:
        """Write one host copy to disk, then give the host's up; returns the bytes freed on the host."""
        with self._pager.lock, stored.lock:
            host, size_bytes = stored.host, stored.host_valid_bytes
            if host is None or not size_bytes or not self._idle(stored):
                return 0
            stored.readers += 1
        begun_s = time.perf_counter()
        written = None
        try:
            if self.disk is None:
                raise OutOfDisk("there is no disk tier (disk_path)", needed_bytes=size_bytes, free_bytes=0)
            written = self.disk.write(host.tensor[:size_bytes])
        finally:
            with self._pager.lock, stored.lock:
                stored.readers -= 1
                alone = not stored.readers and self._idle(stored)
                if written is not None and alone and stored.host is host and stored.host_valid_bytes == size_bytes:
                    self._drop_disk(stored)
                    stored.disk, stored.disk_valid_bytes = written, size_bytes
                    stored.host, stored.host_valid_bytes = None, 0
                    written, freed = None, stored.size_bytes
                else:
                    freed = 0
            if written is not None:
                self.disk.free(written)
        if freed:
            host.free()
            self._pager.log(holding, "disk_write", size_bytes, time.perf_counter() - begun_s)
        return freed

    def _idle(self, stored: Stored) -> bool:
        """No transfer reads it, and no session on the device relies on it. The locks are held."""
        if isinstance(stored, Block):
            return not (stored.places or stored.loading or stored.copying_bytes)
        return not stored.readers and stored.settled
