"""Djinn's own systems: nothing resident at four chunk sizes, the same with lossless coding, and the cap filled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from djinn_core.errors import ConfigError
from djinn_core.runtime import Runtime
from djinn_core.weights import coding as codings
from workflow.lib.harness import Experiment, Outcome
from workflow.scripts.streaming_systems.base import Loaded, usable_bytes

LOAD_HOW = "each tensor read straight into its layer's pinned block, after the two-layer twin was proved"
CODED_HOW = "each layer read, coded on the device and compared after decoding, after the two-layer twin was proved"


@contextmanager
def ring(
    exp: Experiment, *, resident_layers: str, chunk_bytes: int, coding: Literal["ans"] | None = None
) -> Iterator[Loaded]:
    """A model behind Djinn's weight ring, under the cap; `resident_layers` and `coding` as `Runtime.load` takes them.

    Raises:
        Outcome: these weights cannot be coded here: their dtype, or a package that is missing.
    """
    config = exp.config
    try:
        codings.check(coding, getattr(torch, config["dtype"]), is_gpu=exp.is_gpu)
    except ConfigError as error:
        raise Outcome("unsupported", str(error)) from error
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
                coding=coding,
                seed=model_settings.get("seed", 0),
                progress=progress,
            )
        plan, device = model.djinn.plan, runtime.device
        yield Loaded(
            model=model,
            device=device.torch_device,
            load_how=CODED_HOW if coding else LOAD_HOW,
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
                "codec": model.djinn.codec,
                "coded_ratio": plan.coded_ratio,
                "plan_device_bytes": plan.device_bytes,
                "host_pinned": runtime.host.pinned,
                "stable_addresses": plan.stable_addresses,
            },
            own_device_bytes=None if exp.is_gpu else device.used_bytes,
        )
