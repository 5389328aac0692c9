"""Devices: one contract (`base`), the driver (`cuda`) and its emulation without a GPU (`cpu`)."""

from __future__ import annotations

import torch

from djinn_core.device.base import CopyCounts, Device, Direction, Event, Stream
from djinn_core.errors import ConfigError

__all__ = ["CopyCounts", "Device", "Direction", "Event", "Stream", "named_device", "open_device"]


def named_device(name: str) -> str:
    """``"cpu"`` or ``"cuda:N"``: the device that `name` stands for. ``"auto"`` is the first GPU, else ``"cpu"``.

    Raises:
        ConfigError: the name is unknown, or torch sees no such GPU.
    """
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = str(name).partition(":")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise ConfigError(f"device {name!r} is unknown; allowed are 'cpu', 'cuda:N' and 'auto'")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= there:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lacks = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU: it, or the NVIDIA driver, is missing"
        raise ConfigError(
            f"device {name!r} was asked for, and torch {torch.__version__}, {built}, sees {lacks}; "
            "device='cpu' is the emulated one, and needs a budget"
        )
    return f"cuda:{int(index or 0)}"


def open_device(name: str, *, capacity_bytes: int | None = None) -> Device:
    """The device called `name`: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``.

    ``"auto"`` is the first GPU where there is one, else the emulated device. `capacity_bytes` is the size of the
    emulated memory; a real GPU has the memory it has, so only ``"cpu"`` and ``"auto"`` take it.

    Raises:
        ConfigError: the name is unknown, the capacity is missing, or torch sees no such GPU.
        DeviceError: the driver could not be started.
    """
    found = named_device(name)
    if found == "cpu":
        from djinn_core.device.cpu import CpuDevice

        if capacity_bytes is None:
            raise ConfigError("device 'cpu' emulates a memory: say its size with capacity_bytes")
        return CpuDevice(capacity_bytes)
    if capacity_bytes is not None and name != "auto":
        raise ConfigError(f"device {name!r} has its own memory: capacity_bytes is for 'cpu'; cap a GPU by a budget")
    from djinn_core.device.cuda import CudaDevice

    return CudaDevice(int(found.partition(":")[2]))
