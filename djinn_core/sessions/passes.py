"""One pass of a session through the model: where it enters, what gates it, where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from djinn_core.interrupts import Uninterrupted, wait_for
from djinn_core.models.boundary import PassStopped
from djinn_core.sessions.edits import apply_edits
from djinn_core.sessions.inputs import EditsByLayer
from djinn_core.turn import Turn, Way

if TYPE_CHECKING:
    from djinn_core.device.base import Stream
    from djinn_core.sessions.behind import Behind
    from djinn_core.sessions.bringin import BringIn

LOOK_S = 0.005  # how often a pass that lets others go first looks whether they do


class Control:
    """What the boundary asks during a session's pass (`PassControl`). One per pass.

    Args:
        first: layers that are skipped.
        stop: layers after which the pass stops; None runs to its end.
        jobs: bring-ins that each layer waits for.
        enter: given the embeddings, returns what layer `first` receives; None leaves them.
        edits: applied to the hidden states after a layer (counted from 1).
        keep: takes the boundary when the pass stops.
        way: given to who resumes meanwhile.
        layers: of the model; a stop after the last one has no next layer to be taken at.
        behind: copies each layer's KV to the host while the next ones compute.
    """

    def __init__(
        self,
        first: int,
        stop: int | None,
        jobs: Sequence[BringIn],
        compute: Stream,
        way: Way,
        *,
        enter: Callable[[torch.Tensor], torch.Tensor] | None,
        edits: EditsByLayer,
        keep: Callable[[torch.Tensor], None],
        layers: int,
        behind: Behind | None = None,
    ) -> None:
        self.first_layer = first
        self.stop_before = stop
        self._last = layers
        self._jobs = tuple(jobs)
        self._compute = compute
        self._way = way
        self._enter = enter
        self._edits = edits
        self._keep = keep
        self._behind = behind

    def before_turn(self, turn: Turn) -> None:
        last = self._last if self.stop_before is None else self.stop_before
        for job in self._jobs:
            if not job.by_pass:
                _let_go_first(job, self.first_layer, last, turn)

    def begin(self) -> None:
        self._way.give()  # whoever had the turn before is often about to resume another session

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._enter is None:
            return hidden
        with Uninterrupted():
            return self._enter(hidden)

    def before_layer(self, layer: int) -> None:
        if self._way.taken:
            with Uninterrupted():
                self._way.give()
        for job in self._jobs:
            job.gate(layer, self._compute)

    def after_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        done = layer + 1
        if done in self._edits:
            hidden = apply_edits(self._edits[done], hidden)
        if self._behind is not None:
            with Uninterrupted():
                self._behind.layer(layer, self._compute)
        if done == self.stop_before == self._last:
            self.stop(hidden)
        return hidden

    def stop(self, hidden: torch.Tensor) -> None:
        """What the next layer would receive is the boundary."""
        with Uninterrupted():
            self._keep(hidden)
        raise PassStopped


def _let_go_first(job: BringIn, first: int, last: int, turn: Turn) -> None:
    """Return when layers `first` to `last` - 1 have been issued, or when nobody else wants the `turn` meanwhile.

    A pass that took its turn before would hold it while its layers come, and the device would wait with it.
    """

    def come() -> bool:
        return job.done or job.cancelled or 0 not in job.issued[first:last]

    with job.changed:
        while not come() and turn.wanted:
            wait_for(job.changed, come, LOOK_S)
