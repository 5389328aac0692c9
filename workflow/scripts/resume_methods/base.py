"""What every method of the resume experiment offers, and the layer loop that the manual ones are written with.

A method runs a prompt to a breakpoint, takes the paused state wherever it keeps it, and brings it back. The
experiment (`workflow.scripts.resume`) drives all methods the same way and reads the same marks from each. The lines
between `# user-code begin` and `# user-code end` are what a user of that method writes; table1 counts them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from djinn_core.device.base import Device, Event, Stream


@dataclass
class Resumed:
    """One resume, still in flight.

    Attributes:
        logits: [B, vocab] of the last position, on the device.
        ready: the event after which layer L+1 may start.
        done: the event at which the logits are complete.
        executed: how many layers ran.
    """

    logits: torch.Tensor
    ready: Event
    done: Event
    executed: int


@dataclass
class Pass:
    """A pass under way in the layer loop: what the next layer needs.

    Attributes:
        hidden: hidden states [B, T, hidden].
        cache: the KV cache, written up to `layer`.
        layer: how many layers have run.
        inputs: mask, positions and position embeddings, the same for every layer.
    """

    hidden: torch.Tensor
    cache: DynamicCache
    layer: int
    inputs: dict[str, Any]


class LayerLoop:
    """A stock Llama's forward, layer by layer, so that it can stop and go on between two layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.model
        self.layers = list(self.decoder.layers)

    def begin(self, input_ids: torch.Tensor, cache: DynamicCache) -> Pass:
        """Embed `input_ids` [B, T] behind what `cache` holds; no layer has run yet."""
        hidden = self.decoder.embed_tokens(input_ids)
        first = cache.get_seq_length()
        positions = torch.arange(first, first + input_ids.shape[1], device=hidden.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=cache,
            position_ids=positions,
        )
        inputs = {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self.decoder.rotary_emb(hidden, position_ids=positions),
        }
        return Pass(hidden, cache, 0, inputs)

    def run(self, state: Pass, last: int, before: Callable[[int], None] | None = None) -> int:
        """Run the layers from where `state` stands through layer `last` (1-based); return how many ran."""
        first = state.layer
        for index in range(first, last):
            if before is not None:
                before(index)
            state.hidden = self.layers[index](state.hidden, past_key_values=state.cache, use_cache=True, **state.inputs)
        state.layer = last
        return last - first

    def finish(self, state: Pass) -> torch.Tensor:
        """The final norm and the head on the last position: logits [B, vocab]."""
        return self.model.lm_head(self.decoder.norm(state.hidden)[:, -1:, :])[:, -1]

    def new_cache(self) -> DynamicCache:
        """An empty stock cache."""
        return DynamicCache(config=self.model.config)

    def cache_of(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        """A stock cache whose first layers hold `pairs` of keys and values [B, H, T, D], without a copy."""
        cache = self.new_cache()
        for layer, (keys, values) in zip(cache.layers, pairs, strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache


def pairs_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of every layer that has been written."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]


@dataclass
class Bench:
    """What the methods share: one device, one stock model, and the model that Djinn serves on the same weights.

    Attributes:
        timing: a stream without work, on which a time begins at once.
    """

    device: Device
    stock: PreTrainedModel
    served: PreTrainedModel
    max_length: int
    timing: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.timing = self.device.stream()

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.stock.config.num_hidden_layers


class Method(ABC):
    """One way to pause and resume an inference.

    Attributes:
        name: as in the result files.
        states: which state sets it can keep: ``"A"`` the boundary activation alone, ``"S"`` the whole session.
    """

    name: ClassVar[str]
    states: ClassVar[tuple[str, ...]] = ("S",)

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @abstractmethod
    def run_to(self, input_ids: torch.Tensor, layer: int, state: str) -> Any:
        """Prefill `input_ids` [B, T] to the end of `layer`, the state still where the pass left it."""

    @abstractmethod
    def run_prefill(self, input_ids: torch.Tensor) -> Any:
        """Prefill `input_ids` to the end; the handle's next token is the last argument of `resume`."""

    @abstractmethod
    def pause(self, handle: Any) -> None:
        """Start to take the state away. Returns as soon as the caller may go on."""

    @abstractmethod
    def drain(self, handle: Any) -> None:
        """Wait until the memory that `pause` gives up is free."""

    @abstractmethod
    def resume(self, handle: Any, next_ids: torch.Tensor | None = None) -> Resumed:
        """Bring the state back and go on: to the end of the stopped pass, or through one pass over `next_ids`."""

    @abstractmethod
    def restored(self, handle: Any) -> None:
        """Return once all of the state is back on the device."""

    @abstractmethod
    def rewind(self, handle: Any) -> None:
        """Put the handle back to where it was before `resume`: paused, its state off the device."""

    @abstractmethod
    def close(self, handle: Any) -> None:
        """Give up everything that the handle holds."""

    @abstractmethod
    def state_bytes(self, handle: Any) -> int:
        """The bytes that a resume has to bring back."""

    def drained_bytes(self, handle: Any) -> int:
        """The bytes of state that were on the device until the last `pause` and `drain`."""
        return self.state_bytes(handle)

    def moved_bytes(self, handle: Any) -> int:
        """How many of them moved since that `pause`; the others were on the host already."""
        return self.drained_bytes(handle)
