"""GPU memory as a cache in front of host memory, for model weights and paused inference sessions.

    import djinn_core as djinn

    model = djinn.load("llama-2-13b", dtype="bfloat16", budget_bytes=8 * 10**9)
    session = djinn.open_session(model, max_length=4096)

Names are imported when first used, so that `djinn_core.errors` and the tools that only read results need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from djinn_core.errors import (
    BreakpointError,
    CapacityError,
    ConfigError,
    DeviceError,
    DjinnError,
    EditError,
    IntegrityError,
    OutOfDeviceMemory,
    OutOfDisk,
    OutOfHostMemory,
    PinningRefused,
    SessionStateError,
    TransferError,
    UnsupportedModel,
    UsageError,
    WeightsError,
    WorkerError,
)

if TYPE_CHECKING:
    from djinn_core.memory import Memory
    from djinn_core.runtime import Runtime, load, load_session, open_session
    from djinn_core.sessions import (
        Ablate,
        Add,
        Breakpoint,
        Checkpoint,
        Edit,
        Policy,
        ProjectOut,
        Replace,
        Sampling,
        Scale,
        Session,
        SessionInfo,
        SessionState,
        edits,
    )

__all__ = [
    "Ablate",
    "Add",
    "Breakpoint",
    "BreakpointError",
    "CapacityError",
    "Checkpoint",
    "ConfigError",
    "DeviceError",
    "DjinnError",
    "Edit",
    "EditError",
    "IntegrityError",
    "Memory",
    "OutOfDeviceMemory",
    "OutOfDisk",
    "OutOfHostMemory",
    "PinningRefused",
    "Policy",
    "ProjectOut",
    "Replace",
    "Runtime",
    "Sampling",
    "Scale",
    "Session",
    "SessionInfo",
    "SessionState",
    "SessionStateError",
    "TransferError",
    "UnsupportedModel",
    "UsageError",
    "WeightsError",
    "WorkerError",
    "edits",
    "load",
    "load_session",
    "open_session",
]

_HOMES = {
    "djinn_core.memory": ("Memory",),
    "djinn_core.runtime": ("Runtime", "load", "load_session", "open_session"),
    "djinn_core.sessions": (
        "Ablate",
        "Add",
        "Breakpoint",
        "Checkpoint",
        "Edit",
        "Policy",
        "ProjectOut",
        "Replace",
        "Sampling",
        "Scale",
        "Session",
        "SessionInfo",
        "SessionState",
        "edits",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'djinn_core' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
