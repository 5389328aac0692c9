"""From a weight source to a Hugging Face model whose weights lie within the runtime's budget.

Order: the source is checked, the model's twin proved, the plan made; only then is memory taken, and only then is
anything copied. A failure at any point gives back what was taken.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn_core.errors import OutOfHostMemory, WeightsError
from djinn_core.interrupts import act
from djinn_core.memory import HostTier, Kind
from djinn_core.models import boundary
from djinn_core.models.boundary import Boundary
from djinn_core.models.graphs import LayerGraphs
from djinn_core.models.source import WeightSource
from djinn_core.models.stack import Stack, bind, build_meta_model, find_stack
from djinn_core.weights.coded import CodedStore, CodedStreamer, scratch_bytes
from djinn_core.weights.coding import Codec
from djinn_core.weights.plan import Plan, Residency, make_plan
from djinn_core.weights.resident import DeviceBlocks, load_resident, staging_bytes
from djinn_core.weights.store import HostStore, Layout, Progress, pack, store_bytes, view
from djinn_core.weights.streamer import PassCount, Streamer

if TYPE_CHECKING:
    from djinn_core.runtime import Runtime


@dataclass(eq=False)
class LoadedModel:
    """What Djinn knows about a model that it loaded: `model.djinn`.

    Attributes:
        name: its owner's name in the ledger.
        plan: what stays on the device and what streams.
        provider: the streamer; `provider.last_pass` says what the last pass moved.
        parameter_bytes: of all tensors, tied ones once.
        streamed_parameter_bytes: of the streamed layers' tensors: what a pass needs and does not find on the device.
        host_bytes: pinned host memory that the weights hold.
        codec: the library and the method that code what streams; None where it streams as it is.
    """

    name: str
    runtime: Runtime
    source: WeightSource
    dtype: torch.dtype
    stack: Stack
    plan: Plan
    provider: Streamer
    boundary: Boundary
    parameter_bytes: int
    streamed_parameter_bytes: int
    host_bytes: int
    codec: str | None
    _model: PreTrainedModel = field(repr=False)
    _release: ExitStack = field(repr=False)
    closed: bool = False

    @property
    def digest(self) -> str:
        """The identity of config and weights."""
        return self.source.digest

    @property
    def executed(self) -> tuple[int, ...]:
        """How often each layer's own code has run."""
        return tuple(self.boundary.executed)

    @property
    def graphs(self) -> LayerGraphs | None:
        """What sessions' one-token passes are issued from: how many layers are `recorded`, and why others `refused`."""
        return self.boundary.graphs

    @property
    def last_pass(self) -> PassCount:
        """What the last finished pass moved."""
        return self.provider.last_pass

    def close(self) -> None:
        """Give the weights' memory back. The parameters go to the meta device, and a pass raises SessionStateError."""
        if self.closed:
            return
        self.closed = True
        try:
            self.provider.close()
        finally:
            if self.graphs is not None:
                self.graphs.close()
            _to_meta(self._model)
            self._release.close()


