"""How a model's two-layer twin is run: in a small emulated runtime, by the same code that serves the model itself.

`djinn_core.models.twin` says what must be equal; this runs it, and lives above sessions so that imports point one way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from djinn_core.models.stack import build_meta_model, tensor_specs
from djinn_core.models.twin import Twin, run_passes

if TYPE_CHECKING:
    from djinn_core.runtime import Runtime
    from djinn_core.sessions import Session

ROOM_BYTES = 64 << 20  # for a twin's KV cache and rounding; the emulated device takes only what is touched
RELEASE_S = 60.0  # far more than a twin's few kilobytes take


class TwinRuns:
    """Runs a twin through the ring and through sessions."""

    def __init__(self, make_runtime: Callable[[int], Runtime]) -> None:
        """`make_runtime` opens an emulated runtime whose device and host have that many bytes each."""
        self._make_runtime = make_runtime

    def stream(self, twin: Twin) -> list[torch.Tensor]:
        """All passes through a ring of one slot, so that each layer overwrites the one before."""
        with self._make_runtime(_room(twin)) as runtime:
            model = runtime.load(twin.source, resident_layers="none", slots=1, prove=False)
            return run_passes(model, twin)

    def stop(self, twin: Twin, *, at_pass: int, after_layer: int) -> list[torch.Tensor]:
        """All passes in a session; one is stopped, its session leaves the device, and the pass is resumed."""
        length = twin.input_ids.shape[1] + twin.decode_ids.shape[1]
        with self._make_runtime(_room(twin)) as runtime:
            model = runtime.load(twin.source, resident_layers="all", prove=False)
            with runtime.open_session(model, max_length=length, batch_size=2) as session:
                return [
                    _pass(session, twin, index, after_layer if index == at_pass else None)
                    for index in range(twin.passes)
                ]


def _pass(session: Session, twin: Twin, index: int, stop_after: int | None) -> torch.Tensor:
    """Pass `index` of the twin's task; with `stop_after`, it is stopped there and resumed from the host."""
    ids = twin.input_ids if index == 0 else twin.decode_ids[:, index - 1 : index]
    mask = twin.attention_mask if index == 0 else None
    if stop_after is None:
        return session.forward(ids, mask).clone()
    session.forward(ids, mask, stop_after=stop_after)
    session.pause(release=True)
    session.wait_until("released", RELEASE_S)
    return session.resume().clone()


def _room(twin: Twin) -> int:
    specs = tensor_specs(build_meta_model(twin.source.config, twin.dtype)).values()
    return 2 * sum(spec.size_bytes for spec in specs) + ROOM_BYTES
