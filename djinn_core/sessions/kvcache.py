"""The KV cache that transformers sees, over a session's region.

Invariant: during a pass every layer reports the length at the pass's beginning. transformers asks layer 0 for the past
length when a pass begins; a pass that resumes after layer L would otherwise see layers up to L one pass ahead of the
others, and shift positions and masks. Lengths move only when the pass has ended, all at once.

`update` writes the new K and V behind the old ones and returns views [B, H_kv, T, D] of a token-major span; nothing is
allocated and nothing is mapped here, all of that was done before the layer began. A sliding-window layer keeps every
token and returns what the stock one returns: the last window - 1 and the new ones.

Not taken: subclassing DynamicLayer. Its `keys` are its state, and other code crops, reorders and offloads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from djinn_core.errors import SessionStateError, UnsupportedModel
from djinn_core.memory.regions import Region
from djinn_core.sessions.blocks import BlockTable, Layout

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_encoding")  # as transformers calls them


class SessionLayer(CacheLayerMixin):
    """One layer's K and V in `span` [T, 2, B, H, D]. `window` is None for full attention."""

    is_compileable = False
    is_croppable = False

    def __init__(self, index: int, span: torch.Tensor, table: BlockTable, window: int | None) -> None:
        super().__init__()
        self._index = index
        self._table = table
        self.span = span
        self._new_keys = span[:, 0]  # [T, B, H, D]
        self._new_values = span[:, 1]
        self._all_keys = self._new_keys.permute(1, 2, 0, 3)  # [B, H, T, D]
        self._all_values = self._new_values.permute(1, 2, 0, 3)
        self._shape = self._all_keys.shape
        self._window = window
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window
        self.is_initialized = True
        self.dtype, self.device = span.dtype, span.device
        self.start: int | None = None  # the length at the beginning of the pass under way

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to initialise."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V [B, H_kv, q, D] on the compute stream; returns views of all that this pass may attend to."""
        start = self._begun()
        batch, heads, new, width = key_states.shape
        if (batch, heads, width) != (self._shape[0], self._shape[1], self._shape[3]) or (
            value_states.shape != key_states.shape or key_states.dtype != self.dtype
        ):
            raise UnsupportedModel(
                f"layer {self._index} writes K {tuple(key_states.shape)} and V {tuple(value_states.shape)} of "
                f"{key_states.dtype}; its config promised [{self._shape[0]}, {self._shape[1]}, T, {self._shape[3]}] of "
                f"{self.dtype} for both"
            )
        end = start + new
        self._new_keys[start:end].copy_(key_states.permute(2, 0, 1, 3))
        self._new_values[start:end].copy_(value_states.permute(2, 0, 1, 3))
        return self._attended(start, end)

    def append(self, new: Sequence[torch.Tensor], ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` with one token's K and V, [B, H_kv, D] each, of a layer whose `update` went well: in fewer calls.

        Args:
            ahead: as the pass after so many further ones would do it; for recordings, which do nothing.
        """
        start = self._begun() + ahead
        torch.stack(new, out=self.span[start])
        return self._attended(start, start + 1)

    def _begun(self) -> int:
        """Where the pass under way writes."""
        if self.start is None:
            raise SessionStateError(
                "a session's cache is written only by the session's own passes; use session.forward"
            )
        return self.start

    def _attended(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = 0 if self._window is None else max(0, start - self._window + 1)
        return self._all_keys.narrow(2, first, end - first), self._all_values.narrow(2, first, end - first)

    def written(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [B, H_kv, count, D] of K and V of the first `count` tokens of the pass under way."""
        return tuple(kept[:, :, self.start : self.start + count] for kept in (self._all_keys, self._all_values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what `update` will return, as the stock layers report it."""
        length = self.get_seq_length()
        if self._window is None:
            return length + query_length, 0
        return min(length, self._window - 1) + query_length, max(length - self._window + 1, 0)

    def get_seq_length(self) -> int:
        return self._table.lengths[self._index] if self.start is None else self.start

    def get_max_length(self) -> int:
        return self._shape[2] if self._window is None else self._window

    def _refused(self, *args: object, **kwargs: object) -> None:
        raise SessionStateError(
            "a session's cache cannot be cropped, reordered, reset or offloaded; use its checkpoints"
        )

    reset = crop = offload = prefetch = reorder_cache = _refused


class SessionCache(Cache):
    """A session's KV as `past_key_values`. `begin` and `end` enclose a pass.

    Attributes:
        uniform: no layer has a window, so that layers differ in addresses only, and passes in those and the length.
    """

    def __init__(self, windows: list[int | None], layout: Layout, region: Region, table: BlockTable) -> None:
        shape = (layout.max_length, 2, layout.batch_size, layout.kv_heads, layout.head_dim)
        layers = [
            SessionLayer(index, region.view(index * layout.span_bytes, shape, layout.dtype), table, window)
            for index, window in enumerate(windows)
        ]
        super().__init__(layers=layers)
        self.uniform = windows.count(None) == len(windows)

    def begin(self, start: int) -> None:
        """A pass begins behind `start` tokens."""
        for layer in self.layers:
            layer.start = start

    def end(self) -> None:
        for layer in self.layers:
            layer.start = None


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """For each layer its sliding window, None for full attention, as transformers' own cache sees it.

    Raises:
        UnsupportedModel: a layer keeps something other than K and V (recurrent state, an index, …), by name.
    """
    text = config.get_text_config(decoder=True)
    stock = DynamicCache(config=config)
    windows: list[int | None] = []
    for index in range(text.num_hidden_layers):
        layer = stock.layers[index] if index < len(stock.layers) else DynamicLayer()
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            raise UnsupportedModel(
                f"{text.model_type}: layer {index} keeps its state in a {type(layer).__name__}; sessions hold only "
                "keys and values"
            )
    return windows


def positions_in_table(model: PreTrainedModel) -> int | None:
    """How many positions a model with a table of them has, learned or not; None where each is computed.

    On a GPU a position beyond the table would end the process's context.
    """
    limits = []
    for name, module in model.get_decoder().named_modules():
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - getattr(module, "offset", first))
        limits += [len(table) for own, table in module.named_buffers(recurse=False) if own in POSITION_TABLES]
    return min(limits, default=None)


def kv_layout(
    config: PretrainedConfig, dtype: torch.dtype, batch_size: int, max_length: int, granularity_bytes: int
) -> Layout:
    """The layout of a session's KV for this model. `update` checks at run time that the model keeps to it."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Layout(text.num_hidden_layers, batch_size, max_length, kv_heads, head_dim, dtype, granularity_bytes)
