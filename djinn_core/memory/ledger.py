"""Who holds the memory: one frozen answer, read from the pools that hold it, never counted a second time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from djinn_core.memory.disktier import DiskTier
    from djinn_core.memory.extents import ExtentPool
    from djinn_core.memory.hosttier import HostTier


class Kind(Enum):
    """What an extent is held for."""

    RESIDENT_WEIGHTS = "resident weights"
    RING = "weight ring"
    KV = "KV cache"
    STAGING = "staging"


@dataclass(frozen=True)
class Memory:
    """Where the bytes are, at one moment. `str()` prints it as a table.

    `budget_bytes` is what the process may hold on the device: `context_bytes` (the driver's own, measured) and
    `activation_bytes` (reserved for torch's allocator) besides the extents. `pooled_bytes` are extents that no one
    holds and that are not yet back with the driver; they are part of `free_bytes`. What a pass has been promised counts
    as its session's, a moment before it is created.
    """

    budget_bytes: int
    context_bytes: int
    activation_bytes: int
    resident_weights_bytes: int
    ring_bytes: int
    staging_bytes: int
    kv_bytes: int
    pooled_bytes: int
    free_bytes: int
    kv_by_session: Mapping[str, int] = field(default_factory=dict)
    host_budget_bytes: int = 0
    host_held_bytes: int = 0
    host_pinned_bytes: int = 0
    host_free_bytes: int = 0
    disk_budget_bytes: int = 0
    disk_held_bytes: int = 0
    disk_free_bytes: int = 0

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), in the order of the table; sessions under the KV cache they add up to."""
        rows = [
            ("device budget", self.budget_bytes),
            ("  context", self.context_bytes),
            ("  activations (reserved)", self.activation_bytes),
            ("  resident weights", self.resident_weights_bytes),
            ("  weight ring", self.ring_bytes),
            ("  staging", self.staging_bytes),
            ("  KV cache", self.kv_bytes),
            *((f"    {owner}", size) for owner, size in self.kv_by_session.items()),
            ("  free", self.free_bytes),
            ("    of it pooled", self.pooled_bytes),
        ]
        if self.host_budget_bytes:
            rows += [
                ("host budget", self.host_budget_bytes),
                ("  held", self.host_held_bytes),
                ("  free", self.host_free_bytes),
                ("  pinned", self.host_pinned_bytes),
            ]
        if self.disk_budget_bytes:
            rows += [
                ("disk budget", self.disk_budget_bytes),
                ("  held", self.disk_held_bytes),
                ("  free", self.disk_free_bytes),
            ]
        return rows

    def __str__(self) -> str:
        rows = [("memory", "bytes", "MiB"), *((what, f"{n:,}", f"{n / 2**20:,.1f}") for what, n in self.rows())]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{w:<{widths[0]}}  {n:>{widths[1]}}  {mib:>{widths[2]}}" for w, n, mib in rows)


class Ledger:
    """Reads the pools. The fixed reservations (`context_bytes`, `activation_bytes`) are given by the runtime.

    Attributes:
        budget_bytes: of the whole process; the pool's plus the two reservations when it is None.
    """

    def __init__(
        self,
        pool: ExtentPool,
        host: HostTier | None = None,
        disk: DiskTier | None = None,
        *,
        context_bytes: int = 0,
        activation_bytes: int = 0,
        budget_bytes: int | None = None,
    ) -> None:
        self._pool, self._host, self._disk = pool, host, disk
        self._context_bytes, self._activation_bytes = context_bytes, activation_bytes
        self.budget_bytes = budget_bytes

    def snapshot(self) -> Memory:
        """The memory now. The pool's figures belong to one moment; the tiers' follow right after."""
        usage = self._pool.usage()
        by_kind = dict.fromkeys(Kind, 0)
        by_session: dict[str, int] = {}
        for (kind, owner), size_bytes in sorted(usage.held.items(), key=lambda item: item[0][1]):
            by_kind[kind] += size_bytes
            if kind is Kind.KV:
                by_session[owner] = size_bytes
        fixed = self._context_bytes + self._activation_bytes
        host, disk = self._host, self._disk
        return Memory(
            budget_bytes=self._pool.budget_bytes + fixed if self.budget_bytes is None else self.budget_bytes,
            context_bytes=self._context_bytes,
            activation_bytes=self._activation_bytes,
            resident_weights_bytes=by_kind[Kind.RESIDENT_WEIGHTS],
            ring_bytes=by_kind[Kind.RING],
            staging_bytes=by_kind[Kind.STAGING],
            kv_bytes=by_kind[Kind.KV],
            pooled_bytes=usage.pooled_bytes,
            free_bytes=self._pool.budget_bytes - sum(by_kind.values()),
            kv_by_session=MappingProxyType(by_session),
            host_budget_bytes=host.budget_bytes if host else 0,
            host_held_bytes=host.held_bytes if host else 0,
            host_pinned_bytes=host.pinned_bytes if host else 0,
            host_free_bytes=host.free_bytes if host else 0,
            disk_budget_bytes=disk.budget_bytes if disk else 0,
            disk_held_bytes=disk.held_bytes if disk else 0,
            disk_free_bytes=disk.free_bytes if disk else 0,
        )
