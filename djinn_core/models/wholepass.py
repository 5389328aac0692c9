"""All layers of a one-token pass in one launch: their graphs in a chain, with what lies between recorded by length.

What a layer does between its two graphs, K and V into the session's cache and attention over them, differs from layer
to layer in addresses only, and from pass to pass in those of the session and in the length. So it is recorded once for
each length, in the first layer (`Chain`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import Cache

from djinn_core.device.base import Row
from djinn_core.models.recording import NotRecorded, Places, Recorded

if TYPE_CHECKING:
    from djinn_core.device.base import Graphs, Stream

ALIGNMENT = 16  # bytes, of torch's widest loads


class WholePass:
    """The layers of one kind of call.

    Args:
        layers: all of the model, each reading what the one before has written.
        places: of all layers' parameters.

    Attributes:
        proofs: how often each kind of step was compared with the layers issued one by one.

    Raises:
        NotRecorded: what a layer does between its graphs is not what the first one does.
    """

    def __init__(self, graphs: Graphs, layers: Sequence[Recorded], places: Places) -> None:
        if len({_between(layer) for layer in layers}) != 1:
            raise NotRecorded("its layers call attention in different ways")
        rows = [Row(each.before, each.behind, (*each.new, each.query), each.attended) for each in layers]
        self.layers = tuple(layers)
        self.places = places
        self.proofs: Counter[Hashable] = Counter()
        self._chain = graphs.chain(rows)

    def issue(self, hidden: torch.Tensor, cache: Cache, stream: Stream) -> Hashable:
        """All layers on `hidden` [B, 1, hidden]. Returns the kind of step, as `proofs` counts it.

        Raises:
            DeviceError: nothing has been issued.
        """
        first = self.layers[0]
        if hidden is not first.hidden:
            first.hidden.copy_(hidden)

        def step(number: int) -> torch.Tensor:
            layer = self.layers[number]
            keys, values = cache.layers[number].append(layer.new)
            return attention(layer.query, keys, values, **layer.settings)

        length, _ = cache.layers[0].get_mask_sizes(1)
        return self._chain.replay(stream, length, step, [layer.span for layer in cache.layers])


def _between(layer: Recorded) -> Hashable:
    """What layers have in common whose steps differ in addresses only; by alignment, too, torch chooses kernels."""
    tensors = (layer.query, *layer.new, layer.attended)
    laid_out = tuple((each.shape, each.stride(), each.dtype, each.data_ptr() % ALIGNMENT) for each in tensors)
    return laid_out, tuple(sorted(layer.settings.items()))
