"""Admission: a session is opened only if all tiers together could hold everyone at their longest, and could swap.

Where not all fit the device, whoever comes back needs one to leave for him. On the host both lie at once for a moment,
the one until the device has it, the other as soon as it is written back. So the host needs room for two, and of all
tiers together the room of one is left free; else some that were admitted could hardly ever go on.
"""

from __future__ import annotations

from collections.abc import Iterable

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.memory.extents import ExtentPool
from djinn_core.memory.ledger import Kind
from djinn_core.sessions.blocks import Layout, host_held_bytes
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.tiers import Tiers


def admit(layout: Layout, holdings: Iterable[Holding], pool: ExtentPool, tiers: Tiers, staging_bytes: int = 0) -> None:
    """Return when one more session of `layout` fits. Checkpoints are not counted: how many, nobody knows.

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
    if promised + layout.total_bytes <= device_bytes:
        return
    largest = max(layout.total_bytes, *(holding.layout.total_bytes for holding in open_now))
    free_now = {"device": pool.free_bytes, "host": tiers.host.free_bytes, "disk": tiers.disk_free_bytes}
    named = ", ".join(f"{name} {size:,}, now free {free_now[name]:,}" for name, size in rooms.items())
    if 2 * largest > rooms["host"]:
        raise OutOfDeviceMemory(
            f"{len(open_now)} open sessions and another one do not fit the device together, and to swap them the host "
            f"needs room for two, one that comes back and one that leaves for it ({named}); close one, or raise "
            "budget_bytes or host_bytes",
            needed_bytes=2 * largest,
            free_bytes=rooms["host"],
        )
    free_bytes = sum(rooms.values()) - promised - largest
    if layout.total_bytes > free_bytes:
        raise OutOfDeviceMemory(
            f"{len(open_now)} open sessions may take {promised:,} bytes of what sessions can have ({named}), and "
            f"{largest:,} stay free to swap them; close one, or raise budget_bytes, host_bytes or disk_bytes",
            needed_bytes=layout.total_bytes,
            free_bytes=max(0, free_bytes),
        )


def _host_bytes(holdings: list[Holding]) -> int:
    """Host memory that sessions hold now; it counts as theirs."""
    behind = sum(behind.host_bytes for h in holdings if (behind := h.behind) is not None)
    return host_held_bytes(set().union(*(holding.stored for holding in holdings))) + behind
