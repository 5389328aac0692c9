"""Standing extents that boundaries pass through, mapped once, so that a resume's first copy waits for no map.

A resume takes an inbound slot, issues the copy of its boundary into it at once, on the slot's own stream, and gives the
slot back when the pass has read it; the stream is told then to wait for that, so that no copy begins with a question. A
stop writes its boundary through the outbound slot, so that torch's allocator has the activation back at once. Inbound
slots are taken before the turn and given back within it, the outbound one is used only within it, so nobody waits for a
slot while holding what another one needs.

Not taken: pooled extents mapped per resume. A map and its grant under load cost as much as the whole copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

import torch

from djinn_core.device.base import Device, Direction, Event, Stream
from djinn_core.errors import DeviceError
from djinn_core.interrupts import wait_for
from djinn_core.memory.extents import Extent, ExtentPool
from djinn_core.memory.hosttier import HostBlock
from djinn_core.memory.ledger import Kind
from djinn_core.memory.regions import Region
from djinn_core.turn import Way

INBOUND_SLOTS = 3
Acquire = Callable[[int, Kind, str], Extent]


class Slot:
    """One standing extent.

    Attributes:
        bytes: uint8 over all of it.
        stream: the one that its copies are on.
        fill: issues a copy of host memory into it.
        ready: timing event behind the copy into it.
        filled: on an outbound slot, behind what wrote it.
        free: after this event it may be overwritten.
    """

    def __init__(self, device: Device, pool: ExtentPool, acquire: Acquire, size_bytes: int, stream: Stream) -> None:
        self._device = device
        self._pool = pool
        self.stream = stream
        self.free = device.event()
        self.filled = device.event()
        self.renew(device)
        self._extent = acquire(size_bytes, Kind.STAGING, "staging")
        self.size_bytes = self._extent.size_bytes
        self._region = None
        try:
            self._region = Region(device, self.size_bytes)
            self._region.map([(0, self._extent)])
        except BaseException:
            self._pool.give_back(self._extent)
            if self._region is not None:
                self._region.close()
            raise
        self.bytes = self._region.tensor
        self.fill = device.copier(self.bytes, stream, Direction.H2D)

    def renew(self, device: Device) -> None:
        """A fresh timing event: a trace keeps that of its own resume."""
        self.ready = device.event(timing=True)

    def close(self) -> None:
        with contextlib.suppress(DeviceError):  # whoever wanted the copy has been told
            self.free.synchronize()
        with contextlib.suppress(DeviceError):
            self._device.drain(self.stream)
        self._pool.give_back(self._region.unmap([0])[0])
        self._region.close()


class Staging:
    """The slots of one runtime. `grow` makes them large enough; it is called when a session is opened."""

    def __init__(self, device: Device, pool: ExtentPool, acquire: Acquire) -> None:
        self._device = device
        self._pool = pool
        self._acquire = acquire
        self._growing = threading.Lock()  # held while larger slots are made, for which others may have to be evicted
        self._changed = threading.Condition()
        self._idle: deque[Slot] = deque()
        self._slots: list[Slot] = []
        self._outbound: Slot | None = None
        self._storing = threading.Lock()  # held while the outbound slot is written to, or replaced
        self.idle_stream = device.stream(-1)  # never has work: what is recorded there is done
        self.out_stream = device.stream(-1)

    @property
    def idle(self) -> bool:
        """Another resume would find a slot."""
        return bool(self._idle)

    def growth_bytes(self, size_bytes: int) -> int:
        """What `grow` would take of the device besides what the slots hold now."""
        now = self._outbound.size_bytes if self._outbound is not None else 0
        wanted = self._pool.rounded(size_bytes)
        return max(0, wanted - now) * (INBOUND_SLOTS + 1)

    def grow(self, size_bytes: int) -> None:
        """Slots of at least `size_bytes`. Smaller ones go when they are idle.

        Raises:
            OutOfDeviceMemory: there is no room; the slots are as they were.
        """
        with self._growing:
            if self._outbound is not None and self._outbound.size_bytes >= size_bytes:
                return
            new: list[Slot] = []
            try:
                for number in range(INBOUND_SLOTS + 1):
                    stream = self._device.stream(-1) if number < INBOUND_SLOTS else self.out_stream
                    new.append(Slot(self._device, self._pool, self._acquire, size_bytes, stream))
            except BaseException:
                for slot in new:
                    slot.close()
                raise
            old = self._replace(new)
        for slot in old:
            slot.close()

    def _replace(self, new: list[Slot]) -> list[Slot]:
        """Use the `new` slots, the last one outbound; those that are to go."""
        with self._changed:
            with self._storing:
                outbound, self._outbound = self._outbound, new.pop()
            idle, self._idle, self._slots = self._idle, deque(new), new
            old = [outbound] if outbound else []
            with contextlib.suppress(IndexError):  # one that is taken meanwhile goes when it is given back
                while True:
                    old.append(idle.popleft())
            self._changed.notify_all()
        return old

    def take(self, way: Way) -> Slot:
        """An inbound slot; waits for another resume's when none is idle, and out of the way: a pass may have it."""
        try:
            return self._idle.popleft()
        except IndexError:
            way.leave()
            with self._changed:
                wait_for(self._changed, lambda: self._idle)
                return self._idle.popleft()

    def give_back(self, slot: Slot) -> None:
        """The slot may be taken again; the stream order keeps its readers and the next writer apart."""
        try:
            slot.renew(self._device)
        finally:
            with self._changed:
                wanted = slot in self._slots
                if wanted:
                    self._idle.append(slot)
                    self._changed.notify()
        if not wanted:
            slot.close()

    def load(self, slot: Slot, source: HostBlock) -> None:
        """Issue the copy of a boundary into `slot`; done at `slot.ready`."""
        slot.fill(source)
        slot.ready.record(slot.stream)

    def read(self, slot: Slot, compute: Stream) -> None:
        """What `compute` has now is the last that reads `slot`; the next copy into it waits for that."""
        slot.free.record(compute)
        slot.stream.wait_event(slot.free)

    def store(self, hidden: torch.Tensor, target: torch.Tensor, written: Event) -> None:
        """Write `hidden` (on the compute stream) to pinned `target`, asynchronously; done at `written`."""
        with self._storing:
            self._store(hidden, target, written)

    def _store(self, hidden: torch.Tensor, target: torch.Tensor, written: Event) -> None:
        slot = self._outbound
        size_bytes = hidden.numel() * hidden.element_size()
        compute = self._device.current_stream()
        try:
            compute.wait_event(slot.free)
        except DeviceError:  # the copy before failed; whoever wanted it is told by its own event
            slot.free = self._device.event()
        slot.bytes[:size_bytes].view(hidden.dtype).view(hidden.shape).copy_(hidden)
        slot.filled.record(compute)
        slot.stream.wait_event(slot.filled)
        self._device.copy(target, slot.bytes[:size_bytes], slot.stream, Direction.D2H)
        slot.free.record(slot.stream)
        written.record(slot.stream)

    def close(self) -> None:
        with self._changed:
            slots = [*self._idle, *([self._outbound] if self._outbound else [])]
            self._idle.clear()
            self._slots = []
            self._outbound = None
        for slot in slots:
            slot.close()
