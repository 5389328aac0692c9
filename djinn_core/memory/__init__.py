"""Memory: extents (physical), regions (addresses), the host and disk tiers, and the ledger of who holds what."""

from djinn_core.memory.disktier import DiskBlock, DiskTier
from djinn_core.memory.extents import Extent, ExtentPool
from djinn_core.memory.hosttier import HostBlock, HostTier
from djinn_core.memory.ledger import Kind, Ledger, Memory
from djinn_core.memory.regions import Region

__all__ = [
    "DiskBlock",
    "DiskTier",
    "Extent",
    "ExtentPool",
    "HostBlock",
    "HostTier",
    "Kind",
    "Ledger",
    "Memory",
    "Region",
]
