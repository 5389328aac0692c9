"""Djinn's own streaming systems, as the experiment opens them: what they say of themselves, pinning and coding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from djinn_core.device.cpu import CpuDevice
from djinn_core.errors import PinningRefused
from workflow.lib.config import load_config, section
from workflow.lib.harness import Experiment, Outcome, status_of
from workflow.lib.progress import Progress
from workflow.lib.results import Result
from workflow.scripts.streaming_systems import djinn_ring, measure, resident


def experiment(tmp_path: Path, pinning: str) -> Experiment:
    config = section(load_config("cpu", [f"machine.pinning={pinning}"]), "streaming")
    config |= {"model": {"name": "tiny-llama", "path": None, "seed": 0}, "cap_bytes": 2_000_000}
    result = Result("streaming", "djinn_chunk16mib", "cpu", config)
    return Experiment(result, config, {}, "cpu", None, Progress("test", terminal=False), tmp_path / "test.json")


def refuse(self: CpuDevice, address: int, size_bytes: int) -> None:
    raise PinningRefused("the system locks no more", needed_bytes=size_bytes, free_bytes=0)


def test_a_pass_moves_the_plan_and_the_memory_was_pinned(tmp_path: Path) -> None:
    exp = experiment(tmp_path, "required")
    with djinn_ring.ring(exp, resident_layers="none", chunk_bytes=4096) as loaded, torch.inference_mode():
        prompt = resident.seeded_prompt(256, 9, 0, torch.device("cpu"))
        measure.timed_pass(loaded, prompt)
        loaded.make_cold()
        before_bytes = loaded.copied_bytes()
        measure.timed_pass(loaded, prompt)
        assert loaded.copied_bytes() - before_bytes >= loaded.planned_bytes > 0
        assert loaded.settings["host_pinned"] is True
        assert loaded.settings["resident_layers"] == []


def test_where_the_system_refuses_to_pin_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "pin", refuse)
    exp = experiment(tmp_path, "required")
    with pytest.raises(PinningRefused) as refused, djinn_ring.ring(exp, resident_layers="none", chunk_bytes=4096):
        pass
    assert status_of(refused.value) == "failed"


def test_where_the_settings_allow_it_the_result_says_that_memory_is_pageable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "pin", refuse)
    exp = experiment(tmp_path, "optional")
    with djinn_ring.ring(exp, resident_layers="none", chunk_bytes=4096) as loaded, torch.inference_mode():
        measure.timed_pass(loaded, resident.seeded_prompt(256, 9, 0, torch.device("cpu")))
        assert loaded.settings["host_pinned"] is False


def test_a_coded_pass_moves_the_coded_bytes_and_says_by_what_codec(tmp_path: Path) -> None:
    exp = experiment(tmp_path, "required")
    exp.config["dtype"] = "bfloat16"
    with djinn_ring.ring(exp, resident_layers="none", chunk_bytes=4096, coding="ans") as loaded:
        prompt = resident.seeded_prompt(256, 9, 0, torch.device("cpu"))
        measure.timed_pass(loaded, prompt)
        before_bytes = loaded.copied_bytes()
        measure.timed_pass(loaded, prompt, passes=2)
        assert loaded.copied_bytes() - before_bytes == 2 * loaded.planned_bytes
        assert 0 < loaded.planned_bytes < 0.9 * loaded.streamed_bytes
        assert loaded.settings["codec"].startswith("zlib") and 0.5 < loaded.settings["coded_ratio"] < 0.9
        assert loaded.load_how == djinn_ring.CODED_HOW


def test_weights_that_cannot_be_coded_are_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exp = experiment(tmp_path, "required")
    how = {"resident_layers": "none", "chunk_bytes": 4096, "coding": "ans"}
    exp.device = "cuda:0"
    with pytest.raises(Outcome, match="16-bit floats on a GPU, and these weights are float32") as refused:
        djinn_ring.ring(exp, **how).__enter__()
    assert refused.value.status == "unsupported"
    exp.config["dtype"] = "bfloat16"
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", None)
    with pytest.raises(Outcome, match="needs nvidia-nvcomp-cu13") as refused:
        djinn_ring.ring(exp, **how).__enter__()
    assert refused.value.status == "unsupported"
