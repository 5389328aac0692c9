"""Bringing blocks in: what a pass needs is planned at once, and mapped and copied in steps of a few layers.

A plan names, for each layer in the order in which the pass will want them, the blocks to map: new ones for the tokens
to come, ones that come back from the host, ones that a fork shares, and copies of shared tails (copy on write). All
extents are acquired before the first map, so running out leaves everything as it was. Then each step's are created and
mapped with one grant, and its copies are issued together, in pieces of at most 8 MiB, without giving Python's
interpreter away. A step is one layer, with an event of its own that the compute stream waits for; where layers are
small, `STEP_BYTES` of them share one. While the link is busy the next steps are mapped, as many at once as `MAP_BYTES`
has: a grant holds up whoever launches kernels, a large one not much longer than a small one. Where there is nothing to
copy, as in a prefill, the pass maps each layer as it comes to it.

Invariant: a step is committed (tables, places) only when its maps and copies were accepted, so a failure between two
steps leaves a session whose next try does the rest.

Not taken: mapping inside the cache's `update`, on first touch. It would put the driver's calls into the middle of a
layer, and an eviction too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from djinn_core.device.base import Direction, Event, Stream
from djinn_core.errors import DeviceError, DjinnError, OutOfDeviceMemory
from djinn_core.interrupts import Uninterrupted, act, wait_for
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.wants import Want, Wants
from djinn_core.sessions.workers import told

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager

PIECE_BYTES = 8 << 20  # so that another session's boundary need not wait long behind it
STEP_BYTES = 48 << 20  # one layer of a long session: a millisecond of a fast link
MAP_BYTES = 16 * STEP_BYTES


class BringIn:
    """One session's blocks on their way to the device.

    Attributes:
        issued: for each layer 1 once the pass may go on to it.
        arrival: for each layer the timing event behind its step's copies, None when there is nothing to wait for.
        begun, restored: timing events around the copies from the host; there may be none.
        bytes: copied so far.
        cancelled: nothing more is wanted of it; it ends before its next step.
        by_pass: the pass maps its layers, one by one, as it comes to them.
        followed: a pass relies on it for all that it needs.
        reads, fetched: something of it has to be read from disk, as far as is known; it has been read once.
        done: nothing more will be issued; `error` says why, if it failed.
        marks: (what had been done, when) by the thread that resumes, in order.
    """

    def __init__(
        self, pager: Pager, holding: Holding, order: Sequence[int], reach: Sequence[int], *, prefetch: bool = False
    ) -> None:
        self._pager = pager
        self.holding, self.order, self.prefetch = holding, order, prefetch
        self._wants = Wants(holding, order, reach)
        self.issued = bytearray(b"\1" * holding.layout.layers)
        for layer in order:
            self.issued[layer] = 0
        self.arrival: list[Event | None] = [None] * holding.layout.layers
        self.begun, self.restored = (pager.device.event(timing=True) for _ in range(2))
        self.changed = threading.Condition()
        self.bytes = 0
        self.done = self.cancelled = self.by_pass = self.followed = self.reads = self.fetched = self._prepared = False
        self.error: DjinnError | None = None
        self.marks: list[tuple[str, float]] = []
        self.wanted_s = time.perf_counter()
        self.begun_s = self.ended_s = 0.0
        self._expected_s = holding.expected_resume_s or time.monotonic()
        self._limit_s = holding.expected_resume_s if prefetch else None  # only who is expected later leaves for it
        self._rows: dict[int, list[Want]] = {}
        self._last: Event | None = None  # behind the last copies
        self._left = deque(order)
        self._ahead: list[int] = []  # mapped already, the next to be copied

    @property
    def urgency(self) -> tuple[int, float]:
        """Less is sooner: what ends at once, resumes without a layer yet, resumes in order, then prefetches."""
        if self.cancelled or not self._left:
            return (0, self.wanted_s)
        if self.prefetch:
            return (3, self._expected_s)
        return (1 if self.begins else 2, self.wanted_s)

    def cancel(self) -> None:
        """Nothing more is wanted of it. It still has to end: `wait_issued`."""
        self.cancelled = True
        if self.by_pass:
            self.finish(None)
        self._pager.link.nudge()

    def complete(self) -> bool:
        """Every copy of it is done.

        Raises:
            DjinnError: one of them failed, or could not be issued.
        """
        if self.error is not None:
            raise self.error
        copied = self.done and self.restored.query()
        return copied and all(event.query() for event in self.arrival if event is not None)

    def gate(self, layer: int, compute: Stream) -> None:
        """Return when `layer` may be issued on the compute stream, which waits for its bytes.

        Raises:
            DjinnError: the bring-in failed before this layer; the session's state is whole.
        """
        if not self.issued[layer]:
            with Uninterrupted():
                self._issue_or_wait(layer)
            if not self.issued[layer]:
                if self.cancelled and self.error is None and not self.followed:
                    return  # whoever cancelled it planned the rest anew
                raise self.error or DeviceError(f"session {self.holding.id}: bring-in ended before layer {layer}")
        if (arrival := self.arrival[layer]) is not None:
            compute.wait_event(arrival)

    def _issue_or_wait(self, layer: int) -> None:
        while self.by_pass and not self.issued[layer]:
            try:
                self.step()
            except BaseException as error:  # noqa: BLE001 - it is raised again, as an error of this session
                failure = self._failed(error)
                raise failure from failure.__cause__
        with self.changed:
            wait_for(self.changed, lambda: self.issued[layer] or self.done)

    def wait_issued(self, *, interruptible: bool = False) -> None:
        """Return when nothing more will be issued."""
        if not self.done:
            self._pager.way.leave()
            wait = wait_for if interruptible else threading.Condition.wait_for
            with self.changed:
                wait(self.changed, lambda: self.done)

    def begin(self) -> None:
        """Hold all that it needs, on the calling thread. Raises what went wrong, after undoing it.

        Where only new blocks are wanted, the pass maps each layer as it comes to it, and ends with `end`.
        """
        try:
            if not self.prepare(wait=False):
                self._pager.way.leave()
                self.prepare(wait=True, read=True)
            self.by_pass = all(want.source is None and not want.block.holders for want in self._flat())
            while not self.by_pass and self._left and not self.cancelled:
                self.step()
        except BaseException as error:  # noqa: BLE001 - it is raised again, as an error of this session
            failure = self._failed(error)
            raise failure from failure.__cause__
        if self.by_pass:
            return
        self.finish(None)
        if self.error is not None:
            raise self.error

    def claim_behind(self) -> bool:
        """Claim what a pass appends to, if all its blocks are there or on their way: then nothing is left to bring in.

        The pass waits for each layer as it comes to it. False, and nothing claimed, when it needs blocks of its own.
        """
        with self._pager.lock:
            if not self._wants.brought():
                return False
            self._wants.claim_tails()
        return True

    def _failed(self, error: BaseException) -> BaseException:
        """End with `error`; what its caller is to be told."""
        self.fail(error)
        return self.error if isinstance(error, Exception) else error

    def end(self, *, done: bool) -> None:
        """The pass that maps the layers is over: `done`, or failed, and what it did not come to is given back."""
        try:
            while done and self._left:
                self.step()
        finally:
            self.finish(None)

    def prepare(self, *, wait: bool, read: bool = False) -> bool:
        """Plan, and hold all that the steps need; False, and nothing held, when that has to be done elsewhere.

        Without `wait` when others have to be waited for, or to leave the device; without `read` when it is on disk.
        """
        self.begun_s = time.perf_counter()
        try:
            ready = self._plan(wait, read) and self._prepare_sources() and self._acquire(wait)
        except BaseException:
            self._release()
            raise
        self._prepared = ready
        if not ready:
            self._release()
        return ready

    def map_ahead(self) -> bool:
        """Map the next steps; False when the next one is mapped, or there is none."""
        if self.cancelled or self._ahead or not self._left:
            return False
        self._map(self._next(self._left, MAP_BYTES))
        return True

    def _next(self, among: Iterable[int], limit_bytes: int) -> list[int]:
        """The first of `among` that are within the limit, and one at least."""
        layers: list[int] = []
        size_bytes = 0
        for layer in among:
            size_bytes += sum(want.block.size_bytes for want in self._rows[layer])
            if layers and size_bytes > limit_bytes:
                break
            layers.append(layer)
        return layers

    def step(self) -> tuple[Event | None, int]:
        """Copy the next layers, mapped first if they are not yet; the event behind their copies, and their bytes."""
        begins, before = self.begins, self.bytes
        stream = self._pager.h2d_first if begins else self._pager.h2d
        limit_bytes = 0 if begins or self.by_pass else STEP_BYTES
        if not self._ahead:
            ahead = self._next(self._left, limit_bytes)
            if begins and not (self.by_pass or self._pager.write_backs):  # one grant serves the next step, too
                ahead += self._next(islice(self._left, len(ahead), None), STEP_BYTES)
            self._map(ahead)
        layers = self._next(self._ahead, limit_bytes)
        arrival = self._issue(layers, stream)
        for layer in layers:
            self._rows[layer] = []
            self._left.popleft()
        self._ahead = self._ahead[len(layers) :]
        with self.changed:
            for layer in layers:
                self.issued[layer] = 1
            self.changed.notify_all()
        return arrival, self.bytes - before

    @property
    def begins(self) -> bool:
        """A resume waits for it, and none of its layers has been issued."""
        return not self.prefetch and len(self._left) == len(self.order)

    @property
    def left(self) -> int:
        """Layers to go."""
        return 0 if self.cancelled else len(self._left)

    @property
    def moves(self) -> bool:
        """It holds all that it needs, and goes on to its end by itself: no pass has to come for it."""
        return self._prepared and not (self.done or self.by_pass)

    def finish(self, error: DjinnError | None) -> None:
        """Nothing more will be issued. Called once, and raises nothing: `error` tells whoever waits."""
        try:
            self._release()
            if (first := self.arrival[self.order[0]] if self.order else None) is not None:
                self._pager.h2d.wait_event(first)
            self.restored.record(self._pager.h2d)
        except BaseException as failure:  # noqa: BLE001 - a worker's edge: whoever waits for this is told
            error = error or self._told(failure)
        self.error = error
        self.ended_s = time.perf_counter()
        try:
            if error is None and self.bytes:
                copies = (self.begun, self._last)
                self._pager.log(self.holding, "swap_in", self.bytes, self.ended_s - self.begun_s, copies)
            self._pager.ended(self)
        except BaseException as failure:  # noqa: BLE001 - as above
            self.error = error or self._told(failure)
        with self.changed:
            self.done = True
            self.changed.notify_all()
        with self._pager.lock:  # `wait_until` waits there
            self._pager.lock.notify_all()

    def fail(self, error: BaseException) -> None:
        """`finish`, with whatever was raised."""
        self.finish(self._told(error))

    def _told(self, error: BaseException) -> DjinnError:
        return told(error, self.holding, "a bring-in", "and it can be resumed again")

    def _plan(self, wait: bool, read: bool) -> bool:
        """What to map, by layer, with blocks and lenders claimed; waits while another session moves one of them."""
        lock = self._pager.lock
        with lock:
            while True:
                rows = {layer: self._wants.of(layer) for layer in self._left}
                flat = [want for row in rows.values() for want in row]
                moves = any(self._wants.in_motion(want.source or want.block) for want in flat)
                displaces = any(map(self._wants.replaces, flat))
                self.reads = any(map(self._wants.on_disk, flat))
                if (self.reads and not read) or ((moves or displaces) and not wait):
                    return False
                if not moves:
                    break
                lock.wait()
                act()
            self._rows = rows
            self.holding.displacing = displaces  # two could wait for each other to lend
            for want in flat:
                want.block.loading = True
                want.lender = self._wants.lender(want.source or want.block)
                if want.lender is not None:
                    want.lender.pins += 1
                elif want.source is not None:
                    want.source.readers += 1
                    want.reading = True
            self._wants.claim_tails()
        return True

    def on_disk(self) -> list[Block]:
        """What has to be read from there before it can be prepared."""
        with self._pager.lock:
            wants = [want for layer in self._left for want in self._wants.of(layer)]
            return [want.source or want.block for want in wants if self._wants.on_disk(want)]

    def _flat(self) -> list[Want]:
        return [want for row in self._rows.values() for want in row]

    def _prepare_sources(self) -> bool:
        """Everything that will be read is on the device of a lender, or whole on the host, where it stays."""
        pager, holding = self._pager, self.holding
        if here := [want.source for want in self._flat() if self._wants.replaces(want)]:
            pager.displace(holding, here)
        for want in self._flat():
            wanted = want.source or want.block
            if want.lender is None and wanted.device is None and wanted.disk is not None:
                pager.tiers.fetch(wanted, holding.id)
        return True

    def _acquire(self, wait: bool) -> bool:
        pager, holding = self._pager, self.holding
        fresh = [want for want in self._flat() if want.source or want.block.device is None]
        sizes = [want.block.size_bytes for want in fresh]
        promise = not self.prefetch  # nobody waits for one, and one that ended half-way would stay so
        if wait:
            extents = pager.acquire(holding, sizes, self._limit_s, promise=promise)
        else:
            extents = pager.take_free(holding.id, sizes, promise=promise)
        if extents is None:
            return False
        for want, extent in zip(fresh, extents, strict=True):
            want.extent = extent
        return True

    def _map(self, layers: list[int]) -> None:
        row = [want for layer in layers for want in self._rows[layer]]
        if row:
            self._back(row)
            self.holding.region.map([(want.block.offset, want.extent or want.block.device) for want in row])
        self._ahead = layers

    def _back(self, row: list[Want]) -> None:
        try:
            for want in row:
                if want.extent is not None:
                    self._pager.pool.back(want.extent)
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"session {self.holding.id} was promised device memory that others have taken since ({error}); what it "
                "holds is whole; free some of the device and try again",
                needed_bytes=error.needed_bytes,
                free_bytes=error.free_bytes,
            ) from error

    def _issue(self, layers: Sequence[int], stream: Stream) -> Event | None:
        """Fill the mapped blocks of `layers`, then commit them. What is not committed is unmapped by `_release`."""
        pager, holding = self._pager, self.holding
        row = [want for layer in layers for want in self._rows[layer]]
        if not row:
            return None
        arrival: Event | None = pager.device.event(timing=True, blocking=True)
        try:
            copied = self._fill(row, stream, arrival)
            shared = [want for want in row if want.extent is None and want.block.ready is not None]
            for want in shared:
                stream.wait_event(want.block.ready)
            if shared or (not copied and any(want.lender for want in row)):
                arrival.record(stream)
            elif not copied:
                arrival = None
            if arrival is not None and any(want.source for want in row):
                arrival.synchronize()  # the copy takes its source's place, so it must be whole
        except BaseException:
            with contextlib.suppress(DeviceError):  # a failure of what was issued is the one being handled
                pager.device.drain(stream)
            raise
        if arrival is not None:
            self._last = arrival
            for layer in layers:
                self.arrival[layer] = holding.arrival[layer] = arrival
        with pager.lock:
            replaced = [block for want in row if (block := self._commit(want, arrival)) is not None]
            pager.lock.notify_all()
            for block in replaced:
                if not block.holders:
                    pager.tiers.discard(block)
        self.bytes += copied
        return arrival

    def _fill(self, row: list[Want], stream: Stream, arrival: Event) -> int:
        """Issue the copies into mapped blocks; returns the bytes that come over the link, `arrival` behind them."""
        device, memory, pairs = self._pager.device, self.holding.region.tensor, []
        for want in row:
            block, source = want.block, want.source
            if want.lender is not None:
                self._borrow(want, stream)
                continue
            there = (source or block).host
            size_bytes = self.holding.table.end_bytes(source) if source else block.host_valid_bytes
            if size_bytes:
                pairs.append((memory[block.offset : block.offset + size_bytes], there.tensor[:size_bytes]))
        if pairs:
            later = stream is self._pager.h2d  # a resume's first layer goes first
            marks = {"begun": None if self.bytes else self.begun, "done": arrival}
            with self._pager.tiers.host.issuing():
                device.copy_all(pairs, stream, Direction.H2D, piece_bytes=PIECE_BYTES, gives_way=later, **marks)
        return sum(dst.numel() for dst, _ in pairs)

    def _borrow(self, want: Want, stream: Stream) -> None:
        """Order `stream` behind whoever writes a lender's block, and copy from it if it is to be a copy."""
        block, source, lender = want.block, want.source, want.lender
        stream.wait_event(lender.pass_done)
        if source is None:
            return
        if source.ready is not None:
            stream.wait_event(source.ready)
        if size_bytes := self.holding.table.end_bytes(source):
            target = self.holding.region.tensor[block.offset : block.offset + size_bytes]
            there = lender.region.tensor[source.offset : source.offset + size_bytes]
            self._pager.device.copy(target, there, stream, Direction.D2D)

    def _commit(self, want: Want, ready: object) -> Block | None:
        """The block is mapped here now; the one whose place it took. The pager's lock is held."""
        block, holding, replaced = want.block, self.holding, None
        if holding.table not in block.holders:
            replaced = holding.table.hold(block.layer, block.index, block)
        if want.extent is not None:
            block.device = want.extent
        if want.lender is None or want.source is not None:
            block.ready = ready
        block.places.add(holding)
        holding.mapped[block.offset] = block
        want.extent = None
        block.loading = False
        self._let_go(want)
        return replaced

    def _release(self) -> None:
        """Give back what was claimed and not committed; an extent that cannot be unmapped is left to `Room.sweep`."""
        holding, wants = self.holding, self._flat()
        left = [want for want in wants if holding.mapped.get(want.block.offset) is not want.block]
        try:
            if stale := [want.block.offset for want in left if self._is_there(want)]:
                holding.region.unmap(stale)
        finally:
            with self._pager.lock:
                self._rows, self._ahead = {}, []
                holding.displacing = False
                for want in wants:
                    want.block.loading = False
                    self._let_go(want)
                for want in left:
                    if want.extent is None:
                        continue
                    if want.block.device is want.extent:  # it was interrupted in `_commit`
                        want.block.device = want.block.ready = None
                        want.block.places.discard(holding)
                    if self._is_there(want):
                        holding.stale[want.block.offset] = want.extent
                    else:
                        self._pager.pool.give_back(want.extent)
                self._pager.lock.notify_all()

    def _is_there(self, want: Want) -> bool:
        """It is mapped, committed or not."""
        extent = want.extent or want.block.device
        return extent is not None and self.holding.region.at(want.block.offset) is extent

    def _let_go(self, want: Want) -> None:
        """Whoever was read from may move again. The pager's lock is held."""
        if want.lender is not None:
            want.lender.pins -= 1
            want.lender = None
        if want.reading:
            want.source.readers -= 1
            want.reading = False
