"""Bringing blocks in: what a pass needs is planned at once, and mapped and copied layer by layer, each step a layer.

A plan names, for each layer in the order in which the pass will want them, the blocks to map: new ones for the tokens
to come, ones that come back from the host, ones that a fork shares, and copies of shared tails (copy on write). All
extents are acquired before the first map, so running out leaves everything as it was. Then each layer's are backed and
mapped with one grant, its copies are issued in pieces of at most 8 MiB, and an event is recorded behind them: the pass
goes on as soon as its next layer is issued, and the compute stream waits for that layer's event alone. While the link
is busy the next layers are mapped already: under load that takes as long as a layer's copies. Where there is nothing to
copy, as in a prefill, the pass maps each layer as it comes to it: the device would wait for all maps in a row.

Invariant: a layer is committed (tables, places) only when its maps and copies were accepted, so a failure between two
layers leaves a session whose next try does the rest.

Not taken: mapping inside the cache's `update`, on first touch. It would put a driver call and a possible eviction into
the middle of a layer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from djinn_core.device.base import Direction, Event, Stream
from djinn_core.errors import DeviceError, DjinnError
from djinn_core.memory.extents import Extent
from djinn_core.sessions.blocks import Block
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.workers import told

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager

PIECE_BYTES = 8 << 20  # so that another session's boundary need not wait long behind it
AHEAD_LAYERS = 4  # mapped before the link has room for their copies


@dataclass
class Step:
    """One block to map. `source` is the shared block that it is a copy of, if any."""

    block: Block
    source: Block | None = None
    extent: Extent | None = None
    lender: Holding | None = None  # where a shared extent, or the source of a copy, is mapped now
    reading: bool = False  # the source is read from the host, which keeps it meanwhile


class BringIn:
    """One session's blocks on their way to the device.

    Attributes:
        issued: for each layer 1 once the pass may go on to it.
        arrival: for each layer the timing event behind its copies, None when there is nothing to wait for.
        begun, restored: timing events around the copies.
        bytes: copied so far.
        cancelled: nothing more is wanted of it; it ends before its next layer.
        by_pass: the pass maps its layers, one by one, as it comes to them.
        followed: a pass relies on it for all that it needs.
        done: nothing more will be issued; `error` says why, if it failed.
    """

    def __init__(
        self, pager: Pager, holding: Holding, order: Sequence[int], reach: Sequence[int], *, prefetch: bool = False
    ) -> None:
        self._pager = pager
        self.holding = holding
        self.order = order
        self.reach = reach  # tokens that each layer must be able to hold; more than it holds: it is appended to
        self.prefetch = prefetch
        self.issued = bytearray(b"\1" * holding.layout.layers)
        for layer in order:
            self.issued[layer] = 0
        self.arrival: list[Event | None] = [None] * holding.layout.layers
        self.begun = pager.device.event(timing=True)
        self.restored = pager.device.event(timing=True)
        self.changed = threading.Condition()
        self.bytes = 0
        self.done = self.cancelled = self.by_pass = self.followed = False
        self.error: DjinnError | None = None
        self.wanted_s = time.perf_counter()
        self.begun_s = self.ended_s = 0.0
        self._expected_s = holding.expected_resume_s or time.monotonic()
        self._limit_s = holding.expected_resume_s if prefetch else None  # only who is expected later leaves for it
        self._steps: dict[int, list[Step]] = {}
        self._last: Event | None = None  # behind the last copies
        self._left = deque(order)
        self._ahead: deque[int] = deque()  # the first of what is left, mapped already

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
        while self.by_pass and not self.issued[layer]:
            try:
                self.step()
            except BaseException as error:  # noqa: BLE001 - it is raised again, as an error of this session
                failure = self._failed(error)
                raise failure from failure.__cause__
        if not self.issued[layer]:
            with self.changed:
                self.changed.wait_for(lambda: self.issued[layer] or self.done)
            if not self.issued[layer]:
                if self.cancelled and self.error is None and not self.followed:
                    return  # whoever cancelled it planned the rest anew
                raise self.error or DeviceError(f"session {self.holding.id}: bring-in ended before layer {layer}")
        arrival = self.arrival[layer]
        if arrival is not None:
            compute.wait_event(arrival)

    def wait_issued(self) -> None:
        """Return when nothing more will be issued."""
        if not self.done:
            with self.changed:
                self.changed.wait_for(lambda: self.done)

    def begin(self) -> None:
        """Hold all that it needs, on the calling thread. Raises what went wrong, after undoing it.

        Where only new blocks are wanted, the pass maps each layer as it comes to it, and ends with `end`.
        """
        try:
            self.prepare(wait=True)
            self.by_pass = all(step.source is None and not step.block.holders for step in self._flat())
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

        The pass waits for each layer as it comes to it, and not until the last one has been issued. False, and nothing
        claimed, when it needs blocks of its own.
        """
        table, layout = self.holding.table, self.holding.layout
        with self._pager.lock:
            for layer in self.order:
                row, length, count = table.blocks[layer], table.lengths[layer], layout.count(self.reach[layer])
                tails = [block for index, block in enumerate(row[:count]) if self._is_tail(index, length)]
                brought = layout.count(length)  # what a pass that failed had appended stays in the row, and is not
                if count > brought or (self.reach[layer] > length and any(map(self._others_past, tails))):
                    return False
            self._claim_tails()
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

    def prepare(self, *, wait: bool) -> bool:
        """Plan, and hold all that the steps need. Without `wait`, False when someone would have to be waited for.

        What is on disk counts as such, and so do others that have to leave the device first. Nothing is held then.
        """
        self.begun_s = time.perf_counter()
        try:
            ready = self._plan(wait) and (wait or not self._slow()) and self._prepare_sources() and self._acquire(wait)
        except BaseException:
            self._release()
            raise
        if not ready:
            self._release()
        return ready

    def map_ahead(self) -> bool:
        """Map the next layer that is not mapped yet; False when enough are."""
        if self.cancelled or len(self._ahead) >= min(AHEAD_LAYERS, len(self._left)):
            return False
        layer = self._left[len(self._ahead)]
        self._map(self._steps[layer])
        self._ahead.append(layer)
        return True

    def step(self) -> tuple[Event | None, int]:
        """Copy the next layer, mapped first if it is not yet; the event behind its copies, and their bytes.

        The first layer of a resume does not queue behind what others have in flight: it has a stream of its own.
        """
        stream, before = self._pager.h2d_first if self.begins else self._pager.h2d, self.bytes
        layer = self._left[0]
        row = self._steps[layer]
        if self._ahead:
            self._ahead.popleft()
        else:
            self._map(row)
        if row:
            self._issue_layer(layer, row, stream)
            self._steps[layer] = []
        self._left.popleft()
        with self.changed:
            self.issued[layer] = 1
            self.changed.notify_all()
        return self.arrival[layer], self.bytes - before

    @property
    def begins(self) -> bool:
        """A resume waits for it, and none of its layers has been issued."""
        return not self.prefetch and len(self._left) == len(self.order)

    @property
    def left(self) -> int:
        """Layers to go."""
        return 0 if self.cancelled else len(self._left)

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
            if error is None and any(self.arrival):
                copies = (self.begun, self._last)
                self._pager.log(self.holding, "swap_in", self.bytes, self.ended_s - self.begun_s, copies)
            self._pager.ended(self)
        except BaseException as failure:  # noqa: BLE001 - as above
            self.error = error or self._told(failure)
        with self.changed:
            self.done = True
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """`finish`, with whatever was raised."""
        self.finish(self._told(error))

    def _told(self, error: BaseException) -> DjinnError:
        return told(error, self.holding, "a bring-in", "and it can be resumed again")

    # the plan

    def _plan(self, wait: bool) -> bool:
        """What to map, by layer, with blocks and lenders claimed; waits while another session moves one of them."""
        lock = self._pager.lock
        with lock:
            while True:
                steps = {layer: self._plan_layer(layer) for layer in self._left}
                flat = [step for row in steps.values() for step in row]
                if not any(self._in_motion(step.source or step.block) for step in flat):
                    break
                if not wait:
                    return False
                lock.wait()
            self._steps = steps
            self.holding.displacing = any(self._here(step) for step in flat)  # two could wait for each other to lend
            for step in flat:
                step.block.loading = True
                wanted = step.source or step.block
                if wanted.places - {self.holding}:
                    step.lender = next(iter(wanted.places - {self.holding}))
                    step.lender.pins += 1
                elif step.source is not None:
                    step.source.readers += 1
                    step.reading = True
            self._claim_tails()
        return True

    def _here(self, step: Step) -> bool:
        """Its source is mapped here, and has to go before it is copied."""
        return step.source is not None and self.holding.mapped.get(step.source.offset) is step.source

    def _in_motion(self, block: Block) -> bool:
        """Another session is loading it, or taking it off the device."""
        others = block.places - {self.holding}
        return block.loading or any(p.moving for p in block.places) or any(p.displacing for p in others)

    def _plan_layer(self, layer: int) -> list[Step]:
        holding, layout = self.holding, self.holding.layout
        row, length, reach = holding.table.blocks[layer], holding.table.lengths[layer], self.reach[layer]
        steps = []
        for index in range(layout.count(reach)):
            if index >= len(row):
                steps.append(Step(Block(layout, layer, index)))
            elif reach > length and self._is_tail(index, length) and self._others_past(row[index]):
                steps.append(Step(Block(layout, layer, index), source=row[index]))
            elif holding.mapped.get(row[index].offset) is not row[index]:
                steps.append(Step(row[index]))
        return steps

    def _is_tail(self, index: int, length: int) -> bool:
        """Appending to a layer of `length` tokens writes into this block."""
        layout = self.holding.layout
        return layout.end_bytes(index, length) < layout.size_of(index)

    def _others_past(self, block: Block) -> bool:
        """Someone else has, or is about to have, more in this block than this session: it must not be written."""
        mine = self.holding.table.end_bytes(block)
        return any(t.reach_bytes(block) > mine for t in block.holders if t is not self.holding.table)

    def _claim_tails(self) -> None:
        """From here on this session is the one that appends to its own tails."""
        table = self.holding.table
        for layer in self.order:
            length = table.lengths[layer]
            if self.reach[layer] <= length:
                continue
            table.claimed = max(table.claimed, self.reach[layer])
            for index, block in enumerate(table.blocks[layer]):
                if self._is_tail(index, length) and not self._others_past(block):
                    block.forget_past(table.end_bytes(block))
                    for other in block.holders:
                        if other is not table:
                            other.writable_until = 0

    # sources and extents

    def _flat(self) -> list[Step]:
        return [step for row in self._steps.values() for step in row]

    def _slow(self) -> bool:
        """Something has to be read from disk, or displaced, before the first copy."""
        for step in self._flat():
            wanted = step.source or step.block
            if step.lender is None and wanted.host_valid_bytes < wanted.disk_valid_bytes:
                return True
            if step.source is not None and self.holding in step.source.places:
                return True
        return False

    def _prepare_sources(self) -> bool:
        """Everything that will be read is on the device of a lender, or whole on the host."""
        pager, holding = self._pager, self.holding
        here = [step.source for step in self._flat() if self._here(step)]
        if here:
            pager.displace(holding, here)
        for step in self._flat():
            wanted = step.source or step.block
            if step.lender is None and wanted.device is None and wanted.disk is not None:
                pager.tiers.fetch(wanted, holding.id)
        return True

    def _acquire(self, wait: bool) -> bool:
        pager, holding = self._pager, self.holding
        fresh = [step for step in self._flat() if step.source or step.block.device is None]
        sizes = [step.block.size_bytes for step in fresh]
        extents = pager.acquire(holding, sizes, self._limit_s) if wait else pager.take_free(holding.id, sizes)
        if extents is None:
            return False
        for step, extent in zip(fresh, extents, strict=True):
            step.extent = extent
        return True

    # maps and copies

    def _map(self, row: list[Step]) -> None:
        if row:
            self._pager.back(self.holding, [step.extent for step in row if step.extent], self._limit_s)
            self.holding.region.map([(step.block.offset, step.extent or step.block.device) for step in row])

    def _issue_layer(self, layer: int, row: list[Step], stream: Stream) -> None:
        """Fill one layer's mapped blocks, then commit them; they are unmapped when that fails."""
        pager, holding, region = self._pager, self.holding, self.holding.region
        arrival = None
        if not any(self.arrival):
            self.begun.record(stream)
        try:
            copied = sum([self._fill(step, stream) for step in row])
            shared = [step for step in row if step.extent is None and step.block.ready is not None]
            for step in shared:
                stream.wait_event(step.block.ready)
            if copied or shared or any(step.lender for step in row):
                arrival = pager.device.event(timing=True)
                arrival.record(stream)
            if arrival is not None and any(step.source for step in row):
                arrival.synchronize()  # the copy takes its source's place, so it must be whole
        except BaseException:
            with contextlib.suppress(DeviceError):  # a failure of what was issued is the one being handled
                stream.synchronize()
            region.unmap([step.block.offset for step in row])
            raise
        if arrival is not None:
            self.arrival[layer] = holding.arrival[layer] = self._last = arrival
        with pager.lock:
            replaced = [block for step in row if (block := self._commit(step, arrival)) is not None]
            pager.lock.notify_all()
            for block in replaced:
                if not block.holders:
                    pager.tiers.discard(block)
        self.bytes += copied

    def _fill(self, step: Step, stream: Stream) -> int:
        """Issue the copies into one mapped block; returns the bytes that come over the link."""
        block, source, device = step.block, step.source, self._pager.device
        target = self.holding.region.tensor[block.offset : block.offset + block.size_bytes]
        if step.lender is not None:
            stream.wait_event(step.lender.pass_done)
            if source is not None:
                if source.ready is not None:
                    stream.wait_event(source.ready)
                size_bytes = self.holding.table.end_bytes(source)
                there = step.lender.region.tensor[source.offset : source.offset + size_bytes]
                if size_bytes:
                    device.copy(target[:size_bytes], there, stream, Direction.D2D)
            return 0
        stored = source or block
        size_bytes = self.holding.table.end_bytes(source) if source else block.host_valid_bytes
        if size_bytes:
            there = stored.host.tensor
            spans = [(at, min(at + PIECE_BYTES, size_bytes)) for at in range(0, size_bytes, PIECE_BYTES)]
            device.copy_all([(target[at:end], there[at:end]) for at, end in spans], stream, Direction.H2D)
        return size_bytes

    def _commit(self, step: Step, ready: object) -> Block | None:
        """The block is mapped here now; the one whose place it took. The pager's lock is held."""
        block, holding = step.block, self.holding
        if step.extent is not None:
            block.device, step.extent = step.extent, None
        if step.lender is None or step.source is not None:
            block.ready = ready
        block.places.add(holding)
        holding.mapped[block.offset] = block
        replaced = None
        if holding.table not in block.holders:
            replaced = holding.table.hold(block.layer, block.index, block)
        block.loading = False
        self._let_go(step)
        return replaced

    def _release(self) -> None:
        """Give back what was claimed and not committed; an extent that cannot be unmapped stays where it is."""
        try:
            while self._ahead:
                self.holding.region.unmap([step.block.offset for step in self._steps[self._ahead[-1]]])
                self._ahead.pop()
        finally:
            with self._pager.lock:
                steps, self._steps = self._steps, {}
                self.holding.displacing = False
                for layer, row in steps.items():
                    for step in row:
                        step.block.loading = False
                        self._let_go(step)
                        if step.extent is not None and layer not in self._ahead:
                            self._pager.pool.give_back(step.extent)
                self._pager.lock.notify_all()

    def _let_go(self, step: Step) -> None:
        """Whoever was read from may move again. The pager's lock is held."""
        if step.lender is not None:
            step.lender.pins -= 1
            step.lender = None
        if step.reading:
            step.source.readers -= 1
            step.reading = False
