"""Eager: the state never leaves the device. The ideal that every other method is paired with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workflow.scripts.resume_methods.base import Bench, LayerLoop, Method, Pass, Resumed, pairs_of


@dataclass
class Handle:
    """A pass that stopped, all of it on the device."""

    hidden: torch.Tensor | None
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    layer: int
    inputs: dict
    resumed: Pass | None = None


class Eager(Method):
    """Keeps hidden states and KV cache where they are."""

    name = "eager"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.loop = LayerLoop(bench.stock)

    def run_to(self, input_ids: torch.Tensor, layer: int, state: str) -> Handle:
        # user-code begin
        state_of_pass = self.loop.begin(input_ids, self.loop.new_cache())
        self.loop.run(state_of_pass, layer)
        # user-code end
        return Handle(state_of_pass.hidden, pairs_of(state_of_pass.cache), layer, state_of_pass.inputs)

    def run_prefill(self, input_ids: torch.Tensor) -> Handle:
        handle = self.run_to(input_ids, self.bench.depth, "S")
        handle.hidden = None
        return handle

    def pause(self, handle: Handle) -> None:
        """Nothing moves."""

    def drain(self, handle: Handle) -> None:
        """Nothing becomes free."""

    def resume(self, handle: Handle, next_ids: torch.Tensor | None = None) -> Resumed:
        device = self.bench.device
        ready, done = device.event(timing=True), device.event(timing=True)
        ready.record(device.current_stream())
        cache = self.loop.cache_of(handle.pairs)
        if next_ids is None:
            run = Pass(handle.hidden, cache, handle.layer, handle.inputs)
        else:
            run = self.loop.begin(next_ids, cache)
        # user-code begin
        executed = self.loop.run(run, self.bench.depth)
        logits = self.loop.finish(run)
        # user-code end
        done.record(device.current_stream())
        handle.resumed = run
        return Resumed(logits, ready, done, executed)

    def restored(self, handle: Handle) -> None:
        """Everything was there all along."""

    def rewind(self, handle: Handle) -> None:
        handle.resumed = None

    def close(self, handle: Handle) -> None:
        handle.hidden, handle.pairs, handle.resumed = None, [], None

    def state_bytes(self, handle: Handle) -> int:
        return 0
