"""Manual offload: what a user writes with stock torch: copy the state to host memory, copy it back, go on.

Three grades: pageable memory (`.cpu()`), pinned memory (copy back, synchronise, compute), and overlapped (what an
expert writes: a side stream, the boundary first, an event per layer).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workflow.scripts.resume_methods.base import Bench, LayerLoop, Method, Pass, Resumed, pairs_of

ALIGNMENT_BYTES = 256


class Arena:
    """Host memory that one session reuses at each pause, in place of an allocation for each tensor."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.used_bytes = 0

    def reset(self) -> None:
        """Start from the beginning again; what was carved is overwritten."""
        self.used_bytes = 0

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Contiguous host memory for one tensor's values."""
        begin = -(-self.used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.used_bytes = begin + tensor.nbytes
        return self.memory[begin : self.used_bytes].view(tensor.dtype).view(tensor.shape)


@dataclass
class Handle:
    """A stopped pass: on the device until it is paused, in host memory after."""

    state: str
    layer: int
    inputs: dict
    hidden: torch.Tensor | None
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    host_hidden: torch.Tensor | None = None
    host_pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    run: Pass | None = None
    arena: Arena | None = None


class ManualOffload(Method):
    """Shared parts of the three grades; a grade says how memory is made and how the state comes back."""

    states = ("A", "S")
    pinned = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.loop = LayerLoop(bench.stock)

    def run_to(self, input_ids: torch.Tensor, layer: int, state: str) -> Handle:
        run = self.loop.begin(input_ids, self.loop.new_cache())
        self.loop.run(run, layer)
        handle = Handle(state, layer, run.inputs, run.hidden, pairs_of(run.cache) if state == "S" else [])
        self.make_host(handle)
        return handle

    def run_prefill(self, input_ids: torch.Tensor) -> Handle:
        run = self.loop.begin(input_ids, self.loop.new_cache())
        self.loop.run(run, self.bench.depth)
        handle = Handle("S", self.bench.depth, run.inputs, None, pairs_of(run.cache))
        self.make_host(handle)
        return handle

    def make_host(self, handle: Handle) -> None:
        """Host memory for what is on the device now: the handle's arena, or torch's own allocations."""
        if handle.arena is not None:
            handle.arena.reset()
            like = handle.arena.like
        else:
            pin = self.pinned and self.bench.device.is_gpu

            def like(tensor: torch.Tensor) -> torch.Tensor:
                return torch.empty_like(tensor, device="cpu", pin_memory=pin)

        if handle.hidden is not None:
            handle.host_hidden = like(handle.hidden)
        handle.host_pairs = [(like(k), like(v)) for k, v in handle.pairs]

    def pause(self, handle: Handle) -> None:
        # user-code begin
        if handle.hidden is not None:
            handle.host_hidden.copy_(handle.hidden, non_blocking=self.pinned)
        for (host_k, host_v), (k, v) in zip(handle.host_pairs, handle.pairs, strict=True):
            host_k.copy_(k, non_blocking=self.pinned)
            host_v.copy_(v, non_blocking=self.pinned)
        # user-code end

    def drain(self, handle: Handle) -> None:
        # user-code begin
        self.bench.device.synchronize()
        handle.hidden, handle.pairs = None, []
        # user-code end

    def resume(self, handle: Handle, next_ids: torch.Tensor | None = None) -> Resumed:
        device = self.bench.device
        ready, done = device.event(timing=True), device.event(timing=True)
        to = device.torch_device if device.is_gpu else "cpu"
        # user-code begin
        if handle.host_hidden is not None:
            handle.hidden = _fetch(handle.host_hidden, to, self.pinned)
        handle.pairs = [(_fetch(k, to, self.pinned), _fetch(v, to, self.pinned)) for k, v in handle.host_pairs]
        device.synchronize()
        ready.record(device.current_stream())
        cache = self.loop.cache_of(handle.pairs)
        if next_ids is None:
            run = Pass(handle.hidden, cache, handle.layer, handle.inputs)
        else:
            run = self.loop.begin(next_ids, cache)
        executed = self.loop.run(run, self.bench.depth)
        logits = self.loop.finish(run)
        # user-code end
        done.record(device.current_stream())
        handle.run = run
        return Resumed(logits, ready, done, executed)

    def restored(self, handle: Handle) -> None:
        """`resume` waits for all copies itself."""

    def rewind(self, handle: Handle) -> None:
        handle.run = handle.hidden = None
        handle.pairs = []

    def close(self, handle: Handle) -> None:
        self.rewind(handle)
        handle.host_hidden, handle.host_pairs = None, []

    def state_bytes(self, handle: Handle) -> int:
        tensors = [t for pair in handle.host_pairs for t in pair]
        if handle.host_hidden is not None:
            tensors.append(handle.host_hidden)
        return sum(t.nbytes for t in tensors)


def _fetch(host: torch.Tensor, to: torch.device | str, pinned: bool) -> torch.Tensor:
    return host.to(to, non_blocking=pinned, copy=True)


class ManualOffloadPageable(ManualOffload):
    """Ordinary host memory: each copy blocks, through the driver's own staging buffer."""

    name = "manual_offload_pageable"
    pinned = False


class ManualOffloadPinned(ManualOffload):
    """Pinned host memory: copies are asynchronous, one synchronisation before compute."""

    name = "manual_offload_pinned"


class ManualOffloadOverlapped(ManualOffload):
    """Pinned host memory, a side stream, the boundary first, and one event per layer."""

    name = "manual_offload_overlapped"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.side = bench.device.stream()
        self.events = [bench.device.event() for _ in range(bench.depth)]
        self.last = bench.device.event()

    def resume(self, handle: Handle, next_ids: torch.Tensor | None = None) -> Resumed:
        device = self.bench.device
        compute = device.current_stream()
        ready, done = device.event(timing=True), device.event(timing=True)
        to = device.torch_device if device.is_gpu else "cpu"
        # user-code begin
        allocated = device.event()
        if handle.host_hidden is not None:
            handle.hidden = torch.empty_like(handle.host_hidden, device=to)
            allocated.record(compute)
            self.side.wait_event(allocated)
            device.launch(self.side, lambda: handle.hidden.copy_(handle.host_hidden, non_blocking=True))
        ready.record(self.side)
        handle.pairs = [(torch.empty_like(k, device=to), torch.empty_like(v, device=to)) for k, v in handle.host_pairs]
        allocated.record(compute)
        self.side.wait_event(allocated)
        count = len(handle.pairs)
        first = handle.layer if next_ids is None and handle.layer < count else 0
        for index in (*range(first, count), *range(first)):
            device.launch(self.side, lambda i=index: _copy_pair(handle.pairs[i], handle.host_pairs[i]))
            self.events[index].record(self.side)
        self.last.record(self.side)
        compute.wait_event(ready)
        cache = self.loop.cache_of(handle.pairs)
        if next_ids is None:
            run = Pass(handle.hidden, cache, handle.layer, handle.inputs)
        else:
            run = self.loop.begin(next_ids, cache)
        executed = self.loop.run(
            run, self.bench.depth, before=lambda i: compute.wait_event(self.events[i]) if i < count else None
        )
        logits = self.loop.finish(run)
        # user-code end
        done.record(compute)
        handle.run = run
        return Resumed(logits, ready, done, executed)

    def restored(self, handle: Handle) -> None:
        self.last.synchronize()


def _copy_pair(pair: tuple[torch.Tensor, torch.Tensor], host: tuple[torch.Tensor, torch.Tensor]) -> None:
    pair[0].copy_(host[0], non_blocking=True)
    pair[1].copy_(host[1], non_blocking=True)
