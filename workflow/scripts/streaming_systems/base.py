"""What every streaming system hands to the one protocol that measures them all.

Invariant: the protocol (`measure.py`) knows no system. What differs between systems, how the weights got to host
memory, what crosses the link and who counts it, is said here, as data that goes into the result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from djinn_core import machine
from djinn_core.context import MARGIN_BYTES
from djinn_core.models.source import WeightSource, open_source
from djinn_core.models.stack import bind, build_meta_model
from djinn_core.weights.store import read_all
from workflow.lib.harness import Experiment, Outcome

COUNTED_AT_THE_COPY = "counted at each copy of every pass"
COUNTED_UNTIMED = "counted at torch's copies in one untimed pass"
NOT_COUNTED = "not counted: on this machine a peer's parameters cross no link"

PROBE_BYTES = 64 << 20  # the link is probed between runs: long enough for its full rate, small beside the cap


def _nothing() -> None: ...


@dataclass
class Loaded:
    """A system whose weights are in place, ready for passes.

    Attributes:
        model: called as a Hugging Face causal language model.
        device: where prompts go and logits come from.
        load_how: how the weights came to where they are; `load_s` is compared only loosely.
        streamed_bytes: parameter bytes that a pass needs and that are not resident.
        planned_bytes: what a pass must move by the system's own plan; None for a system without one.
        copied_bytes: bytes moved towards the device so far, counted at the copy; None for a system that does not count.
        make_cold: lets the next pass begin with nothing prefetched, as the first after the load does.
        synchronize: waits until the device has nothing left to do.
        settings: the effective settings of the system, for the result.
        other_s: seconds of the opening that were not spent on loading (a search for settings).
        own_device_bytes: device memory by the system's own ledger, on a device that NVML does not see.
    """

    model: Callable[..., Any]
    device: torch.device
    load_how: str
    streamed_bytes: int
    planned_bytes: int | None = None
    copied_bytes: Callable[[], int] | None = None
    make_cold: Callable[[], None] = _nothing
    synchronize: Callable[[], None] = _nothing
    settings: dict[str, Any] = field(default_factory=dict)
    other_s: float = 0.0
    own_device_bytes: Callable[[], int] | None = None

    def __post_init__(self) -> None:
        if self.synchronize is _nothing and self.device.type == "cuda":
            self.synchronize = lambda: torch.cuda.synchronize(self.device)


def source_of(config: dict[str, Any]) -> WeightSource:
    """The weights that an experiment's settings name."""
    model = config["model"]
    return open_source(model.get("path") or model["name"], dtype=config["dtype"], seed=model.get("seed", 0))


def weight_bytes(source: WeightSource) -> int:
    """Bytes of all tensors, tied ones once."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in map(source.meta, source.names()))


def stock_model(source: WeightSource, device: str | torch.device) -> Any:
    """The stock transformers model with the source's bytes on `device`; buffers in their own precision.

    On the way to a device each tensor passes through host memory of its own size only, so a model larger than the host
    fits a large device.
    """
    model = build_meta_model(source.config, source.dtype)
    tensors = {}
    for name in source.names():
        shape, dtype = source.meta(name)
        with torch.inference_mode(False):  # other threads, which are in no such mode, write to it
            tensors[name] = torch.empty(shape, dtype=dtype)
        if device != "cpu":
            source.read_into(name, tensors[name])
            tensors[name] = tensors[name].to(device)
    if device == "cpu":
        read_all(source, list(tensors.items()))
    bind(model, tensors)
    return model


def computed_buffers(source: WeightSource, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The buffers that no checkpoint holds (rotary frequencies), computed on `device` as the reference's are.

    A power computed on the host may differ from the device's in its last bit, and with it every logit.
    """
    model = build_meta_model(source.config, source.dtype)
    tensors = {}
    for name in source.names():
        shape, dtype = source.meta(name)
        tensors[name] = torch.empty((), dtype=dtype, device=device).expand(shape)  # a shape without memory
    bind(model, tensors)
    computed = {}
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            computed[f"{path}.{leaf}" if path else leaf] = module._buffers[leaf]
    return computed


def set_buffers(model: torch.nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Put `buffers` into `model`, each on the device on which the model's own was."""
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._buffers[leaf] = buffer.to(owner._buffers[leaf].device)


def usable_bytes(exp: Experiment) -> int:
    """The cap, less the probe's two buffers, which stand beside every system alike between its runs."""
    return exp.config["cap_bytes"] - (2 * PROBE_BYTES if exp.is_gpu else 0)


def cap_torch(exp: Experiment) -> int | None:
    """Hold torch's allocator below the cap, less what the process holds on the device outside of it.

    The same margin is kept for kernels that are loaded later as Djinn keeps.

    Returns:
        What was left to the allocator, in bytes; None without a GPU, where a peer's memory cannot be capped.
    """
    if not exp.is_gpu:
        return None
    torch.zeros(1, device=exp.device)
    torch.cuda.synchronize()
    used_bytes = machine.device_used_bytes(machine.gpu_uuid())
    outside_bytes = used_bytes - exp.baseline_bytes - torch.cuda.memory_reserved()
    allowed_bytes = usable_bytes(exp) - outside_bytes - MARGIN_BYTES
    if allowed_bytes <= 0:
        raise Outcome(
            "out_of_memory", f"the context alone takes {outside_bytes:,} bytes of {exp.config['cap_bytes']:,}"
        )
    total_bytes = torch.cuda.get_device_properties(exp.device).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed_bytes / total_bytes)
    return allowed_bytes


class CopiesToDevice(TorchDispatchMode):
    """Counts the bytes that torch copies from host memory to the device inside the block, on this thread.

    Use it under `torch.no_grad()`: in inference mode `Tensor.to` is dispatched before it becomes a copy.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.bytes = 0
        self._device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "to", "copy_"):
            tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)]
            source = tensors[-1] if name == "copy_" else tensors[0]
            if source.device.type == "cpu" and isinstance(out, torch.Tensor) and out.device.type == self._device_type:
                self.bytes += out.numel() * out.element_size()
        return out


@contextmanager
def released() -> Iterator[None]:
    """After the block, what torch no longer uses on the device goes back to the driver."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
