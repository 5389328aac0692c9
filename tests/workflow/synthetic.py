"""Made-up result files for the tests of figures and claims. Nothing outside tests/ reads or copies these numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from workflow.lib.results import Result, validate, write_json
from workflow.lib.systems import PRESSURE_SYSTEMS, RESUME_METHODS, STREAMING_GROUPS

MIB = 2**20
KIND = {
    "gpu": None,
    "driver": None,
    "pcie_generation": None,
    "pcie_width": None,
    "cpu": "Synthetic CPU",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "numa_nodes": 1,
    "system": "Linux",
}
RATE = 54.0
WEIGHTS = 26_000_000_000
KV_TOKEN = 819_200
CODED = 0.67
LAYERS = (1, 10, 20, 30, 40)


class Maker:
    """Writes result files of a pretended run into a folder of the test's own."""

    def __init__(self, folder: Path, *, gpu: str | None = "NVIDIA H200", run: str = "h200") -> None:
        self.folder = folder
        self.gpu = gpu
        self.run = run
        self.machine_id = "machine-1"
        self.source_digest = "0" * 32
        self.commit = "abc1234def"
        self.dirty = False
        self.noise = np.random.default_rng(7)

    def result(self, experiment: str, system: str, **config: Any) -> Result:
        result = Result(experiment, system, self.run, {"model": "llama-2-13b", **config})
        state = {"time_utc": "2026-01-01T00:00:00Z", "load_1min": 0.1, "host_free_bytes": 1, "foreign_processes": []}
        result.machine = {
            "kind": {**KIND, "gpu": self.gpu},
            "id": self.machine_id,
            "state": {"before": state, "after": state},
        }
        result.source = {"commit": self.commit, "dirty": self.dirty, "digest": self.source_digest}
        rates = {"h2d_gbps": RATE, "d2h_gbps": RATE, "bidirectional_gbps": 83.0, "peer_gbps": None}
        result.weights = {"kind": "seeded", "digest": "0", "size_bytes": WEIGHTS}
        result.limits = {"before": rates, "after": rates, **rates, "drift": 0.0}
        return result

    def write(self, result: Result) -> Path:
        path = self.folder / result.experiment / f"{result.system}.json"
        result.write(path)
        return path

    def jitter(self, value: float, share: float = 0.004) -> float:
        return float(value * (1 + share * self.noise.standard_normal()))

    def certificate(self, verdict: str = "pass", beside: str = "") -> None:
        """The run's certificate, or one of its own `beside` an experiment's results."""
        result = self.result("certify", "machine")
        rates = {name: rate for name, rate in result.limits.items() if name.endswith("_gbps")}
        line = {"name": "h2d", "value": RATE, "unit": "GB/s", "verdict": verdict, "threshold": "made up"}
        document = {"schema": "djinn-certificate/1", "run": self.run, "verdict": verdict, "device": "made up"}
        document |= {"machine": result.machine, "source": result.source, "libraries": {}, "config": {}}
        document |= {"limits": rates, "lines": [line], "samples": [], "summary": []}
        validate(document, "certificate", "certificate.json")
        write_json(self.folder / beside / "certificate.json", document)

    def streaming(self, *, rates: dict[str, float] | None = None, failing: dict[str, tuple[str, str]] | None = None):
        """All systems of exp2; `rates` overrides GB/s, `failing` gives (status, reason) instead."""
        pace = {
            "accelerate_cpu_offload": 7.5,
            "deepspeed_cpu": 40.0,
            "deepspeed_cpu_tuned": 45.8,
            "deepspeed_nvme": 1.7,
        }
        pace |= {"accelerate_device_map": 7.4, "djinn_ans": 78.0}
        pace |= rates or {}
        for group, systems in STREAMING_GROUPS.items():
            for system in systems:
                result = self.result("streaming", system, prompt_tokens=512, cap_bytes=8_000_000_000)
                if system.startswith("djinn_chunk"):
                    result.config["chunk_bytes"] = int(system.removeprefix("djinn_chunk").removesuffix("mib")) * MIB
                if system in (failing or {}):
                    result.fail(*failing[system])
                    self.write(result)
                    continue
                streamed = (
                    WEIGHTS if group == "nothing resident" else int(WEIGHTS * (0.8 if "djinn" in system else 0.75))
                )
                moved = int(streamed * CODED) if system == "djinn_ans" else streamed
                rate = pace.get(system, 53.8)
                for _ in range(5):
                    seconds = self.jitter(streamed / rate / 1e9)
                    if group == "cap filled" and "djinn" in system:
                        seconds = self.jitter(streamed / 53.8e9)
                    result.sample("pass_s", seconds, "s")
                    result.sample("effective_gbps", streamed / seconds / 1e9, "GB/s")
                    result.sample("run_h2d_gbps", RATE, "GB/s")
                    result.sample("link_gbps", moved / seconds / 1e9, "GB/s")
                    result.sample("ttft_s", self.jitter(seconds * 1.04), "s")
                    result.sample("decode_s_per_token", self.jitter(seconds), "s")
                result.sample("streamed_bytes", streamed, "bytes")
                result.sample("moved_bytes", moved, "bytes")
                result.sample("host_bytes", int(WEIGHTS * 1.02), "bytes")
                result.sample("peak_vram_bytes", 7_600_000_000, "bytes")
                result.sample("load_s", self.jitter(20.0), "s")
                for name in ("tokens_equal", "logits_bit_equal", "moved_equals_plan"):
                    result.check(name, True)
                self.write(result)

    def resume(self) -> None:
        """All methods of exp3; djinn's file also holds its interleaved partners."""
        for system in RESUME_METHODS:
            result = self.result("resume", system, prompt_tokens=2048, layers=list(LAYERS))
            partners = ("eager", "manual_offload_pinned", "manual_offload_overlapped") if system == "djinn" else ()
            for method in (system, *partners):
                for layer in LAYERS:
                    for state in ("A", "S") if method.startswith("manual") else ("S",):
                        self.resume_rows(result, method, layer, state)
            result.check("gpu_shared", system == "djinn", gate=False)
            for name in ("tokens_equal", "logits_bit_equal_layer_1", "logits_bit_equal_layer_40", "reference_repeats"):
                result.check(name, True)
            self.write(result)

    def resume_rows(self, result: Result, method: str, layer: int, state: str) -> None:
        whole, rest = 2048 * KV_TOKEN, 117.0 - 2.9 * layer + 1.5
        size = 20_971_520 + (whole * layer // 40 if state == "S" else 0)
        link = size / (RATE * 1e6)
        hides = method in ("manual_offload_overlapped", "djinn")
        ready = {"eager": 0.02, "recompute": 2.9 * layer, "djinn": 0.43, "manual_offload_overlapped": 0.41}
        ready_ms = ready.get(method, link * RATE / 7 if "pageable" in method else link)
        logits_ms = max(rest, link) + 0.4 if hides else ready_ms + rest
        where = {"layer": layer, "state": state, "method": method}
        for _ in range(6):
            result.sample("ready_ms", self.jitter(ready_ms), "ms", **where)
            result.sample("next_logits_ms", self.jitter(logits_ms), "ms", **where)
            result.sample("state_bytes", size, "bytes", **where)
            result.sample("theoretical_ms", link, "ms", **where)
            result.sample("pause_ms", self.jitter(0.3), "ms", **where)
            result.sample("drain_gbps", self.jitter(0.97 * RATE), "GB/s", **where)
            if layer == LAYERS[0]:
                token = {"eager": 4.0}.get(method, 4.0 + whole / (RATE * 1e6))
                rows = {name: value for name, value in where.items() if name != "layer"}
                result.sample("next_token_ms", self.jitter(token), "ms", **rows)
                result.sample("state_bytes", whole, "bytes", **rows)

    def pressure(self, *, sessions: int = 50, cap: int = 80_000_000_000) -> None:
        """All systems of the pressure run: eager stops where the memory ends, djinn stays below the cap."""
        kv = 2048 * KV_TOKEN
        demand = WEIGHTS + sessions * kv
        for system in PRESSURE_SYSTEMS:
            method = {"djinn_uncapped": "djinn", "manual_offload": "manual_offload_overlapped"}.get(system, system)
            result = self.result("pressure", system, cap_bytes=cap, sessions=sessions, demand_bytes=demand)
            result.config |= {"weights_bytes": WEIGHTS, "session_kv_bytes": kv}
            limit = {"djinn_uncapped": demand * 2, "manual_offload": WEIGHTS + 2 * kv}.get(system, int(cap * 0.985))
            completed = 0
            for index in range(4 * sessions):
                opened = min(sessions, index // 2 + 1)
                used = WEIGHTS + opened * kv
                if system == "eager" and used > limit:
                    break
                completed = opened
                where = {
                    "time_s": index * 0.05,
                    "seed": 0,
                    "sessions": opened,
                    "phase": "spawn" if index < 2 * sessions else "resume",
                    "variant": "rounds",
                    "method": method,
                }
                held = min(used, limit)
                for source in ("nvml", "ledger"):
                    result.sample("device_bytes", held, "bytes", source=source, **where)
                parts = {"resident_weights": WEIGHTS, "kv": held - WEIGHTS - 10**9, "pooled": 10**9}
                for _ in range(2):  # a session arrives in the millisecond in which the ledger is read anyway
                    for part, size in parts.items():
                        result.sample("ledger_bytes", size, "bytes", part=part, **where)
            for seed in range(3):
                total = {"djinn": 31.0, "djinn_uncapped": 30.4}.get(system, 60.0)
                result.sample("total_s", self.jitter(total, 0.001), "s", seed=seed, method=method)
                if system == "djinn":
                    result.sample("total_s", self.jitter(30.5, 0.001), "s", seed=seed, method="djinn_uncapped")
                result.sample("completed_sessions", completed, "sessions", seed=seed, method=method)
                result.sample("sessions_at_cap", completed, "sessions", seed=seed, method=method)
                for name in ("tokens_equal", "evicted_at_least_demand_minus_cap", "flat_after_cap"):
                    result.check(f"{name}_seed_{seed}", True)
            if system == "eager":
                result.fail("out_of_memory", f"session {completed + 1} found no memory under the cap")
            self.write(result)
