"""Hugging Face Accelerate, by its own public functions and defaults: `cpu_offload` and `dispatch_model`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch

from workflow.lib.harness import Experiment
from workflow.scripts.streaming_systems.base import (
    Loaded,
    cap_torch,
    computed_buffers,
    released,
    set_buffers,
    source_of,
    stock_model,
)

FILLED = "each tensor read into the model's own memory on the host, then Accelerate's hooks attached"


@contextmanager
def cpu_offload(exp: Experiment) -> Iterator[Loaded]:
    """Every parameter on the host, copied to the device by each module's hook and dropped after it."""
    cap_torch(exp)
    with released():
        model = host_model(exp)
        streamed_bytes = parameter_bytes(model)
        accelerate.cpu_offload(model, execution_device=torch.device(exp.device))
        settings = {"function": "accelerate.cpu_offload", "offload_buffers": False}
        yield Loaded(model, torch.device(exp.device), FILLED, streamed_bytes, settings=settings)


@contextmanager
def device_map(exp: Experiment) -> Iterator[Loaded]:
    """As many layers on the device as the cap allows, by Accelerate's own `infer_auto_device_map`; the rest offloaded.

    Without a GPU the host is the device, so the rest goes to Accelerate's disk tier: the same hooks, another source.
    """
    allowed_bytes = cap_torch(exp)
    with released(), tempfile.TemporaryDirectory(prefix="accelerate-offload-") as folder:
        model = host_model(exp)
        room_bytes = (exp.config["cap_bytes"] if allowed_bytes is None else allowed_bytes) - activation_bytes(exp)
        main, below = (0, "cpu") if exp.is_gpu else ("cpu", "disk")
        limits = {main: room_bytes} | ({"cpu": 1 << 60} if exp.is_gpu else {})
        placed = accelerate.infer_auto_device_map(
            model, max_memory=limits, no_split_module_classes=list(model._no_split_modules or [])
        )
        elsewhere = [name for name, where in placed.items() if where == below]
        streamed_bytes = sum(parameter_bytes(model.get_submodule(name)) for name in elsewhere)
        offload = {} if exp.is_gpu else {"offload_dir": folder}
        model = accelerate.dispatch_model(model, placed, main_device=main, **offload)
        settings = {
            "function": "accelerate.dispatch_model",
            "max_memory": {str(name): size for name, size in limits.items()},
            "offloaded_to": below,
            "device_map": {name: str(where) for name, where in placed.items()},
        }
        yield Loaded(model, torch.device(exp.device), FILLED, streamed_bytes, settings=settings)


def host_model(exp: Experiment) -> Any:
    """The stock model in pageable host memory, as Accelerate's users have it."""
    source = source_of(exp.config)
    model = stock_model(source, "cpu")
    set_buffers(model, computed_buffers(source, exp.device))
    return model


def activation_bytes(exp: Experiment) -> int:
    """What the cap leaves to activations and KV: the same as Djinn is told to leave."""
    return int(exp.config["activation_bytes"])


def parameter_bytes(module: Any) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(math.prod(p.shape) * p.element_size() for p in module.parameters())
