"""Below the device: pinned host memory, and disk under it.

Invariant: the host copy of anything is given up only after the disk copy that replaces it is complete with its checksum
(two phases), or while the device holds the same bytes and nobody is about to take them from there. Room is made in this
order: what passes have written behind themselves and nobody counts on yet; host copies that a running session's device
memory repeats, which cost nothing to drop, but a whole write-back when it pauses; then what is off the device goes to
disk: sessions, the one expected last first, and then what others have off it, as checkpoints. Who must have room (a
resume, an eviction) and still has none takes the host copies of paused sessions that are on the device, the one
expected soonest first: they are dirty again, and would be written back before they leave. A write-back that nobody
waits for does not go that far, or two of them could take the room from each other for ever; and it takes nobody's copy
while all sessions fit on the device, and one more would, or each pause would copy a whole session that nobody needs off
it. When no room can be made, the caller gets the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from djinn_core.errors import DeviceError, IntegrityError, OutOfDisk, OutOfHostMemory
from djinn_core.memory.disktier import DiskBlock, DiskTier
from djinn_core.memory.hosttier import HostBlock, HostTier
from djinn_core.sessions.blocks import Block, Stored
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.state import SessionState

if TYPE_CHECKING:
    from djinn_core.sessions.room import Room


PATIENCE_S = 5.0  # how long room is waited for while others' transfers are under way; they may wait for this one
POLL_S = 0.02  # copies end without telling anyone


class Tiers:
    """Host and disk of one runtime, and what moves between them."""

    def __init__(self, pager: Room, host: HostTier, disk: DiskTier | None) -> None:
        self._pager = pager
        self.host = host
        self.disk = disk
        self._fetching: set[Stored] = set()
        self._reading: list[str] = []  # whose reads are under way, with room on the host

    @property
    def disk_free_bytes(self) -> int:
        return self.disk.free_bytes if self.disk else 0

    def expect_sessions(self) -> None:
        """Pin ahead, in the background, what the open sessions may need. A pause never pins."""
        with self._pager.lock:
            size_bytes = sum(holding.layout.total_bytes for holding in self._pager.holdings.values())
        self.host.expect(size_bytes)

    def allocate(self, size_bytes: int, owner: str, *, optional: bool = False) -> HostBlock:
        """Pinned host memory, after making room for it if need be.

        Unless it is `optional`, others' clean copies are taken too, and transfers under way are waited for.

        Raises:
            OutOfHostMemory: the host is full, and so is the disk or there is none; nothing changed.
            PinningRefused: the operating system would not pin more; nothing changed.
        """
        give_up_s, last_look = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                return self.host.allocate(size_bytes, owner)
            except OutOfHostMemory as error:
                full = error
            if self._give_up_spare():
                continue
            disk_full = self._make_room(size_bytes, owner, optional)
            if disk_full is None:
                give_up_s = time.monotonic() + PATIENCE_S  # a slow disk does not count as waiting
                continue
            waited = not optional and self.wait_for_transfers(owner, give_up_s)
            if optional or (last_look and not waited):
                raise OutOfHostMemory(
                    f"session {owner}: the host is full, and nothing more can be spilled to disk ({disk_full}); close "
                    "a session, or raise host_bytes or disk_bytes, and try again",
                    needed_bytes=size_bytes,
                    free_bytes=full.free_bytes,
                ) from disk_full
            last_look = not waited  # a transfer may have ended between the looks at both

    def _give_up_spare(self) -> bool:
        """What nobody counts on goes first; False when there is nothing of it."""
        with self._pager.lock:
            holdings = list(self._pager.holdings.values())
        given_up = [self.discard_orphans(holding) for holding in holdings]
        given_up += [behind.give_up() for holding in holdings if (behind := holding.behind) is not None]
        return any(given_up)

    def fetch(self, stored: Stored, owner: str) -> None:
        """Bring what is only on disk back to the host.

        Raises:
            IntegrityError: the disk returned other bytes than were written; they are lost.
            CapacityError: no room on the host; the disk copy is as it was.
        """
        lock = self._pager.lock
        with lock:  # sessions that share it may want it at once
            lock.wait_for(lambda: stored not in self._fetching)
            if stored.disk is None or stored.host_valid_bytes >= stored.disk_valid_bytes:
                return
            self._fetching.add(stored)
        try:
            self._read_back(stored, owner)
        finally:
            with lock:
                self._fetching.discard(stored)
                lock.notify_all()

    def _read_back(self, stored: Stored, owner: str) -> None:
        block = self.allocate(stored.size_bytes, owner)
        begun_s = time.perf_counter()
        try:
            with self._read_under_way(owner):
                self.disk.read(stored.disk, block.tensor[: stored.disk.size_bytes])
        except IntegrityError as error:
            block.free()
            raise IntegrityError(f"session {owner} has lost a part of its state: {error}") from error
        except DeviceError as error:
            block.free()
            what = f"session {owner}: a part of its state could not be read back, and is on disk as before; try again"
            raise DeviceError(f"{what} ({error})") from error
        except BaseException:
            block.free()
            raise
        with self._pager.lock, stored.lock:
            old, stored.host = stored.host, block
            stored.host_valid_bytes = stored.disk_valid_bytes
            if old is not None:
                old.free()
            self._drop_disk(stored)
        self._pager.log_id(owner, "disk_read", stored.host_valid_bytes, time.perf_counter() - begun_s)

    @contextmanager
    def _read_under_way(self, owner: str) -> Iterator[None]:
        """Meanwhile who looks for room waits: what is read can be spilled again, or leave the device."""
        with self._pager.lock:
            self._reading.append(owner)
        try:
            yield
        finally:
            with self._pager.lock:
                self._reading.remove(owner)

    def discard_orphans(self, holding: Holding) -> bool:
        """Give up the blocks that going back has left without a holder; False when there were none."""
        with self._pager.lock:
            some = False
            while holding.orphans:
                block = holding.orphans[-1]
                if not block.holders:
                    self.discard(block)  # it may wait, and another thread give up the same meanwhile
                    some = True
                if block in holding.orphans:
                    holding.orphans.remove(block)
            if some:
                self._pager.lock.notify_all()
        return some

    def discard(self, stored: Stored) -> None:
        """Nobody refers to it any more. Its device memory, if any, is the pager's to take. The lock is held, but not
        while a transfer that reads it is waited for."""
        self._pager.lock.wait_for(lambda: not stored.readers)
        with stored.lock:
            host, stored.host, stored.host_valid_bytes = stored.host, None, 0
            if host is not None:
                host.free()
            self._drop_disk(stored)

    def _drop_disk(self, stored: Stored) -> None:
        """Forget the disk copy, whether or not the file system takes its room back."""
        block, stored.disk, stored.disk_valid_bytes = stored.disk, None, 0
        if block is not None:
            self._free_disk(block)

    def _free_disk(self, block: DiskBlock) -> None:
        try:
            self.disk.free(block)
        except DeviceError as error:  # it is forgotten all the same
            self._pager.log_id("-", f"a block stays on disk ({error})")

    # making room on the host

    def _make_room(self, size_bytes: int, owner: str, optional: bool) -> OutOfDisk | DeviceError | None:
        """Free about `size_bytes` of the host, or less; why not when nothing can be freed."""
        freed = 0
        reason: OutOfDisk | DeviceError = OutOfDisk(
            "no session is off the device", needed_bytes=size_bytes, free_bytes=self.disk_free_bytes
        )
        try:
            for freed_bytes in self._sources(owner, optional):
                freed += freed_bytes
                if freed >= size_bytes:
                    break
        except (OutOfDisk, DeviceError) as full:
            reason = full
            if not optional:
                for freed_bytes in self._repeated(SessionState.PAUSED):
                    freed += freed_bytes
                    if freed >= size_bytes:
                        break
        return None if freed else reason

    def _sources(self, owner: str, optional: bool) -> Iterator[int]:
        """Give up host copies one by one, in the order of the file's head; the bytes that each one freed."""
        if not optional or self._device_is_full(owner):
            yield from self._repeated(SessionState.RUNNING)
        for holding in self._away():
            for stored in self._stored_of(holding):
                yield self._spill(holding, stored)
        if not optional:
            yield from self._repeated(SessionState.PAUSED)

    def _repeated(self, state: SessionState) -> Iterator[int]:
        """Drop host copies that repeat what the device holds for sessions in `state`; the bytes that each one freed."""
        with self._pager.lock:
            here = [h for h in self._pager.holdings.values() if h.state is state and h.mapped]
            blocks = [
                block
                for holding in sorted(here, key=self._pager.pauses.expected_s)
                for block in holding.mapped.values()
                if block.host is not None
            ]
        for block in blocks:
            yield self._drop_repeated(block)

    def _drop_repeated(self, block: Block) -> int:
        with self._pager.lock, block.lock:
            if block.host is None or not self._stays_on_device(block):
                return 0
            block.host.free()
            block.host = None
            block.host_valid_bytes = 0
            for place in block.places:
                place.found_clean = False
            return block.size_bytes

    def _stays_on_device(self, block: Block) -> bool:
        """The device has all of it, no transfer is at it, and nobody relies on the host to take it away."""
        if block.loading or block.copying_bytes or block.readers or block.device is None:
            return False
        stay = (SessionState.RUNNING, SessionState.PAUSED)
        coming = any(not (job.done or job.by_pass) for h in block.places for job in h.jobs)
        if coming or not all(h.state in stay and not (h.moving or h.leaving or h.draining) for h in block.places):
            return False
        try:
            return block.ready is None or block.ready.query()
        except DeviceError:  # its bring-in failed: the host copy is the one that counts
            return False

    def wait_for_transfers(self, owner: str, give_up_s: float, of: Callable[[Holding], bool] = lambda _: True) -> bool:
        """Wait a moment for others' transfers, which may leave room behind; False when there are none, or no time.

        Who lends to another is free when that one's has ended.
        """
        with self._pager.lock, self.seeking(self._pager.holdings.get(owner)):
            left_s = give_up_s - time.monotonic()
            others = [h for h in self._pager.holdings.values() if h.id != owner]
            moving = [h for h in others if h.in_motion() or h.id in self._reading]
            if left_s <= 0 or not any(of(h) for h in others if h in moving or (moving and h.pins)):
                return False
            self._pager.lock.wait(min(left_s, POLL_S))
            return True

    @contextmanager
    def seeking(self, holding: Holding | None) -> Iterator[None]:
        """Nobody waits for `holding` meanwhile: it waits for others, who may wait for those."""
        if holding is None:
            yield
            return
        with self._pager.lock:
            holding.seeking += 1
        try:
            yield
        finally:
            with self._pager.lock:
                holding.seeking -= 1

    def _device_is_full(self, owner: str) -> bool:
        """It has not room for all who are off it, and one more like `owner`."""
        pager = self._pager
        with pager.lock:
            wanted_bytes = pager.holdings[owner].layout.total_bytes if owner in pager.holdings else 0
            for holding in pager.holdings.values():
                if holding.state is SessionState.SWAPPED:
                    wanted_bytes += holding.seems_to_miss()
        return pager.pool.free_bytes < wanted_bytes

    def _away(self) -> list[Holding]:
        """Sessions off the device, the one expected last first; then the others, parts of which may be off it.

        Who is on his way back goes after those who are not: what he waits for may have to be read again.
        """
        off = (SessionState.SWAPPED, SessionState.RESUMING)
        with self._pager.lock:
            away = [h for h in self._pager.holdings.values() if h.state in off]
            others = [h for h in self._pager.holdings.values() if h.state not in off]
        away.sort(key=lambda h: (not h.jobs, self._pager.pauses.expected_s(h)), reverse=True)
        return [*away, *sorted(others, key=self._pager.pauses.expected_s, reverse=True)]

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
        written = surplus = None
        freed = 0
        try:
            if self.disk is None:
                raise OutOfDisk("there is no disk tier (disk_path)", needed_bytes=size_bytes, free_bytes=0)
            written = self.disk.write(host.tensor[:size_bytes])
        finally:
            with self._pager.lock, stored.lock:
                stored.readers -= 1
                alone = not stored.readers and self._idle(stored)
                if written is not None and alone and stored.host is host and stored.host_valid_bytes == size_bytes:
                    surplus, stored.disk, stored.disk_valid_bytes = stored.disk, written, size_bytes
                    stored.host, stored.host_valid_bytes = None, 0
                    freed = stored.size_bytes
                else:
                    surplus = written
                self._pager.lock.notify_all()  # whoever gives it up waits for its readers
        if freed:
            host.free()
            self._pager.log(holding, "disk_write", size_bytes, time.perf_counter() - begun_s)
        if surplus is not None:
            self._free_disk(surplus)
        return freed

    def _idle(self, stored: Stored) -> bool:
        """No transfer reads it, and no session on the device relies on it. The locks are held."""
        if isinstance(stored, Block):
            return not (stored.places or stored.loading or stored.copying_bytes or stored.readers)
        return not stored.readers and stored.settled
