"""Eager and manual offload under pressure: stock model, stock caches, weights shared.

Eager keeps every session on the device, and stops where the memory ends. Manual offload takes every session to
pinned host memory at its pause and back at its turn: a user cannot know beforehand which of them will have to go.
"""

from __future__ import annotations

import torch

from workflow.scripts.pressure_systems.workload import Tenant, Timer, TurnTimes, Workload
from workflow.scripts.resume_methods.base import Bench, LayerLoop, pairs_of
from workflow.scripts.resume_methods.eager import Eager
from workflow.scripts.resume_methods.eager import Handle as EagerHandle
from workflow.scripts.resume_methods.manual_offload import Arena, ManualOffload
from workflow.scripts.resume_methods.manual_offload import Handle as OffloadHandle


class StockTenant(Tenant):
    """A session of one of the resume experiment's stock methods."""

    def __init__(
        self, number: int, workload: Workload, bench: Bench, method: Eager | ManualOffload, arena: Arena | None
    ) -> None:
        super().__init__(number)
        self.workload = workload
        self.bench = bench
        self.method = method
        self.loop: LayerLoop = method.loop
        self.arena = arena
        self.timer = Timer(bench)
        self.handle: EagerHandle | OffloadHandle | None = None

    def spawn(self, prompt: torch.Tensor) -> None:
        run = self.loop.begin(prompt, self.loop.new_cache())
        self.loop.run(run, self.bench.depth)
        token = self._choose(self.loop.finish(run))
        self._stop_in(token, run.cache)

    def turn(self) -> TurnTimes:
        device = self.bench.device
        self.timer.start()
        resumed = self.method.resume(self.handle)
        next_token_ms = self.timer.until(resumed.done)
        times = TurnTimes(self.timer.until(resumed.ready), next_token_ms)
        self.method.restored(self.handle)
        cache = self.handle.resumed.cache if isinstance(self.handle, EagerHandle) else self.handle.run.cache
        token = self._choose(resumed.logits)
        for _ in range(self.workload.turn_tokens - 1):
            run = self.loop.begin(token, cache)
            self.loop.run(run, self.bench.depth)
            token = self._choose(self.loop.finish(run))
        self.method.rewind(self.handle)
        self._stop_in(token, cache)
        device.synchronize()
        return times

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        token = logits.argmax(dim=-1, keepdim=True)
        self.tokens.append(int(token))
        return token

    def _stop_in(self, token: torch.Tensor, cache: object) -> None:
        run = self.loop.begin(token, cache)
        self.loop.run(run, self.workload.layer)
        pairs = pairs_of(run.cache)
        if isinstance(self.method, Eager):
            self.handle = EagerHandle(run.hidden, pairs, self.workload.layer, run.inputs)
        else:
            self.handle = OffloadHandle("S", self.workload.layer, run.inputs, run.hidden, pairs, arena=self.arena)
            self.method.make_host(self.handle)
        del run, pairs, cache
        self.method.pause(self.handle)
        self.method.drain(self.handle)

    def close(self) -> None:
        if self.handle is not None:
            self.method.close(self.handle)
            self.handle = None
