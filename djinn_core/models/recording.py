"""How a layer's one-token pass is recorded: up to its attention in one graph, and from there on in another.

The layer's own code is run once while nothing is done but its attention. What stands for the cache takes K and V from
it, and `scaled_dot_product_attention` is where the first graph ends. No table of models is needed: a layer that does it
in another way says so by not getting there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from djinn_core.device.base import Graph, Graphs, Stream


class CacheLayer(Protocol):
    """What a layer's part of the cache must offer: `SessionLayer`.

    Attributes:
        span: [T, 2, B, H_kv, D], where K and V are kept.
    """

    span: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def append(self, new: Sequence[torch.Tensor], ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor]: ...

    def written(self, count: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]: ...


class NotRecorded(Exception):
    """Why a layer cannot be recorded."""


class Places:
    """A layer's parameters and buffers, None for one that it has not, and where each lies.

    They are held, so that none of their addresses can become another tensor's.
    """

    def __init__(self, tensors: list[torch.Tensor | None]) -> None:
        self.tensors = tensors
        self._there = [tensor for tensor in tensors if tensor is not None]
        self._at = self._now()

    @property
    def moved(self) -> bool:
        """One of them has been given other memory, or another layout."""
        return self._now() != self._at

    def _now(self) -> tuple[list[int], list[tuple[int, ...]]]:
        return list(map(torch.Tensor.data_ptr, self._there)), list(map(torch.Tensor.stride, self._there))


@dataclass(eq=False)
class Recorded:
    """One layer's graphs, and the tensors that they read and write: [B, 1, hidden], [B, heads, 1, head_dim]. A `Row`.

    Attributes:
        settings: what attention is called with, besides tensors.
        into: what it gives.
        extras: what the layer returns behind the hidden states, all None; None itself where it returns no tuple.
        places: of the layer's parameters when it was recorded.
        alters: it writes into what it is given.
        proofs: how often the graphs were compared with the layer's own code.
    """

    hidden: torch.Tensor
    before: Graph
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    settings: dict[str, Any]
    into: torch.Tensor
    behind: Graph
    out: torch.Tensor
    extras: tuple[None, ...] | None
    places: Places
    alters: bool
    proofs: int = 0
    new: tuple[torch.Tensor, torch.Tensor] = field(init=False)  # K and V [B, H_kv, head_dim]

    def __post_init__(self) -> None:
        self.new = self.keys[:, :, 0], self.values[:, :, 0]

    def issue(self, hidden: torch.Tensor, cache_layer: CacheLayer, stream: Stream) -> Any:
        """What the layer returns; its tensor is overwritten when the layer is issued again."""
        if hidden is not self.hidden:
            self.hidden.copy_(hidden)
        self.before.replay(stream)
        keys, values = cache_layer.append(self.new)
        self.into.copy_(attention(self.query, keys, values, **self.settings))
        self.behind.replay(stream)
        return self.returned

    @property
    def reads(self) -> tuple[torch.Tensor, ...]:
        """What attention and the cache are given."""
        return *self.new, self.query

    @property
    def returned(self) -> Any:
        """What the layer returns, in the form in which it does."""
        return self.out if self.extras is None else (self.out, *self.extras)


class Recording(TorchFunctionMode):
    """Records one layer, once.

    Args:
        graphs: makes the two graphs.
        stream: of the pass.
        hidden: [B, 1, hidden], what the graphs will read.
    """

    def __init__(self, graphs: Graphs, stream: Stream, hidden: torch.Tensor, cache_layer: CacheLayer) -> None:
        super().__init__()
        self._stream = stream
        self._hidden = hidden
        self._cache_layer = cache_layer
        self._graphs = (graphs.new(), graphs.new())
        self._open: Graph | None = None
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # K and V of this token
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None  # what stands for the cache's
        self._attention: tuple[torch.Tensor, dict[str, Any], torch.Tensor] | None = None

    def record(self, original: Callable[..., Any], args: tuple, kwargs: dict, places: Places) -> Recorded:
        """The graphs of `original(*args, **kwargs)`, in which this recording stands for the cache.

        Raises:
            NotRecorded: it does not call `update` and then attention, once and without a mask, or returns more.
        """
        version = self._hidden._version
        try:
            with self:
                self._begin(self._graphs[0])
                out = original(*args, **kwargs)
                self._end()
        finally:
            if self._open is not None:
                self._open.abandon()
        if self._attention is None:
            raise NotRecorded("it does not call scaled_dot_product_attention")
        first, extras = (out[0], tuple(out[1:])) if type(out) is tuple else (out, None)
        if any(value is not None for value in extras or ()):
            raise NotRecorded("it returns more than the hidden states")
        query, settings, attended = self._attention
        before, behind = self._graphs
        alters = self._hidden._version != version
        tensors = self._hidden, before, query, *self._new, settings, attended, behind, first
        return Recorded(*tensors, extras, places, alters)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Stands for the cache's: nothing is written, and what it returns has the right shapes, and no values."""
        self._new = keys, values
        length, _ = self._cache_layer.get_mask_sizes(1)
        self._all = tuple(new[:, :, :1].expand(-1, -1, length, -1) for new in (keys, values))
        return self._all

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return self._attend(*args, **kwargs) if func is attention else func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **settings: Any,
    ) -> torch.Tensor:
        if self._attention is not None:
            raise NotRecorded("it calls attention more than once")
        if self._all is None or key is not self._all[0] or value is not self._all[1]:
            raise NotRecorded("its attention reads something other than what the cache returned")
        if attn_mask is not None or dropout_p or is_causal:
            raise NotRecorded("its attention has a mask, is causal, or drops out")
        self._end()
        self._graphs[0].replay(self._stream)
        out = attention(query, *self._cache_layer.update(*self._new), **settings)
        attended = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
        self._attention = query, settings, attended
        self._begin(self._graphs[1])
        return attended

    def _begin(self, graph: Graph) -> None:
        graph.begin()
        self._open = graph

    def _end(self) -> None:
        graph, self._open = self._open, None
        graph.end()
