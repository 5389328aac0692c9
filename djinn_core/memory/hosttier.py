"""Pinned host memory under a budget: exact blocks for weights, slabs for sessions.

Invariant: everything handed out under ``pinning="required"`` is registered with the device, so that copies are
asynchronous; exact blocks plus slabs never exceed the budget. Not taken: `torch.empty(pin_memory=True)`, which rounds
each block up to a power of two and pins on one thread. Mapping, faulting by many threads and registering afterwards is
faster, and leaves huge pages behind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch

from djinn_core.device import libc
from djinn_core.device.base import Device
from djinn_core.device.spans import FreeSpans
from djinn_core.errors import ConfigError, DjinnError, OutOfHostMemory, UsageError
from djinn_core.memory.hostmapping import HostMapping

SLAB_BYTES = 512 << 20
SLABS_A_BUDGET = 16  # a small budget is cut into this many slabs, so that one does not take it all
_NOTHING = torch.empty(0, dtype=torch.uint8)


class HostBlock:
    """A piece of the host tier.

    Attributes:
        tensor: uint8 of exactly `size_bytes`; it dies with `free`.
        held_bytes: what it takes of the tier's budget.
        pinned: registered with the device. Always true unless the tier's pinning is optional.
    """

    def __init__(self, tier: HostTier, address: int, size_bytes: int, owner: str, home: HostMapping | _Slab) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.held_bytes = home.spans.rounded(size_bytes) if isinstance(home, _Slab) else home.size_bytes
        self.owner = owner
        self.pinned = home.pinned
        self.tensor: torch.Tensor = libc.tensor_at(address, size_bytes)
        self._tier = tier
        self._home: HostMapping | _Slab | None = home

    def free(self) -> None:
        """Give it back. No queued copy may touch it; its tensors must not be used again."""
        self._tier._free(self)


class _Slab(HostMapping):
    """A mapping that is handed out in small blocks."""

    def __init__(self, device: Device, size_bytes: int, threads: int, optional: bool) -> None:
        super().__init__(device, size_bytes, threads, optional, ())
        self.spans = FreeSpans(size_bytes, device.granularity_bytes)


class HostTier:
    """Host memory, at most `budget_bytes`. Thread-safe.

    `pinning`: ``"required"`` raises when the operating system refuses to page-lock; ``"optional"`` goes on with
    pageable memory, on which copies block the caller, and says so in `pinned`. `ahead_bytes`: a background thread
    keeps this much pinned and unused, so that whoever allocates need not wait for pinning. `threads` fault memory in
    (default: all cores, at most 16).

    Raises:
        ConfigError: another word for `pinning`.
    """

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        *,
        pinning: Literal["required", "optional"] = "required",
        threads: int | None = None,
        ahead_bytes: int = 0,
    ) -> None:
        if pinning not in ("required", "optional"):
            raise ConfigError(f"pinning is {pinning!r}; allowed are 'required' and 'optional'")
        self._device = device
        self._granularity = device.granularity_bytes
        self._optional = pinning == "optional"
        self._threads = threads or min(16, len(os.sched_getaffinity(0)))
        self.budget_bytes = budget_bytes // libc.PAGE_BYTES * libc.PAGE_BYTES
        self._slab_bytes = min(
            SLAB_BYTES, max(1, budget_bytes // SLABS_A_BUDGET // self._granularity) * self._granularity
        )
        self._lock = threading.Condition()
        self._growing = threading.Lock()  # held while a slab is made; taken before `_lock`
        self._slabs: list[_Slab] = []
        self._mapped_bytes = 0  # exact blocks and slabs, and what is being made
        self._pageable_bytes = 0
        self._held_bytes = 0
        self._ahead_bytes = ahead_bytes
        self._closed = False
        self._expected_bytes = 0
        self._ahead: threading.Thread | None = None
        if ahead_bytes:
            self._start_ahead()

    def _start_ahead(self) -> None:
        self._ahead = threading.Thread(target=self._pin_ahead, name="djinn-pin-ahead", daemon=True)
        self._ahead.start()

    @property
    def held_bytes(self) -> int:
        """Bytes of blocks in use, rounded as they are handed out."""
        return self._held_bytes

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self._held_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes registered with the device, in use or ahead."""
        return self._mapped_bytes - self._pageable_bytes

    @property
    def pinned(self) -> bool:
        """Nothing that this tier holds is pageable."""
        return self._pageable_bytes == 0

    def issuing(self) -> AbstractContextManager[None]:
        """Within it copies from and to this tier are issued with the interpreter kept (`Device.keeping_interpreter`).

        Unless something is pageable, for a copy of that may block: then it is given away. For blocks of sessions; the
        copy of a resume's boundary keeps it in any case.
        """
        return self._device.keeping_interpreter(self.pinned)

    def allocate_exact(self, size_bytes: int, owner: str, *, cuts: Sequence[int] = ()) -> HostBlock:
        """A block with a mapping of its own, given back to the operating system by `free`. For weights.

        More than 32 GiB is registered in pieces that end at `cuts` (offsets, multiples of 4096), which no copy may
        cross.

        Raises:
            OutOfHostMemory: the budget or the machine is full. Nothing changed.
            PinningRefused: the memory could not be page-locked. Nothing changed.
        """
        mapped_bytes = -(-max(1, size_bytes) // libc.PAGE_BYTES) * libc.PAGE_BYTES
        self._claim(mapped_bytes, owner)
        try:
            mapping = HostMapping(self._device, mapped_bytes, self._threads, self._optional, cuts)
        except BaseException:
            self._unclaim(mapped_bytes)
            raise
        with self._lock:
            self._held_bytes += mapped_bytes
            self._pageable_bytes += 0 if mapping.pinned else mapped_bytes
        return HostBlock(self, mapping.address, size_bytes, owner, mapping)

    def allocate(self, size_bytes: int, owner: str) -> HostBlock:
        """A block out of the slabs, in units of the device's granularity. For sessions.

        At once while a slab has room; else a slab is made first (a third of a second).

        Raises:
            OutOfHostMemory: the budget or the machine is full. Nothing changed.
            PinningRefused: a new slab could not be page-locked. Nothing changed.
        """
        block = self.take_ready(size_bytes, owner)
        while block is None:
            with self._growing:
                block = self.take_ready(size_bytes, owner)
                if block is None:
                    self._grow(size_bytes, owner)
                    block = self.take_ready(size_bytes, owner)
        return block

    def prepare(self, size_bytes: int) -> None:
        """Pin until `size_bytes` are ready for `allocate`.

        Raises:
            OutOfHostMemory: the budget has no room for that much; what could be pinned is.
            PinningRefused: as for `allocate`.
        """
        unit = self._granularity
        with self._growing:
            while (missing := size_bytes - self._ready_bytes()) > 0:
                with self._lock:
                    room_bytes = (self.budget_bytes - self._mapped_bytes) // unit * unit
                if not room_bytes:  # a slab made now could only replace another that is ready
                    raise OutOfHostMemory(
                        f"{size_bytes:,} bytes of host memory cannot be made ready within a budget of "
                        f"{self.budget_bytes:,}; ask for less, or raise host_bytes",
                        needed_bytes=missing,
                        free_bytes=0,
                    )
                self._grow(min(missing, self._slab_bytes, room_bytes), "prepare")

    def expect(self, size_bytes: int) -> None:
        """Pin in the background until slabs of `size_bytes` in all stand, used or not, as far as the budget goes.

        Returns at once. What is not there yet when it is wanted is made then.
        """
        with self._lock:
            if self._closed:
                raise UsageError("the host tier is closed")
            self._expected_bytes = size_bytes
            if self._ahead is None or not self._ahead.is_alive():
                if self._short_ahead():
                    self._start_ahead()
            else:
                self._lock.notify_all()

    def close(self) -> None:
        """Give the slabs back. Refused while blocks are held."""
        with self._lock:
            if self._held_bytes:
                raise UsageError(f"{self._held_bytes:,} bytes of host memory are still held; free the blocks first")
            self._closed = True
            self._lock.notify_all()
        if self._ahead is not None:
            self._ahead.join()
        with self._growing:
            self._drop_empty_slabs(self.budget_bytes)

    def take_ready(self, size_bytes: int, owner: str) -> HostBlock | None:
        """A block out of the slabs that stand, as by `allocate`; None when none has room."""
        with self._lock:
            if self._closed:
                raise UsageError("the host tier is closed")
            roomy = [slab for slab in self._slabs if slab.spans.free_bytes >= size_bytes]
            for slab in sorted(roomy, key=lambda slab: slab.spans.free_bytes):  # fill the fullest first
                start = slab.spans.take(size_bytes)
                if start is not None:
                    self._held_bytes += slab.spans.rounded(size_bytes)
                    if self._ahead_bytes:
                        self._lock.notify_all()
                    return HostBlock(self, slab.address + start, size_bytes, owner, slab)
        return None

    def _free(self, block: HostBlock) -> None:
        with self._lock:
            home = block._home
            if home is None:
                raise UsageError(f"host block of {block.owner!r} ({block.size_bytes:,} bytes) was freed before")
            block._home = None
            block.tensor = _NOTHING
            if isinstance(home, _Slab):
                home.spans.give(block.address - home.address, block.size_bytes)
                self._held_bytes -= block.held_bytes
                return
        home.close()
        with self._lock:
            self._held_bytes -= home.size_bytes
            self._mapped_bytes -= home.size_bytes
            self._pageable_bytes -= 0 if home.pinned else home.size_bytes
            self._lock.notify_all()

    def _ready_bytes(self) -> int:
        with self._lock:
            return sum(slab.spans.free_bytes for slab in self._slabs)

    def _grow(self, size_bytes: int, owner: str) -> None:
        """One more slab that holds `size_bytes`. `_growing` is held."""
        unit = self._granularity
        needed_bytes = max(1, -(-size_bytes // unit)) * unit
        with self._lock:
            room_bytes = (self.budget_bytes - self._mapped_bytes) // unit * unit
        slab_bytes = max(needed_bytes, min(self._slab_bytes, room_bytes))
        self._claim(slab_bytes, owner)
        try:
            slab = _Slab(self._device, slab_bytes, self._threads, self._optional)
        except BaseException:
            self._unclaim(slab_bytes)
            raise
        with self._lock:
            self._pageable_bytes += 0 if slab.pinned else slab.size_bytes
            self._slabs.append(slab)

    def _claim(self, size_bytes: int, owner: str) -> None:
        """Charge the budget, after dropping empty slabs if it is short."""
        with self._lock:
            if self._closed:
                raise UsageError("the host tier is closed")
            short_bytes = self._mapped_bytes + size_bytes - self.budget_bytes
            if short_bytes <= 0:
                self._mapped_bytes += size_bytes
                return
            droppable = sum(slab.size_bytes for slab in self._slabs if slab.spans.empty)
            if droppable < short_bytes:
                raise OutOfHostMemory(
                    f"the host budget of {self.budget_bytes:,} bytes is full for {owner!r}: {self._held_bytes:,} held, "
                    f"{self._mapped_bytes:,} mapped; free blocks, or raise host_bytes",
                    needed_bytes=size_bytes,
                    free_bytes=self.budget_bytes - self._mapped_bytes + droppable,
                )
            self._drop_empty_slabs(short_bytes)
            self._mapped_bytes += size_bytes

    def _unclaim(self, size_bytes: int) -> None:
        with self._lock:
            self._mapped_bytes -= size_bytes

    def _drop_empty_slabs(self, wanted_bytes: int) -> None:
        with self._lock:
            for slab in [slab for slab in self._slabs if slab.spans.empty]:
                if wanted_bytes <= 0:
                    return
                self._slabs.remove(slab)
                slab.close()
                self._mapped_bytes -= slab.size_bytes
                self._pageable_bytes -= 0 if slab.pinned else slab.size_bytes
                wanted_bytes -= slab.size_bytes

    def _pin_ahead(self) -> None:
        self._device.bind_thread()
        while True:
            with self._lock:
                if self._closed:
                    return
            try:
                with self._growing:
                    with self._lock:
                        wanted = self._short_ahead()
                    if wanted:
                        self._grow(self._granularity, "pinning ahead")
                        continue
            except DjinnError:  # whoever allocates beyond what is ready runs into the same, and is told
                return
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._short_ahead())

    def _short_ahead(self) -> bool:
        """More is to be pinned, and the budget has room. The lock is held."""
        ready = sum(slab.spans.free_bytes for slab in self._slabs)
        in_all = sum(slab.size_bytes for slab in self._slabs)
        wanted = ready < self._ahead_bytes or in_all < self._expected_bytes
        return wanted and self.budget_bytes - self._mapped_bytes >= self._granularity
