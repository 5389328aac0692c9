"""One pass of a session through the model: where it enters, what gates it, where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from djinn_core.interrupts import Uninterrupted
from djinn_core.models.boundary import PassStopped
from djinn_core.sessions.edits import apply_edits
from djinn_core.sessions.inputs import EditsByLayer

if TYPE_CHECKING:
    from djinn_core.device.base import Stream
    from djinn_core.sessions.behind import Behind
    from djinn_core.sessions.bringin import BringIn
    from djinn_core.sessions.pager import Pager


class Control:
    """What the boundary asks during a session's pass (`PassControl`). One per pass.

    Args:
        first: layers that are skipped.
        stop: layers after which the pass stops; None runs to its end.
        jobs: bring-ins that each layer waits for.
        enter: given the embeddings, returns what layer `first` receives; None leaves them.
        edits: applied to the hidden states after a layer (counted from 1).
        keep: takes the boundary when the pass stops.
        pager: its way is given to who resumes meanwhile, and it says whether the pass may let others go first.
        layers: of the model; a stop after the last one has no next layer to be taken at.
        behind: copies each layer's KV to the host while the next ones compute.
    """

    def __init__(
        self,
        first: int,
        stop: int | None,
        jobs: Sequence[BringIn],
        compute: Stream,
        pager: Pager,
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
        self._pager = pager
        self._enter = enter
        self._edits = edits
        self._keep = keep
        self._behind = behind

    @property
    def ready(self) -> Callable[[], bool] | None:
        """Whether the layers of the pass are issued; None when they are now.

        A pass that took its turn before would hold it while its layers come, and the device would wait with it.
        """
        last = self._last if self.stop_before is None else self.stop_before
        coming = [job for job in self._jobs if not _come(job, self.first_layer, last)]
        if not coming:
            return None
        return lambda: self._must_go() or all(_come(job, self.first_layer, last) for job in coming)

    def _must_go(self) -> bool:
        """Nobody else would use the turn; or the next resume needs the slot that this one holds, the last one."""
        return not self._pager.shared or (not self._pager.staging.idle and self.begins())

    def undisturbed(self, first: int, last: int) -> bool:
        """Layers `first` to `last` - 1 have their KV, and nobody looks at what lies between them."""
        looks = [done for done in (*self._edits, self.stop_before) if done is not None and first < done < last]
        return not looks and self._behind is None and all(_arrived(job, first, last) for job in self._jobs)

    def begins(self) -> bool:
        """The first layer of the pass is issued."""
        return all(_come(job, self.first_layer, self.first_layer + 1) for job in self._jobs)

    def begin(self) -> None:
        self._pager.way.give()  # whoever had the turn before is often about to resume another session

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._enter is None:
            return hidden
        with Uninterrupted():
            return self._enter(hidden)

    def before_layer(self, layer: int) -> None:
        if self._pager.way.taken:
            with Uninterrupted():
                self._pager.way.give()
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


def _come(job: BringIn, first: int, last: int) -> bool:
    """The pass has nothing to wait for: layers `first` to `last` - 1 are issued, or will not be but by itself."""
    return job.by_pass or job.done or job.cancelled or 0 not in job.issued[first:last]


def _arrived(job: BringIn, first: int, last: int) -> bool:
    """Layers `first` to `last` - 1 have nothing left to be mapped or copied."""
    if 0 in job.issued[first:last]:
        return False
    return all(event is None or event.query() for event in job.arrival[first:last])
