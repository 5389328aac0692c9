"""Recompute: nothing is kept but the prompt; layers up to L run again, the KV cache kept as it goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workflow.scripts.resume_methods.base import Bench, LayerLoop, Method, Pass, Resumed


@dataclass
class Handle:
    """The prompt, and where the pass stood."""

    input_ids: torch.Tensor
    layer: int
    run: Pass | None = None


class Recompute(Method):
    """Runs the layers up to the breakpoint again."""

    name = "recompute"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.loop = LayerLoop(bench.stock)

    def run_to(self, input_ids: torch.Tensor, layer: int, state: str) -> Handle:
        return Handle(input_ids, layer)

    def run_prefill(self, input_ids: torch.Tensor) -> Handle:
        return Handle(input_ids, self.bench.depth)

    def pause(self, handle: Handle) -> None:
        """The state is dropped."""

    def drain(self, handle: Handle) -> None:
        """The state is gone already."""

    def resume(self, handle: Handle, next_ids: torch.Tensor | None = None) -> Resumed:
        device = self.bench.device
        ready, done = device.event(timing=True), device.event(timing=True)
        # user-code begin
        run = self.loop.begin(handle.input_ids, self.loop.new_cache())
        executed = self.loop.run(run, handle.layer)
        ready.record(device.current_stream())
        if next_ids is not None:
            run = self.loop.begin(next_ids, run.cache)
        executed += self.loop.run(run, self.bench.depth)
        logits = self.loop.finish(run)
        # user-code end
        done.record(device.current_stream())
        handle.run = run
        return Resumed(logits, ready, done, executed)

    def restored(self, handle: Handle) -> None:
        """The state is back when the layers have run."""

    def rewind(self, handle: Handle) -> None:
        handle.run = None

    def close(self, handle: Handle) -> None:
        handle.run = None

    def state_bytes(self, handle: Handle) -> int:
        return 0
