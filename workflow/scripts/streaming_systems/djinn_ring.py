"""Djinn's own systems: nothing resident at four chunk sizes, and the cap filled with resident layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from djinn_core.runtime import Runtime
from workflow.lib.harness import Experiment
from workflow.scripts.streaming_systems.base import Loaded, usable_bytes

LOAD_HOW = "each tensor read straight into its layer's pinned block, after the two-layer twin was proved"


@contextmanager
def ring(exp: Experiment, *, resident_layers: str, chunk_bytes: int) -> Iterator[Loaded]:
    """A model behind Djinn's weight ring, under the cap, with `resident_layers` as `Runtime.load` takes them."""
    config = exp.config
    model_settings = config["model"]
    with Runtime(
        exp.device,
        budget_bytes=usable_bytes(exp),
        activation_bytes=config["activation_bytes"],
        host_bytes=config["host_bytes"],
        pinning=config["machine"]["pinning"],
    ) as runtime:
        with exp.progress.loading("read the weights") as progress:
            model = runtime.load(
                model_settings.get("path") or model_settings["name"],
                dtype=config["dtype"],
                resident_layers=resident_layers,
                chunk_bytes=chunk_bytes,
                seed=model_settings.get("seed", 0),
                progress=progress,
            )
        plan, device = model.djinn.plan, runtime.device
        yield Loaded(
            model=model,
            device=device.torch_device,
            load_how=LOAD_HOW,
            streamed_bytes=model.djinn.streamed_parameter_bytes,
            planned_bytes=plan.streamed_bytes_per_pass,
            copied_bytes=lambda: device.copied.h2d_bytes,
            make_cold=model.djinn.provider.empty,
            synchronize=device.synchronize,
            settings={
                "resident_layers": list(plan.resident),
                "streamed_layers": len(plan.streamed),
                "slots": plan.slots,
                "slot_bytes": plan.slot_bytes,
                "chunk_bytes": plan.chunk_bytes,
                "plan_device_bytes": plan.device_bytes,
                "host_pinned": runtime.host.pinned,
                "stable_addresses": plan.stable_addresses,
            },
            own_device_bytes=None if exp.is_gpu else device.used_bytes,
        )
