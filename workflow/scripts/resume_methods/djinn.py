"""Djinn in process: the session is paused with release, so that every resume is from host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import djinn_core as djinn
from workflow.scripts.resume_methods.base import Method, Resumed

DRAIN_TIMEOUT_S = 60.0


@dataclass
class Handle:
    """A session, and the checkpoint that every repeat goes back to (None between tokens)."""

    session: djinn.Session
    checkpoint: djinn.Checkpoint | None


class Djinn(Method):
    """A session of Djinn on the model that it serves."""

    name = "djinn"
    _executed = 0  # layers that had run before the next resume
    _out_bytes = 0  # copied to the host before the last pause

    def run_to(self, input_ids: torch.Tensor, layer: int, state: str) -> Handle:
        # user-code begin
        session = djinn.open_session(self.bench.served, max_length=self.bench.max_length)
        checkpoint = session.forward(input_ids, stop_after=layer)
        # user-code end
        self._executed = sum(self.bench.served.djinn.executed)
        return Handle(session, checkpoint)

    def run_prefill(self, input_ids: torch.Tensor) -> Handle:
        session = djinn.open_session(self.bench.served, max_length=self.bench.max_length)
        session.forward(input_ids)
        self._executed = sum(self.bench.served.djinn.executed)
        return Handle(session, session.checkpoint())

    def pause(self, handle: Handle) -> None:
        self._out_bytes = self.bench.device.copied.d2h_bytes
        # user-code begin
        handle.session.pause(release=True)
        # user-code end

    def drain(self, handle: Handle) -> None:
        handle.session.wait_until("released", DRAIN_TIMEOUT_S)

    def resume(self, handle: Handle, next_ids: torch.Tensor | None = None) -> Resumed:
        # user-code begin
        logits = handle.session.resume(handle.checkpoint)
        # user-code end
        if next_ids is not None:
            logits = handle.session.forward(next_ids)
        device = self.bench.device
        done = device.event(timing=True)
        done.record(device.current_stream())
        executed, self._executed = self._executed, sum(self.bench.served.djinn.executed)
        return Resumed(logits, handle.session.trace.ready, done, self._executed - executed)

    def restored(self, handle: Handle) -> None:
        handle.session.wait_until("restored", DRAIN_TIMEOUT_S)

    def rewind(self, handle: Handle) -> None:
        self.pause(handle)
        self.drain(handle)

    def close(self, handle: Handle) -> None:
        handle.session.close()

    def state_bytes(self, handle: Handle) -> int:
        return handle.checkpoint.state_bytes

    def drained_bytes(self, handle: Handle) -> int:
        """The KV cache; the boundary went out when the pass stopped."""
        return handle.checkpoint.kv_bytes

    def moved_bytes(self, handle: Handle) -> int:
        """Counted at the copies; what the pass wrote behind itself was there before."""
        return self.bench.device.copied.d2h_bytes - self._out_bytes
