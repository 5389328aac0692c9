"""Device memory through a pressure run, at 20 Hz: by NVML from another process, and by the ledger from this one."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import djinn_core as djinn
from workflow.lib.harness import Experiment

HZ = 20.0


class MemoryTrace:
    """Samples while its `with` block lasts; the rows go into the result as it ends, if they are `recorded`.

    Attributes:
        phase: ``"spawn"`` or ``"resume"``, written into each row.
    """

    def __init__(
        self,
        exp: Experiment,
        *,
        seed: int,
        method: str,
        runtime: djinn.Runtime | None = None,
        variant: str = "rounds",
        recorded: bool = True,
    ) -> None:
        self.exp = exp
        self.dims: dict[str, Any] = {"seed": seed, "method": method, "variant": variant}
        self.runtime = runtime
        self.recorded = recorded
        self.phase = "spawn"
        self.ledger_peak_bytes = 0
        self._sessions = 0
        self._marks: list[tuple[float, int, str]] = []
        self._ledger: list[tuple[float, djinn.Memory, int]] = []
        self._stop = threading.Event()
        self._stack = ExitStack()

    def arriving(self, sessions: int) -> None:
        """So many sessions are there now, the last of them still arriving (and off the device until it has memory).

        The ledger is read at this moment too: sessions that arrive faster than the samples are each seen.
        """
        self._read_ledger()
        self._sessions = sessions

    def __enter__(self) -> MemoryTrace:
        self._sampler = self._stack.enter_context(self.exp.memory_sampler(HZ))
        self._thread = threading.Thread(target=self._watch, name="memory-trace", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(1 / HZ):
            self._read_ledger()

    def _read_ledger(self) -> None:
        now_s = time.monotonic() - self._sampler.began_s
        self._marks.append((now_s, self._sessions, self.phase))
        if self.runtime is not None:
            memory = self.runtime.memory()  # cheap; a walk over all sessions would hold up what is measured
            self._ledger.append((now_s, memory, self._sessions - len(memory.kv_by_session)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._stack.close()
        if kind is None and self.recorded:
            self._record()

    def _record(self) -> None:
        sample = self.exp.result.sample
        for row in self._sampler.rows:
            where = self._where(row["t_s"])
            if row["device_bytes"] is not None:
                sample("device_bytes", row["device_bytes"], "bytes", source="nvml", **where)
            sample("host_bytes", row["host_bytes"], "bytes", **where)
        for time_s, memory, away in self._ledger:
            where = self._where(time_s)
            parts = ledger_parts(memory)
            used_bytes = sum(parts.values())
            self.ledger_peak_bytes = max(self.ledger_peak_bytes, used_bytes)
            sample("device_bytes", used_bytes, "bytes", source="ledger", **where)
            sample("sessions_off_device", away, "sessions", **where)
            for part, size_bytes in parts.items():
                sample("ledger_bytes", size_bytes, "bytes", part=part, **where)

    def _where(self, time_s: float) -> dict[str, Any]:
        sessions, phase = 0, "spawn"
        for mark_s, mark_sessions, mark_phase in self._marks:
            if mark_s > time_s:
                break
            sessions, phase = mark_sessions, mark_phase
        return self.dims | {"time_s": round(time_s, 3), "sessions": sessions, "phase": phase}

    @property
    def peak_bytes(self) -> int | None:
        """The highest sample: NVML's on a GPU; the ledger's on the emulated device; None where neither saw any."""
        seen = self._sampler.peak_device_bytes
        return seen if seen is not None else (self.ledger_peak_bytes or None)


def ledger_parts(memory: djinn.Memory) -> dict[str, int]:
    """What the process holds on the device, by the ledger. Pooled extents are free, but not yet the driver's again."""
    return {
        "context": memory.context_bytes,
        "activations": memory.activation_bytes,
        "resident_weights": memory.resident_weights_bytes,
        "ring": memory.ring_bytes,
        "staging": memory.staging_bytes,
        "kv": memory.kv_bytes,
        "pooled": memory.pooled_bytes,
    }
