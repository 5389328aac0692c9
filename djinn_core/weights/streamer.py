"""Streams layers through the ring, one pass after another, at the speed of the link.

Invariant: what a layer computes with is the block of the position that it asked for. Fills are issued as early as
slots allow: when a layer is released, the copies for the position that takes its slot next are queued at once, behind
an event. Gaps between copies are the whole loss, so this goes on across the border between two passes, but only as far
as it takes to keep the link busy until the next pass begins: whoever waits for the device after a pass waits for what
is queued too, and a whole ring of a large model is 50 ms.

In a pass there is no host synchronisation, no allocation, no new event and no `record_stream`. All copies go out on
one stream, so a fill that is dropped in mid-flight is in order before the one that takes its slot. The thread that
runs the pass issues them: they are asynchronous, and a second thread would only fight it for the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from djinn_core.device.base import Device, Direction
from djinn_core.errors import DeviceError, SessionStateError, TransferError, unloaded
from djinn_core.interrupts import Uninterrupted
from djinn_core.weights.plan import Plan
from djinn_core.weights.ring import Ring, Slot, SlotState, SlotStep

BORDER_BYTES = 512 << 20  # queued for the next pass at the end of one, at least: 10 ms of a PCIe 5 link

Rebinding = Sequence[tuple[torch.nn.Parameter | torch.Tensor, torch.Tensor]]


@dataclass
class PassCount:
    """What one pass moved.

    Attributes:
        first_layer: where the pass entered.
        layers: the streamed layers that it read, in order.
        moved_bytes: bytes that crossed the link for them, counted as each copy was issued.
        planned_bytes: what the plan says for the same layers.
        dropped_bytes: bytes of prefetched layers that were given up, because the pass went elsewhere.
    """

    first_layer: int = 0
    layers: list[int] = field(default_factory=list)
    moved_bytes: int = 0
    planned_bytes: int = 0
    dropped_bytes: int = 0


class Streamer:
    """A `WeightsProvider` over a plan: resident layers cost nothing, streamed ones come through the ring.

    Call it from one thread at a time (the turn sees to that).

    Attributes:
        last_pass: what the last finished pass moved.
        total_moved_bytes: bytes moved since the start, dropped ones included.
        inference_only: True when something streams; a backward pass would read other layers' weights.
    """

    def __init__(
        self,
        device: Device,
        plan: Plan,
        blocks: Mapping[int, torch.Tensor],
        slots: Sequence[torch.Tensor],
        rebinding: Mapping[tuple[int, int], Rebinding] | None = None,
    ) -> None:
        """
        Args:
            blocks: for each streamed layer its pinned uint8 block, `plan.link_bytes[layer]` long.
            slots: `plan.slots` uint8 tensors of `plan.slot_bytes` on the device.
            rebinding: for each (layer, slot) the parameters to point into that slot; None where addresses are stable.
        """
        self.plan = plan
        self.inference_only = bool(plan.streamed)
        self.last_pass = PassCount()
        self.total_moved_bytes = 0
        self._device = device
        self._blocks = blocks
        self._arrivals = slots  # where copies land
        self._rebinding = rebinding
        self._index = [-1] * len(plan.layer_bytes)
        for index, layer in enumerate(plan.streamed):
            self._index[layer] = index
        self._ring = Ring([Slot(i, device.event(), device.event()) for i in range(plan.slots)])
        self._h2d = device.stream() if plan.streamed else None
        self._copies: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._border = self._border_layers()
        self._base = 0  # the position of streamed layer 0 in the running pass
        self._next = 0  # the position after the one that was read last
        self._count: PassCount | None = None
        self._closed = False

    # the provider's side

    def begin_pass(self, first_layer: int) -> None:
        """Begin a pass that enters at `first_layer`: aim the ring there and fill what is missing."""
        if self._closed:
            raise unloaded()
        index = next((i for i, layer in enumerate(self.plan.streamed) if layer >= first_layer), None)
        self._count = PassCount(first_layer)
        if index is None:
            return
        depth = len(self.plan.streamed)
        self._base = -((index - self._next) // depth) * depth  # the first pass that meets `index` from `_next` on
        try:
            self._seek(self._base + index)
        except DeviceError:
            self._count = None
            raise

    def acquire(self, layer: int) -> None:
        """Make the current stream wait until `layer` is in place."""
        index = self._index[layer]
        if index >= 0:
            with Uninterrupted():
                self._acquire(layer, index)

    def _acquire(self, layer: int, index: int) -> None:
        position = self._base + index
        slot = self._ring.slot_of(position)
        if not slot.holds(position):
            self._seek(position)
        try:
            self._device.current_stream().wait_event(slot.ready)
        except DeviceError:
            self._drop(slot)
            raise
        slot.step(SlotStep.ACQUIRE)
        self._next = position + 1
        count = self._count
        count.layers.append(layer)
        count.moved_bytes += slot.filled_bytes
        count.planned_bytes += self.plan.link_bytes[layer]
        if self._rebinding is not None:
            for parameter, memory in self._rebinding[layer, slot.index]:
                parameter.data = memory

    def release(self, layer: int) -> None:
        """Give the layer's slot to the position that wants it next, once the current stream is done with it."""
        index = self._index[layer]
        if index >= 0:
            with Uninterrupted():
                self._give_on(index)

    def _give_on(self, index: int) -> None:
        position = self._base + index
        slot = self._ring.slot_of(position)
        if slot.state is not SlotState.IN_USE or slot.position != position:
            return  # acquiring it failed
        self._release(slot)
        following = position + len(self._ring)
        if following < self._base + len(self.plan.streamed) + self._border:
            self._fill(following)

    def end_pass(self) -> None:
        """End the pass, however it went.

        Raises:
            TransferError: other bytes were moved than planned, so the layers cannot have been right.
        """
        count, self._count = self._count, None
        self.last_pass = count
        for slot in self._ring.slots:
            if slot.state is SlotState.IN_USE:
                self._release(slot)
        if count.moved_bytes != count.planned_bytes:
            self.empty()
            raise TransferError(
                f"the pass moved {count.moved_bytes:,} bytes for {len(count.layers)} layers, the plan says "
                f"{count.planned_bytes:,}; its output is wrong and must not be used; the ring was emptied"
            )

    def empty(self) -> None:
        """Forget what the ring holds, so that the next pass begins cold. Not during a pass."""
        if self._count is not None:
            raise SessionStateError("the ring cannot be emptied during a pass")
        for slot in self._ring.slots:
            self._drop(slot)

    def close(self) -> None:
        """Stop for good, and wait for queued work; the caller then takes the memory away.

        Raises:
            DeviceError: the device is lost. A failed prefetch that no layer read is not an error.
        """
        if not self._closed:
            self._closed = True
            with suppress(DeviceError):
                self._device.synchronize()
            self._device.synchronize()

    # inside

    def _border_layers(self) -> int:
        """How many of a pass's first layers are queued before it begins, where slots allow."""
        size_bytes = count = 0
        for layer in self.plan.streamed:
            if size_bytes >= BORDER_BYTES:
                break
            size_bytes += self.plan.link_bytes[layer]
            count += 1
        return count

    def _seek(self, position: int) -> None:
        """Aim the ring at `position`: keep what is right, drop what is elsewhere, fill what is missing."""
        for wanted in self._ring.window(position):
            slot = self._ring.slot_of(wanted)
            if not slot.holds(wanted):
                self._drop(slot)
                self._fill(wanted)

    def _release(self, slot: Slot) -> None:
        slot.consumed.record(self._device.current_stream())
        slot.step(SlotStep.RELEASE)

    def _drop(self, slot: Slot) -> None:
        if slot.state in (SlotState.FILLING, SlotState.READY):
            if self._count is not None:
                self._count.dropped_bytes += slot.filled_bytes
            slot.step(SlotStep.DROP)

    def _fill(self, position: int) -> None:
        """Queue the copies of the layer at `position` behind the event of the slot's former holder."""
        slot = self._ring.slot_of(position)
        layer = self.plan.streamed[position % len(self.plan.streamed)]
        slot.step(SlotStep.FILL)
        slot.position = position
        slot.filled_bytes = 0
        try:
            self._bring(layer, slot)
        except DeviceError:
            slot.step(SlotStep.DROP)
            raise
        self.total_moved_bytes += slot.filled_bytes
        slot.step(SlotStep.FILLED)

    def _bring(self, layer: int, slot: Slot) -> None:
        """Queue what puts `layer` into the slot, count its copies, and record `ready` behind it."""
        self._wait_consumed(slot)
        self._copy(layer, slot, slot.index)
        slot.ready.record(self._h2d)

    def _copy(self, layer: int, slot: Slot, arrival: int) -> None:
        """Queue the copies of `layer` into that arrival, counted to `slot`."""
        stream = self._h2d
        for dst, src in self._copy_list(layer, arrival):
            self._device.copy(dst, src, stream, Direction.H2D)
            slot.filled_bytes += dst.numel()

    def _wait_consumed(self, slot: Slot) -> None:
        self._h2d.wait_event(slot.consumed)

    def _copy_list(self, layer: int, arrival: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The chunks of `layer` for that arrival, as views made once."""
        copies = self._copies.get((layer, arrival))
        if copies is None:
            block, memory = self._blocks[layer], self._arrivals[arrival]
            copies = [(memory[at : at + n], block[at : at + n]) for at, n in self.plan.chunks(layer)]
            self._copies[layer, arrival] = copies
        return copies
