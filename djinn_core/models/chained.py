"""Several layers of a one-token pass in one launch: their graphs in a chain, and between them what was recorded once.

What a layer does between its two graphs, K and V into the session's cache and attention over them, differs from layer
to layer in addresses only, and from pass to pass in those of the session and in the length. So it is recorded once for
each length, in the first layer (`Chain`), and for the next length while the device is busy with this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import Cache

from djinn_core.models.recording import NotRecorded, Recorded

if TYPE_CHECKING:
    from djinn_core.device.base import Graphs, Stream

ALIGNMENT = 16  # bytes, of torch's widest loads


class Chained:
    """The layers of one kind of call.

    Args:
        layers: all of the model, each reading what the one before has written.

    Attributes:
        proofs: how often a part's launch, by its first layer and what is in between, was compared with the layers one
            by one.

    Raises:
        NotRecorded: what a layer does between its graphs is not what the first one does, or one changes its input.
    """

    def __init__(self, graphs: Graphs, layers: Sequence[Recorded]) -> None:
        if len(set(map(_between, layers))) != 1:
            raise NotRecorded("its layers call attention in different ways")
        if any(layer.alters for layer in layers):
            raise NotRecorded("a layer writes into what the one before has returned")
        self.layers = tuple(layers)
        self.proofs: Counter[Hashable] = Counter()
        self._chain = graphs.chain(self.layers)

    def prepare(self, cache: Cache, ahead: int = 0) -> Hashable:
        """Record what lies between graphs at the pass's length, or `ahead` tokens behind it; nothing if it has been.

        Returns of which kind it is, None where the session has no room for more.

        Raises:
            DeviceError: or what torch raised while it was recorded.
        """
        length, step = self._step(cache, ahead)
        if length >= cache.layers[0].get_max_length():
            return None
        return self._chain.record(length, step, cache.layers[0].span)

    def issue(self, part: range, hidden: torch.Tensor, cache: Cache, stream: Stream) -> None:
        """The layers of `part` on `hidden` [B, 1, hidden]. What lies between has been prepared.

        Raises:
            DeviceError: nothing has been issued.
        """
        first = self.layers[part.start]
        if hidden is not first.hidden:
            first.hidden.copy_(hidden)
        spans = [layer.span for layer in cache.layers[part.start : part.stop]]
        self._chain.replay(stream, *self._step(cache, 0), spans, part)

    def _step(self, cache: Cache, ahead: int) -> tuple[int, Callable[[int], torch.Tensor]]:
        """The length that a pass begins at, `ahead` tokens behind this one; and what lies between a layer's graphs."""

        def step(number: int) -> torch.Tensor:
            layer = self.layers[number]
            keys, values = cache.layers[number].append(layer.new, ahead)
            return attention(layer.query, keys, values, **layer.settings)

        return cache.layers[0].get_seq_length() + ahead, step


def _between(layer: Recorded) -> Hashable:
    """What layers have in common whose steps differ in addresses only; by alignment, too, torch chooses kernels."""
    tensors = (*layer.reads, layer.into)
    laid_out = tuple((each.shape, each.stride(), each.dtype, each.data_ptr() % ALIGNMENT) for each in tensors)
    return laid_out, tuple(sorted(layer.settings.items()))
