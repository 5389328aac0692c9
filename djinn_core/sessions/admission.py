"""Admission: a session is opened only if all tiers together could hold everyone at their longest."""

from __future__ import annotations

from collections.abc import Iterable

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.memory.extents import ExtentPool
from djinn_core.memory.ledger import Kind
from djinn_core.sessions.blocks import Layout
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.tiers import Tiers


def admit(layout: Layout, holdings: Iterable[Holding], pool: ExtentPool, tiers: Tiers, staging_bytes: int = 0) -> None:
    """Return when one more session of `layout` fits.

    Raises:
    OutOfDeviceMemory: it does not, with needed and free bytes, and the room of every tier; nothing changed.
    """
    open_now = list(holdings)
    device_bytes = pool.budget_bytes - sum(size for (kind, _), size in pool.usage().held.items() if kind is not Kind.KV)
    device_bytes -= staging_bytes
    if layout.total_bytes > device_bytes:
        raise OutOfDeviceMemory(
            f"a session of {layout.max_length} tokens does not fit the device beside weights and staging; open it "
            "shorter, or give a larger budget_bytes",
            needed_bytes=layout.total_bytes,
            free_bytes=device_bytes,
        )
    rooms = {
        "device": device_bytes,
        "host": tiers.host.free_bytes + _host_bytes(open_now),
        "disk": tiers.disk.budget_bytes if tiers.disk else 0,
    }
    promised = sum(holding.layout.total_bytes for holding in open_now)
    free_bytes = sum(rooms.values()) - promised
    if layout.total_bytes > free_bytes:
        free_now = {"device": pool.free_bytes, "host": tiers.host.free_bytes, "disk": tiers.disk_free_bytes}
        named = ", ".join(f"{name} {size:,}, now free {free_now[name]:,}" for name, size in rooms.items())
        raise OutOfDeviceMemory(
            f"{len(open_now)} open sessions may take {promised:,} bytes of what sessions can have ({named}); "
            "close one, or raise budget_bytes, host_bytes or disk_bytes",
            needed_bytes=layout.total_bytes,
            free_bytes=max(0, free_bytes),
        )


def _host_bytes(holdings: list[Holding]) -> int:
    """Host memory that sessions hold now; it counts as theirs."""
    blocks = {b for h in holdings for b in h.table if b.host is not None}
    blocks |= {b for h in holdings for c in h.checkpoints for b in c.table if b.host is not None}
    blocks |= {b for h in holdings for b in h.orphans if b.host is not None}
    behind = sum(behind.host_bytes for h in holdings if (behind := h.behind) is not None)
    return sum(block.size_bytes for block in blocks) + behind
