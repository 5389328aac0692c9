"""Room on the device: extents, and who leaves when there are none. Whom, the policy says.

Invariant: a running session's memory is never taken, and a paused one's only when it is clean. Extents for one pass are
taken together or not at all, so that two callers cannot each hold half, and what is free is taken without waiting for
whoever is evicting.

Not taken: paging single blocks on demand. A session is wanted as a whole, and half of one on the device serves nobody.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TypeVar

from djinn_core.device.base import Device, Event
from djinn_core.errors import CapacityError, DeviceError, DjinnError, IntegrityError, OutOfDeviceMemory
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.extents import Extent, ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.memory.ledger import Kind
from djinn_core.sessions.blocks import Block, pieces
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.pagerevents import EVENTS_KEPT, PagerEvent
from djinn_core.sessions.pauses import Pauses
from djinn_core.sessions.policy import Candidate, ExpectedLast, Policy, chosen_by
from djinn_core.sessions.staging import Staging
from djinn_core.sessions.state import SessionState
from djinn_core.sessions.tiers import PATIENCE_S, Tiers
from djinn_core.sessions.writeback import write_back
from djinn_core.turn import Way

Got = TypeVar("Got")
LOOK_S = 0.01  # how often who waits for another's evictions looks whether room has come free
UNMAP_BYTES = 256 << 20  # of a long session six layers: a third of a millisecond


class Room:
    """The device memory of one runtime's sessions. Thread-safe.

    Attributes:
        lock: the condition that guards all holdings and blocks; notified on every change.
        holdings: every open session's, by id.
        h2d, d2h: the streams of the two directions.
        d2h_behind: the stream of what passes write behind themselves, which waits for their layers.
        h2d_first: the stream of what a resume cannot begin without, beside what `h2d` has in flight.
        way: for who resumes, up to where its bring-in has begun; passes and workers give it.
        write_backs: how many are under way.
        pauses: when each is expected back.
        saving: held by the one session that is being saved; it needs all of its state on the host at once.
        events: what happened, oldest first, bounded.
    """

    def __init__(
        self, device: Device, pool: ExtentPool, host: HostTier, disk: DiskTier | None, policy: Policy | None
    ) -> None:
        self.device = device
        self.pool = pool
        self.policy: Policy = policy or ExpectedLast()
        self.lock = threading.Condition()
        self.saving = threading.Lock()
        self.ending = False  # everything is being closed: nobody wants anything
        self.holdings: dict[str, Holding] = {}
        self.way = Way()
        self.write_backs = 0
        self.pauses = Pauses()
        self.tiers = Tiers(self, host, disk)
        self.staging = Staging(device, pool, self.acquire_one)
        self.h2d = device.stream()
        self.h2d_first = device.stream(-1)
        self.d2h = device.stream()
        self.d2h_behind = device.stream()
        self.events: deque[PagerEvent] = deque(maxlen=EVENTS_KEPT)
        self._acquiring = threading.RLock()  # one caller evicts for itself at a time
        self._taking = threading.Lock()  # extents for one pass are taken together

    def log(
        self,
        holding: Holding,
        event: str,
        size_bytes: int = 0,
        seconds: float = 0.0,
        copies: tuple[Event, Event] | None = None,
    ) -> None:
        self.log_id(holding.id, event, size_bytes, seconds, copies)

    def log_id(
        self,
        session: str,
        event: str,
        size_bytes: int = 0,
        seconds: float = 0.0,
        copies: tuple[Event, Event] | None = None,
    ) -> None:
        self.events.append(PagerEvent(time.perf_counter(), session, event, size_bytes, seconds * 1e3, copies))

    def evict(self, holding: Holding, *, released: bool = False, wait: bool = True) -> bool:
        """Take a paused session off the device, after writing back what is new. False when it is paused no more.

        With `released`, only while its owner wants so, and layers leave while later ones are copied; of a victim some
        leave only where the host lacks room for all. Without `wait`, not while it arrives or lends: it may wait for us.
        """
        begun_s, parted = time.perf_counter(), []
        try:
            with self.leaving(holding):
                while True:
                    with self.lock:
                        self._wait_alone(holding, lambda: not (holding.moving or (wait and holding.pins)))
                        stays = released and not holding.release
                        if stays or holding.state is not SessionState.PAUSED or holding.pins:
                            return holding.state is SessionState.SWAPPED
                        if not wait and holding.being_brought:
                            return False
                        clean = holding.is_clean() and not holding.draining and not holding.being_brought
                        holding.moving = clean
                    if clean:
                        break
                    if wait and holding.being_brought:
                        with self.tiers.seeking(holding):
                            holding.wait_issued()
                    part = (lambda some: parted.append(self._part(holding, some))) if released else None
                    try:
                        write_back(self, holding, list(holding.mapped.values()), part=part)
                    except CapacityError:  # what the host had room for makes room here: someone may need just that
                        self._settle_device(holding)
                        parted.append(self._part(holding, list(holding.mapped.values())))
                        raise
                self._leave(holding, parted)
                return True
        finally:
            if any(parted):
                self.log(holding, "evict", sum(parted), time.perf_counter() - begun_s)

    def _wait_alone(self, holding: Holding, reached: Callable[[], bool]) -> None:
        """Wait until others have `reached` that its memory is left alone. The lock is held.

        Who borrows from it lets go by himself, but may look for room before.
        """
        while not reached():
            with self.tiers.seeking(holding) if holding.pins else nullcontext():
                self.lock.wait()

    def wait_unmoved(self, holding: Holding) -> None:
        """Return when nobody moves its memory; who has to wait is out of the way. The lock is held."""
        if holding.moving:
            self.way.leave()
            self.lock.wait_for(lambda: not holding.moving)

    @contextmanager
    def leaving(self, holding: Holding) -> Iterator[None]:
        """Meanwhile the host copies of what it has mapped are not given up: they are about to be the only ones."""
        with self.lock:
            holding.leaving += 1
        try:
            yield
        finally:
            with self.lock:
                holding.leaving -= 1
                self.lock.notify_all()

    def _part(self, holding: Holding, blocks: Sequence[Block]) -> int:
        """Unmap what has just been written back, if the session is still to leave; returns the bytes freed."""
        with self.lock:
            busy = holding.moving or holding.pins or holding.being_brought
            if holding.state is not SessionState.PAUSED or busy:
                return 0
            clean = [b for b in blocks if holding.mapped.get(b.offset) is b and not holding.dirty(b)]
            holding.moving = True
        try:
            return self._take_out(holding, clean)
        finally:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()

    def _leave(self, holding: Holding, parted: list[int]) -> None:
        """Unmap a clean session that is `moving`: it is SWAPPED. The bytes freed are appended to `parted`.

        In pieces, and way is given between them: a call of the driver holds up whoever makes another one. The host has
        all of it, so that it is whole wherever this ends.
        """
        until_s = self.way.until_s()
        try:
            self._settle_device(holding)
            for number, piece in enumerate(pieces(holding.mapped.values(), UNMAP_BYTES)):
                if number:
                    self.way.give(until_s)
                parted.append(self._take_out(holding, piece))
        except BaseException:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()
            raise
        with self.lock:
            holding.moving = False
            # what failed is still to be told to who had resumed it
            holding.jobs = [job for job in holding.jobs if job.error is not None and not job.prefetch]
            holding.go(SessionState.SWAPPED, "leave the device")
            self.lock.notify_all()

    def _unmap_alone(self, holding: Holding, blocks: Sequence[Block]) -> None:
        """Unmap those of `blocks` that are mapped here, when nobody else moves, writes back or borrows any."""
        with self.lock:
            self._wait_alone(holding, lambda: not (holding.draining or holding.moving or holding.pins))
            holding.moving = True
            there = [block for block in blocks if holding.mapped.get(block.offset) is block]
        try:
            self._unmap(holding, there)
        finally:
            with self.lock:
                holding.moving = False
                self.lock.notify_all()

    def _unmap(self, holding: Holding, blocks: Sequence[Block]) -> int:
        """Unmap here, and give back what is mapped nowhere else. Nobody borrows or copies from here meanwhile."""
        if not blocks:
            return 0
        with self.lock:
            self.lock.wait_for(lambda: not holding.draining and not holding.pins)
            before, holding.moving = holding.moving, True
        try:
            self._settle_device(holding)
            return self._take_out(holding, blocks)
        finally:
            with self.lock:
                holding.moving = before
                self.lock.notify_all()

    def _take_out(self, holding: Holding, blocks: Sequence[Block]) -> int:
        """The unmaps themselves, all or none. Only copies behind a pass may still read these blocks.

        `moving` keeps others away. Returns the bytes freed. An unmap that fails, and cannot be undone, leaves no block
        counted that is not mapped; one that only the device had is lost with it.
        """
        if (behind := holding.behind) is not None:
            behind.settle()
        try:
            holding.region.unmap([block.offset for block in blocks])
        except BaseException:
            gone = [block for block in blocks if holding.region.at(block.offset) is None]
            if any(map(holding.dirty, gone)):
                with self.lock:
                    holding.lose(IntegrityError(f"session {holding.id} has lost KV that only the device had"))
            self._count_out(holding, gone)
            raise
        return self._count_out(holding, blocks)

    def _count_out(self, holding: Holding, blocks: Iterable[Block]) -> int:
        """`blocks` are mapped here no longer; returns the bytes freed."""
        free: list[Extent] = []
        with self.lock:
            for block in blocks:
                del holding.mapped[block.offset]
                block.places.discard(holding)
                if not block.places:
                    free.append(block.device)
                    block.device = None
                    block.ready = None
            holding.table.writable_until = 0
            holding.forget_bytes()
        for extent in free:
            self.pool.give_back(extent)
        return sum(extent.size_bytes for extent in free)

    def sweep(self, holding: Holding) -> None:
        """Unmap what a bring-in had mapped and could not unmap. Nothing is being brought in."""
        stale = [offset for offset in holding.region.mapped() if offset not in holding.mapped]
        try:
            if stale:
                holding.region.unmap(stale)
        finally:
            for offset in [offset for offset in holding.stale if holding.region.at(offset) is None]:
                self.pool.give_back(holding.stale.pop(offset))

    def _settle_device(self, holding: Holding) -> None:
        """Nothing queued on the device touches this session's memory any more.

        A layer's last arrival says nothing of an earlier job's copies, which may be on another stream.
        """
        for event in dict.fromkeys((holding.pass_done, *holding.arrival, *holding.arrivals_of_jobs())):  # many twice
            try:
                event.synchronize()
            except DeviceError as error:
                self.log(holding, f"lost copy ({error})")

    def acquire_one(self, size_bytes: int, kind: Kind, owner: str) -> Extent:
        """One extent, after evicting paused sessions if need be."""

        def take() -> Extent | None:
            with self._taking, suppress(OutOfDeviceMemory):
                return self.pool.acquire(size_bytes, kind, owner)

        if (got := self._take_or_make_room(take, size_bytes, None, None)) is not None:
            return got
        with self._taking:
            return self.pool.acquire(size_bytes, kind, owner)  # its error has the numbers

    def take_free(self, owner: str, sizes: Sequence[int], *, promise: bool) -> list[Extent] | None:
        """Extents of all `sizes` out of what is free now, or None and nothing taken. `promise`: as the pool says."""
        with self._taking:
            if sum(sizes) > self.pool.free_bytes:
                return None
            try:
                return self.pool.acquire_all(sizes, Kind.KV, owner, promise=promise)
            except OutOfDeviceMemory:
                return None

    def acquire(self, holding: Holding, sizes: Sequence[int], limit_s: float | None, *, promise: bool) -> list[Extent]:
        """Extents of all `sizes`, or none. Paused sessions make room; with `limit_s` only ones expected later.

        Raises:
            OutOfDeviceMemory: what is left belongs to running sessions; nothing changed for them.
        """
        needed_bytes = sum(sizes)

        def take() -> list[Extent] | None:
            return self.take_free(holding.id, sizes, promise=promise)

        if (got := self._take_or_make_room(take, needed_bytes, holding, limit_s)) is None:
            others = "others fill the device, " if self.pool.free_bytes >= needed_bytes else ""
            raise OutOfDeviceMemory(
                f"session {holding.id} needs {needed_bytes:,} bytes more, {others}and no other paused session can "
                f"leave the device ({self._who_stays(holding)}); pause or close one and try again",
                needed_bytes=needed_bytes,
                free_bytes=max(0, self.pool.free_bytes),
            )
        return got

    def _who_stays(self, keep: Holding | None = None) -> str:
        """The states of the others on the device, and what stopped one of them from leaving, if anything did."""
        with self.lock:
            there = [h for h in self.holdings.values() if h is not keep and h.mapped]
        states = Counter(h.state.value for h in there)
        stopped = [f"{h.id} stays: {h.trouble}" for h in there if h.trouble is not None]
        return "; ".join([*(f"{count} {state}" for state, count in states.items()), *stopped[:1]]) or "nobody is there"

    def _take_or_make_room(
        self, take: Callable[[], Got | None], needed_bytes: int, keep: Holding | None, limit_s: float | None
    ) -> Got | None:
        """What `take` gets, after evicting paused sessions if need be; None when nobody else can leave.

        While another caller evicts, which may take long where the host is full, what comes free meanwhile is taken.
        Whoever cannot leave only because he is on his way is waited for, unless a prefetch asks; and whoever has
        arrived since the look at who could leave is asked, too.
        """
        while True:
            if (got := take()) is not None:
                return got
            if self._acquiring.acquire(timeout=LOOK_S):
                break
        give_up_s, last_look = time.monotonic() + PATIENCE_S, False
        try:
            while True:
                short = self.pool.free_bytes < needed_bytes
                if (got := take()) is not None:
                    return got
                short = short or self.pool.free_bytes < needed_bytes
                tried: set[str] = set()
                if self._make_room_for(needed_bytes, short, keep, limit_s, tried):
                    continue
                owner = "" if keep is None else keep.id
                if limit_s is not None:
                    return None
                if self.tiers.wait_for_transfers(owner, give_up_s, _could_leave_later):
                    last_look = False
                elif last_look or not self._able(keep, None, tried):
                    return None
                else:
                    last_look = True
        finally:
            self._acquiring.release()

    def resize(self, budget_bytes: int) -> None:
        """Another budget for the pool. For a smaller one paused sessions leave; who is on his way is waited for.

        Raises:
            OutOfDeviceMemory: what is left cannot leave; the budget is as it was, and who has left stays away.
        """
        with self._acquiring:
            before = self.pool.budget_bytes
            beyond = self.pool.resize(budget_bytes)
            give_up_s, last_look = time.monotonic() + PATIENCE_S, False
            try:
                while beyond > 0:
                    made, before_bytes = self._make_room(0, None, None, set()), beyond
                    beyond = self.pool.resize(budget_bytes)
                    left = made or beyond < before_bytes  # others may have left by themselves
                    if left or self.tiers.wait_for_transfers("", give_up_s, _could_leave_later):
                        last_look = False
                    elif not last_look:
                        last_look = True
                    else:
                        raise OutOfDeviceMemory(
                            f"{beyond:,} bytes more than the new budget are held by weights, staging and sessions that "
                            f"cannot leave ({self._who_stays()}); pause or close one, or unload a model, and try again",
                            needed_bytes=self.pool.held_bytes,
                            free_bytes=self.pool.budget_bytes,
                        )
            except BaseException:
                self.pool.resize(before)
                raise

    def _make_room_for(
        self, needed_bytes: int, short: bool, keep: Holding | None, limit_s: float | None, tried: set[str]
    ) -> bool:
        """Whether it is worth another try: someone was made to leave, or others have left without being asked.

        Where the budget was not `short`, others fill the device: then as much has to leave as is needed.
        """
        wanted_bytes = needed_bytes if short else self.pool.free_bytes + needed_bytes
        made = self._make_room(wanted_bytes, keep, limit_s, tried)
        return made or (short and self.pool.free_bytes >= needed_bytes)

    def _make_room(self, needed_bytes: int, keep: Holding | None, limit_s: float | None, tried: set[str]) -> bool:
        """Evict as the policy says until `needed_bytes` are free; False when nobody could leave. Adds who was tried."""
        freed_any = False
        while self.pool.free_bytes < needed_bytes or not freed_any:
            candidates = self._candidates(keep, limit_s, tried)
            chosen = chosen_by(self.policy, candidates, needed_bytes - self.pool.free_bytes)
            if not chosen:
                break
            for name in chosen:
                tried.add(name)
                holding = self.holdings.get(name)
                if holding is not None:
                    freed_any |= self._try_evict(holding)
        return freed_any

    def make_room_clean(self, wanted_bytes: int, limit_s: float, due_s: float) -> None:
        """Unmap clean sessions expected after `due_s` until `wanted_bytes` are free, or none is left.

        Those without a hint may leave from `limit_s` on: no prefetch would bring them straight back. Nobody waits for
        it, so it gives way.
        """
        tried: set[str] = set()
        while (missing := wanted_bytes - self.pool.free_bytes) > 0:
            self.way.give()
            clean = [
                c
                for c in self._candidates(None, None, tried)
                if c.clean and c.guessed_resume_s > (min(limit_s, due_s) if c.expected_resume_s is None else due_s)
            ]
            chosen = chosen_by(self.policy, clean, missing)
            holding = self.holdings.get(chosen[0]) if chosen else None
            if holding is None:
                return
            tried.add(holding.id)
            if holding.is_clean():
                self._try_evict(holding)

    def could_free(self, needed_bytes: int, limit_s: float) -> bool:
        """Whether `needed_bytes` are free, or would be if paused sessions not expected before `limit_s` left."""
        there = sum(size_bytes for _, size_bytes, _ in self._able(None, limit_s, set()))
        return self.pool.free_bytes + there >= needed_bytes

    def _try_evict(self, holding: Holding) -> bool:
        self.log(holding, "chosen", holding.own_device_bytes)
        mapped = len(holding.mapped)
        try:
            return self.evict(holding, wait=False)
        except DjinnError as error:  # what is left stays where it is; another one may leave instead
            holding.trouble = error
            self.log(holding, f"stays ({error})")
            return len(holding.mapped) < mapped

    def _candidates(self, keep: Holding | None, limit_s: float | None, tried: set[str]) -> list[Candidate]:
        """Who could leave. Whether each is clean may take a walk, outside of the lock; `evict` looks again."""
        return [
            Candidate(h.id, size_bytes, h.seems_clean(), h.last_use_s, h.expected_resume_s, expected_s)
            for h, size_bytes, expected_s in self._able(keep, limit_s, tried)
        ]

    def _able(self, keep: Holding | None, limit_s: float | None, tried: set[str]) -> list[tuple[Holding, int, float]]:
        """Who could leave, and is not known to be wanted before `limit_s`; what it would free, and when it is expected.

        The guesses are made outside of the lock.
        """
        with self.lock:
            able = [
                (h, h.seems_to_free())
                for h in self.holdings.values()
                if h is not keep
                and h.id not in tried
                and h.state is SessionState.PAUSED
                and h.mapped
                and not h.moving
                and not h.pins
                and not h.being_brought
            ]
        told = [(h, size_bytes, self.pauses.expected_s(h)) for h, size_bytes in able]
        return [t for t in told if limit_s is None or t[2] > limit_s or self.pauses.anytime(t[0])]


def _could_leave_later(holding: Holding) -> bool:
    """Nobody runs it, and it is on the device, or is brought there."""
    away = holding.state in (SessionState.PAUSED, SessionState.SWAPPED)
    return away and (bool(holding.mapped) or holding.being_brought)