@torch.inference_mode(mode=False)  # parameters are ordinary tensors, whatever mode the caller is in
def load_model(
    runtime: Runtime,
    source: WeightSource,
    *,
    name: str,
    resident_layers: Residency,
    slots: int | None,
    chunk_bytes: int | None,
    keep_free_bytes: int,
    codec: Codec | None,
    graphs: bool,
    progress: Progress | None,
) -> PreTrainedModel:
    """Load `source` into the runtime's free memory; `model.djinn` is the LoadedModel. What streams is coded by `codec`.

    Raises:
        CapacityError: the device's or the host's budget is too small; nothing is held, nothing was copied.
        WeightsError, UnsupportedModel: the source cannot be served; nothing is held.
    """
    device, pool = runtime.device, runtime.pool
    model = build_meta_model(source.config, source.dtype)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    stack = find_stack(model)
    _check_names(source, stack)
    layers = [pack(specs) for specs in stack.layer_tensors]
    others = pack(stack.resident)
    plan = make_plan(
        [layout.size_bytes for layout in layers],
        others.size_bytes,
        pool.free_bytes - keep_free_bytes,
        slots=slots,
        resident_layers=resident_layers,
        chunk_bytes=chunk_bytes,
        granularity_bytes=device.granularity_bytes,
        coded_bound=None if codec is None else codec.bound_bytes,
        budget_name=f"the device budget of {runtime.budget_bytes:,} bytes",
    )
    total = others.payload_bytes + sum(layout.payload_bytes for layout in layers)
    report = _Progress(progress, total)
    kept = [others] + [layers[layer] for layer in plan.resident]
    _refuse_small_host(runtime.host, kept, [layers[layer] for layer in plan.streamed], codec)
    with ExitStack() as held:
        resident = DeviceBlocks(device, pool, [layout.size_bytes for layout in kept], Kind.RESIDENT_WEIGHTS, name)
        held.callback(resident.close)
        ring_memory: list[torch.Tensor] = []
        if plan.slots:
            sizes = [plan.slot_bytes] * plan.slots + [plan.landing_bytes] * plan.landings
            ring = DeviceBlocks(device, pool, sizes, Kind.RING, name)
            held.callback(ring.close)
            ring_memory = ring.blocks
        slot_memory, landings = ring_memory[: plan.slots], ring_memory[plan.slots :]
        items = [(layout, block) for layout, block in zip(kept, resident.blocks, strict=True)]
        load_resident(device, runtime.host, source, items, name, report)
        streamed = {layer: layers[layer] for layer in plan.streamed}
        blocks: dict[int, torch.Tensor] = {}
        host_bytes = 0
        if streamed and codec is not None:
            coded = CodedStore(device, runtime.host, codec, name)
            held.callback(coded.close)
            coded.read(source, streamed, slot_memory[0], landings, report)
            plan = plan.with_coded({layer: block.numel() for layer, block in coded.blocks.items()})
            host_bytes = coded.size_bytes
        elif streamed:
            store = HostStore(runtime.host, streamed, name)
            held.callback(store.close)
            store.read(source, report)
            blocks, host_bytes = store.blocks, store.size_bytes
        tensors = {}
        for layout, block in items:
            tensors |= layout.views(block)
        for index, layer in enumerate(plan.streamed):
            tensors |= layers[layer].views(slot_memory[index % plan.slots])
        bind(model, tensors)
        rebinding = None if plan.stable_addresses else _rebinding(model, plan, layers, slot_memory)
        if streamed and codec is not None:
            streamer = CodedStreamer(device, plan, coded, codec, slot_memory, landings, rebinding)
        else:
            streamer = Streamer(device, plan, blocks, slot_memory, rebinding)
        act()
        wrapped = boundary.install(model, stack, streamer, runtime.turn)
        if graphs:
            wrapped.graphs = LayerGraphs(device, stack.layers, plan.resident)
        model.djinn = LoadedModel(
            name=name,
            runtime=runtime,
            source=source,
            dtype=source.dtype,
            stack=stack,
            plan=plan,
            provider=streamer,
            boundary=wrapped,
            parameter_bytes=total,
            streamed_parameter_bytes=sum(layers[layer].payload_bytes for layer in plan.streamed),
            host_bytes=host_bytes,
            codec=codec.name if streamed and codec is not None else None,
            _model=model,
            _release=held.pop_all(),
        )
    return model


class _Progress:
    """Adds up bytes for a progress callback."""

    def __init__(self, callback: Progress | None, total_bytes: int) -> None:
        self._callback, self._total, self._done = callback, total_bytes, 0
        self(0)

    def __call__(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._callback is not None:
            self._callback(self._done, self._total)


def _check_names(source: WeightSource, stack: Stack) -> None:
    wanted = {spec.name for layer in (*stack.layer_tensors, stack.resident) for spec in layer}
    given = set(source.names())
    if wanted != given:
        missing, extra = sorted(wanted - given), sorted(given - wanted)
        raise WeightsError(
            f"{source!r} does not hold the model's tensors: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}; nothing was copied"
        )


def _refuse_small_host(host: HostTier, kept: list[Layout], streamed: list[Layout], codec: Codec | None) -> None:
    """All that the load is sure to ask of the host, before it takes any: a large model is refused at once, not half
    read. What layers take coded is known only as they are coded; then only the room to read the largest is sure."""
    staging, needs = staging_bytes(kept), f"its {len(streamed)} streamed layers take"
    if codec is None:
        store = store_bytes(streamed)
    else:
        store, needs = scratch_bytes(streamed), f"reading the largest of its {len(streamed)} streamed layers takes"
    needed_bytes, free_bytes = max(staging, store), host.free_bytes
    if needed_bytes > free_bytes:
        raise OutOfHostMemory(
            f"the model does not fit its host budget: {needs} {store:,} bytes there, reading the others {staging:,} "
            "for a while; nothing was copied; raise host_bytes, or budget_bytes so that more layers stay on the device",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


def _rebinding(
    model: nn.Module, plan: Plan, layers: list[Layout], slots: list[torch.Tensor]
) -> dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each (layer, slot) the layer's parameters and their places in that slot, made once."""
    state = model.state_dict(keep_vars=True)
    return {
        (layer, index): [(state[placed.name], view(slot, placed)) for placed in layers[layer].tensors]
        for layer in plan.streamed
        for index, slot in enumerate(slots)
    }


def _to_meta(model: nn.Module) -> None:
    """Let go of all device memory: a tensor over released addresses must not be touched, so none is left."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
