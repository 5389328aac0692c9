"""A checkpoint: a place that a session can go back to, as often as wanted.

Immutable. It holds references to blocks, never copies of them: KV is append-only, so a past is a list of lengths. The
boundary lies on the pinned host (or on disk), as the next layer would receive it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

from djinn_core.device.base import Event
from djinn_core.errors import DeviceError
from djinn_core.sessions.blocks import BlockTable, Stored
from djinn_core.sessions.edits import Edit

_NUMBERS = itertools.count(1)


class Boundary(Stored):
    """Hidden states [B, T, hidden] between two layers, off the device.

    Attributes:
        written: the event after which the host copy is whole, None when it always was.
        device: the hidden states themselves, kept until the host copy is known to be whole.
        refs: the checkpoints that share it; it is given up with the last one.
    """

    __slots__ = ("device", "dtype", "refs", "shape", "written")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, written: Event | None) -> None:
        super().__init__(math.prod(shape) * dtype.itemsize)
        self.shape = shape
        self.dtype = dtype
        self.written = written
        self.device: torch.Tensor | None = None
        self.refs = 0

    @property
    def settled(self) -> bool:
        """The host copy is whole, and nothing else is kept."""
        return self.device is None

    def tensor(self) -> torch.Tensor:
        """The host copy, as hidden states; waits until it is whole. One that failed comes from the device once more."""
        try:
            if self.written is not None:
                self.written.synchronize()
        except DeviceError:
            if (there := self.device) is None:
                raise
            return there.cpu()
        return self.host.tensor[: self.size_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class PassInputs:
    """What a pass was begun with: ids [B, T], and mask [B, past + T] and position ids [B, T] where it was padded."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None


@dataclass(frozen=True)
class Story:
    """What a session knows besides its KV. Frozen; each step makes a new one.

    Attributes:
        ids: all token ids that have been given or chosen, in pieces [B, n].
        mask: [B, length] of ones and zeros, None while nothing is padded.
        logits: [B, vocab] of the last complete pass.
        pending: the last chosen token [B, 1] when no pass has taken it yet.
        finished: [B] 1 where a sequence has not ended yet; None before generation.
        rng: the state of the session's random generator, None before it is used.
    """

    ids: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pending: torch.Tensor | None = None
    unfinished: torch.Tensor | None = None
    rng: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a session stood. Take one with a breakpoint or `session.checkpoint()`.

    Attributes:
        id: unique in the process.
        layer: layers that had been executed in the stopped pass; None between tokens.
        boundary: the hidden states there; None between tokens.
        inputs: the stopped pass's inputs; None between tokens.
        table: lengths and blocks, per layer.
        story: ids, mask, logits, generation state and RNG.
        edits: edits that are already in the boundary.
    """

    layer: int | None
    boundary: Boundary | None
    inputs: PassInputs | None
    table: BlockTable
    story: Story
    edits: tuple[Edit, ...] = ()
    id: str = field(default_factory=lambda: f"c{next(_NUMBERS)}")

    @property
    def length(self) -> int:
        """Tokens that every layer has."""
        return min(self.table.lengths)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that it refers to."""
        return sum(self.table.end_bytes(block) for block in self.table)

    @property
    def state_bytes(self) -> int:
        """KV and boundary."""
        return self.kv_bytes + (self.boundary.size_bytes if self.boundary else 0)

    def hidden_states(self) -> torch.Tensor:
        """A copy of the boundary [B, T, hidden] on the host, for a person to look at.

        Raises:
            ValueError: the checkpoint stands between tokens, or its boundary is on disk.
        """
        if self.boundary is None or self.boundary.host is None:
            raise ValueError(f"checkpoint {self.id} has no boundary in host memory")
        return self.boundary.tensor().clone()

    def __repr__(self) -> str:
        where = "between tokens" if self.layer is None else f"after layer {self.layer}"
        under_way = f" and {self.inputs.ids.shape[1]} under way" if self.inputs is not None else ""
        return f"Checkpoint({self.id}, {where}, {self.length} tokens{under_way}, {self.state_bytes:,} bytes)"
