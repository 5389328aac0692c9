"""Djinn under pressure: sessions pause, and whoever needs memory gets it."""

from __future__ import annotations

import time
from statistics import fmean

import torch

import djinn_core as djinn
from workflow.scripts.pressure_systems.workload import Tenant, Timer, TurnTimes, Workload
from workflow.scripts.resume_methods.base import Bench


class ServedTenant(Tenant):
    """One session of Djinn.

    Attributes:
        expected_resume_s: given to each pause; None says nothing about when the session will be wanted.
        found_resident: whether its last resume found the KV cache on the device.
    """

    def __init__(self, number: int, workload: Workload, bench: Bench) -> None:
        super().__init__(number)
        self.workload = workload
        self.bench = bench
        self.timer = Timer(bench)
        self.session: djinn.Session | None = None
        self.expected_resume_s: float | None = None
        self.found_resident = True

    def spawn(self, prompt: torch.Tensor) -> None:
        self.session = djinn.open_session(self.bench.served, max_length=self.workload.max_length)
        self._stop_in(self._choose(self.session.forward(prompt)))

    def turn(self) -> TurnTimes:
        device = self.bench.device
        self.timer.start()
        logits = self.session.resume()
        done = device.event(timing=True)
        done.record(device.current_stream())
        next_token_ms = self.timer.until(done)
        trace = self.session.trace
        self.found_resident = trace.found_resident
        spans = {what: ms for what, ms in trace.spans if what != "pass issued"}
        ready_ms = max(self.timer.until(gate) for gate in trace.gates)
        times = TurnTimes(ready_ms, next_token_ms, sum(spans.values()), spans)
        token = self._choose(logits)
        passes = []
        for _ in range(self.workload.turn_tokens - 1):
            begin_s = time.perf_counter()
            logits = self.session.forward(token)
            issued_s = time.perf_counter()
            token = self._choose(logits)
            passes.append((issued_s - begin_s, time.perf_counter() - begin_s))
        if passes:
            times.issue_ms, times.token_ms = (1e3 * fmean(each) for each in zip(*passes, strict=True))
        self._stop_in(token)
        return times

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        token = logits.argmax(dim=-1, keepdim=True)
        self.tokens.append(int(token))
        return token

    def _stop_in(self, token: torch.Tensor) -> None:
        self.session.forward(token, stop_after=self.workload.layer)
        self.session.pause(expected_resume_s=self.expected_resume_s)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None
