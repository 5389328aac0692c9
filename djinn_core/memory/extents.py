"""Physical device memory under one budget: extents are acquired, given back and reused.

Invariant: held + pooled + leaving bytes never exceed the budget (what was held when it shrank apart). Behind every one
of them is a live handle of the device, or it is held and promised: then the device had room for all promises when the
last one was made. Giving back is O(1) and touches no driver: the memory stays pooled, and a background thread destroys
what is pooled above `reserve_bytes`. Not taken: destroying at once. A session's extents are wanted again soon, and
1.6 GB takes most of a millisecond to release in the hot path. To create them takes as long, and a session that comes
back would do it before its first layer; so each layer's are created when it is mapped.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from djinn_core.device.base import Device
from djinn_core.errors import DeviceError, OutOfDeviceMemory, UsageError
from djinn_core.memory.ledger import Kind

TRIM_AFTER_S = 0.05  # how long a given-back extent may wait to be wanted again before it is destroyed
NAMED_HOLDERS = 3  # how many of the largest holders an out-of-memory message names


@dataclass(eq=False)
class Extent:
    """One piece of physical device memory, charged to (`kind`, `owner`) while it is held.

    `handle` is None while it is promised: the budget has room for it, and nothing lies behind it yet.
    """

    handle: int | None
    size_bytes: int
    kind: Kind
    owner: str
    held: bool = True


@dataclass(frozen=True)
class Usage:
    """A pool at one moment: bytes held by (kind, owner), promised ones too, and those that wait for reuse or to go."""

    held: Mapping[tuple[Kind, str], int]
    pooled_bytes: int


class ExtentPool:
    """Extents of one device, at most `budget_bytes` of them. Thread-safe.

    Pooled extents above `reserve_bytes` are destroyed in the background, so that the driver too sees the memory of a
    paused session go.
    """

    def __init__(self, device: Device, budget_bytes: int, *, reserve_bytes: int = 0) -> None:
        self._device = device
        self._granularity = device.granularity_bytes
        self._budget_bytes = budget_bytes // self._granularity * self._granularity
        self._reserve_bytes = reserve_bytes
        self._changed = threading.Condition()
        self._pooled: dict[int, list[int]] = defaultdict(list)  # size -> handles
        self._pooled_bytes = 0
        self._held: Counter[tuple[Kind, str]] = Counter()
        self._held_bytes = 0
        self._promised_bytes = 0  # of what is held
        self._leaving_bytes = 0  # taken out of the pool, not yet destroyed
        self._trimmer: threading.Thread | None = None
        self._trim_due = False  # the trimmer has been told
        self._closed = False

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def pooled_bytes(self) -> int:
        return self._pooled_bytes + self._leaving_bytes

    @property
    def free_bytes(self) -> int:
        """What could be acquired, in any sizes; below zero while a smaller budget waits for its holders."""
        return self._budget_bytes - self._held_bytes

    def usage(self) -> Usage:
        """Who holds how much, at one moment."""
        with self._changed:
            return Usage({key: size for key, size in self._held.items() if size}, self.pooled_bytes)

    def rounded(self, size_bytes: int) -> int:
        """The size of the extent that `acquire(size_bytes)` gives."""
        return max(1, -(-size_bytes // self._granularity)) * self._granularity

    def acquire(self, size_bytes: int, kind: Kind, owner: str) -> Extent:
        """An extent of at least `size_bytes`, its content undefined.

        A pooled one of the same size if there is one, else a new one; pooled ones of other sizes make room for it.

        Raises:
            OutOfDeviceMemory: the budget, or the device, is full; nothing changed. Give extents back and retry.
        """
        return self._acquire(size_bytes, kind, owner, lambda: False)

    def acquire_all(self, sizes: Sequence[int], kind: Kind, owner: str, *, promise: bool) -> list[Extent]:
        """Extents of all `sizes`, or none.

        With `promise`, and if the device has room for those that are not pooled, these are not created before `back`
        asks for them.

        Raises:
            OutOfDeviceMemory: as for `acquire`.
        """
        got: list[Extent] = []

        @functools.cache
        def may_promise() -> bool:
            """Asked when the first one that is not pooled is due: a session that comes back rarely needs a new one."""
            if not promise:
                return False
            free_bytes = self._device.capacity_bytes - self._device.used_bytes() - self._promised_bytes
            return sum(map(self.rounded, sizes[len(got) :])) <= free_bytes

        try:
            for size_bytes in sizes:
                got.append(self._acquire(size_bytes, kind, owner, may_promise))
        except BaseException:
            for extent in got:
                self.give_back(extent)
            raise
        return got

    def _acquire(self, size_bytes: int, kind: Kind, owner: str, may_promise: Callable[[], bool]) -> Extent:
        size_bytes = self.rounded(size_bytes)
        with self._changed:
            if self._closed:
                raise UsageError("the extent pool is closed")
            handle = self._take_pooled_of(size_bytes)
            while handle is None:
                self._fit(size_bytes)
                if may_promise():
                    self._promised_bytes += size_bytes
                    break
                handle = self._create(size_bytes)
            self._held[kind, owner] += size_bytes
            self._held_bytes += size_bytes
        return Extent(handle, size_bytes, kind, owner)

    def back(self, extent: Extent) -> None:
        """Keep a promise: see to it that there is memory behind a held extent.

        Raises:
            OutOfDeviceMemory: others have filled the device since; the extent is as it was.
        """
        with self._changed:
            while extent.handle is None:
                handle = self._take_pooled_of(extent.size_bytes)
                if handle is None:
                    handle = self._create(extent.size_bytes)
                if handle is not None:
                    extent.handle = handle
                    self._promised_bytes -= extent.size_bytes

    def give_back(self, extent: Extent) -> None:
        """Take an extent back. It must be mapped nowhere, and no queued work may touch it."""
        with self._changed:
            if not extent.held:
                raise UsageError(f"extent of {extent.owner!r} ({extent.size_bytes:,} bytes) was given back before")
            extent.held = False
            key = (extent.kind, extent.owner)
            self._held[key] -= extent.size_bytes
            if not self._held[key]:
                del self._held[key]
            self._held_bytes -= extent.size_bytes
            if extent.handle is None:
                self._promised_bytes -= extent.size_bytes
                return
            self._pooled[extent.size_bytes].append(extent.handle)
            self._pooled_bytes += extent.size_bytes
            if self._pooled_bytes > self._reserve_bytes and not self._trim_due:
                self._wake_trimmer()

    def trim(self, keep_bytes: int = 0) -> int:
        """Destroy pooled extents, largest first, until at most `keep_bytes` are pooled. Returns the bytes destroyed."""
        trimmed = 0
        while True:
            with self._changed:
                taken = self._take_pooled() if self._pooled_bytes > keep_bytes else None
                if taken is None:
                    return trimmed
                self._leaving_bytes += taken[1]
            trimmed += self._destroy_leaving(*taken)

    def resize(self, budget_bytes: int) -> int:
        """Another budget, from now on; returns the bytes held beyond it.

        What is pooled is destroyed as far as that takes. Nothing can be acquired until what is held beyond it has been
        given back; call it again then, and that is destroyed too.
        """
        with self._changed:
            self._budget_bytes = budget_bytes // self._granularity * self._granularity
            while self._held_bytes + self.pooled_bytes > self._budget_bytes and self._make_room():
                pass
            return max(0, self._held_bytes - self._budget_bytes)

    def close(self) -> None:
        """Destroy what is pooled. Refused while extents are held."""
        with self._changed:
            if self._held_bytes:
                raise UsageError(f"{self._held_bytes:,} bytes of extents are still held: {self._holders()}")
            self._closed = True
            self._changed.notify_all()
            trimmer = self._trimmer
        if trimmer is not None:
            trimmer.join()
        self.trim()

    def _fit(self, size_bytes: int) -> None:
        """Make room for it within the budget. The lock is held, but not while it waits."""
        while True:
            if size_bytes > self.free_bytes:
                raise OutOfDeviceMemory(
                    f"the device budget of {self._budget_bytes:,} bytes is full: {self._holders()}",
                    needed_bytes=size_bytes,
                    free_bytes=max(0, self.free_bytes),
                )
            if self._held_bytes + self.pooled_bytes + size_bytes <= self._budget_bytes:
                return
            self._make_room()

    def _create(self, size_bytes: int) -> int | None:
        """A new handle; None when the device was full and room has been made: then look again. The lock is held."""
        try:
            return self._device.create(size_bytes)
        except OutOfDeviceMemory as error:
            if self._make_room():
                return None
            raise OutOfDeviceMemory(
                f"the device has no more memory within the budget of {self._budget_bytes:,} bytes; others use it "
                f"({self._device.used_bytes():,} bytes in use in all), here: {self._holders()}",
                needed_bytes=size_bytes,
                free_bytes=error.free_bytes,
            ) from error

    def _take_pooled_of(self, size_bytes: int) -> int | None:
        """A pooled handle of this very size, if there is one. The lock is held."""
        handles = self._pooled.get(size_bytes)
        if not handles:
            return None
        self._pooled_bytes -= size_bytes
        return handles.pop()

    def _make_room(self) -> bool:
        """Destroy one pooled extent, or wait for one that the trimmer destroys; False if there is none.

        The lock is held, but not while it waits: what the caller knew may have changed.
        """
        if self._destroy_one():
            return True
        if self._leaving_bytes:
            self._changed.wait()
            return True
        return False

    def _destroy_one(self) -> bool:
        taken = self._take_pooled()
        if taken is None:
            return False
        self._leaving_bytes += taken[1]
        try:
            self._device.destroy(taken[0])
        finally:
            self._leaving_bytes -= taken[1]
        return True

    def _take_pooled(self) -> tuple[int, int] | None:
        """A (handle, size) out of the pool, of the largest size. The lock is held."""
        size_bytes = max((size for size, handles in self._pooled.items() if handles), default=0)
        if not size_bytes:
            return None
        self._pooled_bytes -= size_bytes
        return self._pooled[size_bytes].pop(0), size_bytes

    def _destroy_leaving(self, handle: int, size_bytes: int) -> int:
        try:
            self._device.destroy(handle)
        finally:
            with self._changed:
                self._leaving_bytes -= size_bytes
                self._changed.notify_all()
        return size_bytes

    def _wake_trimmer(self) -> None:
        if self._trimmer is None:
            self._trimmer = threading.Thread(target=self._trim_in_background, name="djinn-trimmer", daemon=True)
            self._trimmer.start()
        self._trim_due = True
        self._changed.notify_all()

    def _trim_in_background(self) -> None:
        self._device.bind_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._trim_due)
                if self._closed:
                    return
                self._changed.wait_for(lambda: self._closed, TRIM_AFTER_S)
                if self._closed:
                    return
                self._trim_due = False
            with contextlib.suppress(DeviceError):  # that extent is lost; the next ones are not
                self.trim(self._reserve_bytes)

    def _holders(self) -> str:
        top = self._held.most_common(NAMED_HOLDERS)
        named = ", ".join(f"{kind.value} of {owner} {size:,}" for (kind, owner), size in top)
        more = len(self._held) - len(top)
        return (named or "nobody holds any") + (f", and {more} more" if more else "")
