"""How a model's two-layer twin is run: in a small emulated runtime, by the same code that serves the model itself.

`djinn_core.models.twin` says what must be equal; this runs it, and lives above sessions so that imports point one way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from djinn_core.loading import load_model
from djinn_core.models.stack import build_meta_model, tensor_specs
from djinn_core.models.twin import Twin

if TYPE_CHECKING:
    from djinn_core.runtime import Runtime

ROOM_BYTES = 64 << 20  # for a twin's KV cache and rounding; the emulated device takes only what is touched


class TwinRuns:
    """Runs a twin through the ring and through sessions."""

    def __init__(self, make_runtime: Callable[[int], Runtime]) -> None:
        """`make_runtime` opens an emulated runtime whose device and host have that many bytes each."""
        self._make_runtime = make_runtime

    def stream(self, twin: Twin) -> list[torch.Tensor]:
        """All passes through a ring of one slot, so that each layer overwrites the one before."""
        with self._make_runtime(_room(twin)) as runtime:
            model = _load(runtime, twin, resident_layers="none", slots=1)
            accepted = inspect.signature(model.forward).parameters
            cache = DynamicCache(config=model.config)
            logits = []
            with torch.inference_mode():
                for index in range(twin.passes):
                    inputs = {"logits_to_keep": 1, **twin.pass_inputs(index)}
                    inputs = {name: value for name, value in inputs.items() if name in accepted}
                    logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1].clone())
            return logits


def _room(twin: Twin) -> int:
    specs = tensor_specs(build_meta_model(twin.source.config, twin.dtype)).values()
    return 2 * sum(spec.size_bytes for spec in specs) + ROOM_BYTES


def _load(runtime: Runtime, twin: Twin, **how: object):
    return load_model(runtime, twin.source, name="twin", chunk_bytes=None, keep_free_bytes=0, progress=None, **how)
