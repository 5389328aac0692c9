"""What a GPU holds for the process besides our extents: the driver's context and kernels, and torch's allocator.

The context cannot be asked for, so it is measured: what the driver reports in use before and after the device is
opened and the usual kernels have run once. It is measured once in a process, since the context stays. torch's part is
capped by its own means.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pynvml
import torch
from cuda.bindings import driver

from djinn_core.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from djinn_core.device import Device

MARGIN_BYTES = 192 << 20  # for kernels that are loaded later, when a shape first needs them
ASSUMED_BYTES = 1 << 30  # where the context was there before us and the driver does not say what it takes

_measured: dict[str, int] = {}
_lock = threading.Lock()


class ContextMeasurement:
    """Begun before a device is opened, finished after.

    Attributes:
        free_before_bytes: free memory of the whole device at the beginning.
    """

    def __init__(self, device_name: str) -> None:
        self._name = device_name
        index = torch.device(device_name).index or 0
        self._uuid, self._was_active = _identify(index)
        with _nvml_device(self._uuid) as handle:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        self._used_before, self.free_before_bytes = info.used, info.free

    def finish(self, device: Device) -> int:
        """Load the usual kernels, and return the bytes that the context takes, with the margin."""
        with _lock:
            if self._uuid not in _measured:
                _load_kernels(device.torch_device)
                ours = torch.cuda.memory_reserved(device.torch_device)
                if self._was_active:
                    taken = _own_bytes(self._uuid)
                    _measured[self._uuid] = ASSUMED_BYTES if taken is None else max(taken - ours, 0)
                else:
                    with _nvml_device(self._uuid) as handle:
                        used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
                    _measured[self._uuid] = max(used - self._used_before - ours, 0)
            return _measured[self._uuid] + MARGIN_BYTES


def cap_activations(device: Device, activation_bytes: int) -> None:
    """Let torch's allocator have this much and no more; it raises torch.OutOfMemoryError beyond."""
    total = torch.cuda.get_device_properties(device.torch_device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(activation_bytes / total, 1.0), device.torch_device)


def uncap_activations(device: Device) -> None:
    """Undo `cap_activations`, and give torch's unused memory back."""
    torch.cuda.set_per_process_memory_fraction(1.0, device.torch_device)
    torch.cuda.empty_cache()


def _identify(index: int) -> tuple[str, bool]:
    """The device's UUID as NVML spells it, and whether this process has a context on it already."""
    (error,) = driver.cuInit(0)
    if not error:
        error, number = driver.cuDeviceGet(index)
    if not error:
        error, uuid = driver.cuDeviceGetUuid(number)
    if not error:
        error, _, active = driver.cuDevicePrimaryCtxGetState(number)
    if error:
        raise DeviceError(f"cuda:{index} cannot be identified: {error.name}; is it visible (CUDA_VISIBLE_DEVICES)?")
    raw = bytes(uuid.bytes).hex()
    return f"GPU-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}", bool(active)


@contextmanager
def _nvml_device(uuid: str) -> Iterator[object]:
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml.nvmlDeviceGetHandleByUUID(uuid)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"NVML does not answer for {uuid}: {error}; is the driver's management library there?"
        ) from error


def _own_bytes(uuid: str) -> int | None:
    """What NVML says that this process holds; None where it does not (a container's process numbers are its own)."""
    with _nvml_device(uuid) as handle:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    mine = [p for p in processes if p.pid == os.getpid()] or (processes if len(processes) == 1 else [])
    return mine[0].usedGpuMemory if mine else None


def _load_kernels(device: torch.device) -> None:
    """Run what every model runs, once per dtype, so that its kernels are in memory when the context is measured."""
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.ones(1, 8, 64, 64, dtype=dtype, device=device)
            y = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            y = torch.nn.functional.silu(torch.nn.functional.linear(y, y[0, 0]))
            torch.nn.functional.embedding(torch.zeros(1, 1, dtype=torch.long, device=device), y[0, 0])
            y.float().pow(2).mean(-1).rsqrt().softmax(-1).argmax(-1)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
