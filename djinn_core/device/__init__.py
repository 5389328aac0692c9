"""Devices: one contract (`base`), the driver (`cuda`) and its emulation without a GPU (`cpu`)."""

from __future__ import annotations

import torch

from djinn_core.device.base import CopyCounts, Device, Direction, Event, Stream
from djinn_core.errors import ConfigError

__all__ = ["CopyCounts", "Device", "Direction", "Event", "Stream", "open_device"]


def open_device(name: str, *, capacity_bytes: int | None = None) -> Device:
    """The device called `name`: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``.

    ``"auto"`` is the first GPU where there is one, else the emulated device. `capacity_bytes` is the size of the
    emulated memory; a real GPU has the memory it has, so only ``"cpu"`` and ``"auto"`` take it.

    Raises:
        ConfigError: the name is unknown, the capacity is missing, or torch sees no GPU.
        DeviceError: the driver could not be started.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name, capacity_bytes = "cuda:0", None
        else:
            name = "cpu"
    if name == "cpu":
        from djinn_core.device.cpu import CpuDevice

        if capacity_bytes is None:
            raise ConfigError("device 'cpu' emulates a memory: say its size with capacity_bytes")
        return CpuDevice(capacity_bytes)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise ConfigError(f"device {name!r} is unknown; allowed are 'cpu', 'cuda:N' and 'auto'")
    if capacity_bytes is not None:
        raise ConfigError(f"device {name!r} has its own memory: capacity_bytes is for 'cpu'; cap a GPU by a budget")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch {torch.__version__} sees no GPU; use 'cpu'")
    from djinn_core.device.cuda import CudaDevice

    return CudaDevice(int(index or 0))
