"""What a session should know after all that was done to it, replayed pass by pass on the stock model."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import torch

from djinn_core.sessions import Scale, Session
from tests.sessions.oracle import Oracle
from tests.sessions.rigs import stock_model

Pass = tuple[tuple[int, ...], int]  # ids, and the layer after which the hidden states are halved (0: none)
Place = tuple[tuple[Pass, ...], tuple[tuple[int, ...], int] | None]  # passes, and ids and layer of a stopped one
SESSION_BYTES = 4 * 64 << 10
HALF = Scale(0.5)

_ONE_AT_A_TIME = threading.Lock()  # the edits are hooks on the one stock model


def replay(passes: tuple[Pass, ...]) -> torch.Tensor:
    """The stock model's logits after these passes. Thread-safe."""
    with _ONE_AT_A_TIME:
        return _replay(passes)


@cache
def _replay(passes: tuple[Pass, ...]) -> torch.Tensor:
    model = stock_model("llama", torch.float32)
    oracle = Oracle(model)
    for ids, layer in passes:
        handle = None
        if layer:
            handle = model.model.layers[layer - 1].register_forward_hook(lambda module, args, out: out * 0.5)
        logits = oracle.forward(torch.tensor([ids]))
        if handle is not None:
            handle.remove()
    return logits


@dataclass
class Life:
    """A session, and what it should know."""

    session: Session
    passes: tuple[Pass, ...]
    stopped: tuple[tuple[int, ...], int] | None  # ids and layer of a stopped pass
    points: dict[str, Place]

    def resumed(self, out: torch.Tensor | None, edit: bool) -> None:
        """A resume has returned `out`."""
        if self.stopped is None:
            assert out is None
            return
        ids, layer = self.stopped
        self.passes, self.stopped = (*self.passes, (ids, layer if edit else 0)), None
        assert torch.equal(out, replay(self.passes))

    def reloaded(self, session: Session, old: list[str]) -> None:
        """It was saved, with checkpoints `old`, and is `session` now."""
        self.session = session
        renamed = {before: after.id for before, after in zip(old, session.checkpoints, strict=True)}
        self.points = {renamed[name]: what for name, what in self.points.items()}
