"""Experiment 2's protocol on a tiny model: every gate holds for a true system, and breaks for one that is not."""

from __future__ import annotations

import dataclasses
import logging
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from djinn_core.certify import LinkBench, opened
from workflow.lib.harness import Experiment, Outcome
from workflow.lib.results import Result, read_result, summary_of
from workflow.lib.systems import SYSTEMS
from workflow.scripts.streaming_systems import measure, resident
from workflow.scripts.streaming_systems.base import (
    CopiesToDevice,
    Loaded,
    computed_buffers,
    set_buffers,
    source_of,
    stock_model,
    weight_bytes,
)

CONFIG = {
    "model": {"name": "tiny-llama", "path": None, "seed": 0},
    "dtype": "float32",
    "cap_bytes": 1 << 20,
    "activation_bytes": 0,
    "prompt_tokens": 9,
    "decode_tokens": 3,
    "decode_limit_s": 60,
    "passes": 2,
    "pass_limit_s": 60,
    "runs": 3,
    "seed": 0,
}


class Quiet:
    def task(self, what):
        return nullcontext()


@pytest.fixture
def exp(tmp_path) -> Experiment:
    config = dict(CONFIG)
    result = Result("streaming", "test", "cpu", config)
    return Experiment(result, config, {}, "cpu", None, Quiet(), tmp_path / "test.json")


@pytest.fixture(scope="module")
def model():
    return stock_model(source_of(CONFIG), "cpu")


@pytest.fixture
def reference(exp):
    file = exp.out.with_name("reference.safetensors")
    resident.run(exp, file)
    assert exp.result.checks["reference_repeats"]["passed"] is True
    return resident.read(file, source_of(CONFIG).digest)


def prompt_of(model) -> torch.Tensor:
    return resident.seeded_prompt(model.config.vocab_size, CONFIG["prompt_tokens"], 0, torch.device("cpu"))


class Counting:
    """A model whose passes move `each` bytes, or fewer in every third pass."""

    def __init__(self, model, each: int, *, skips: bool = False) -> None:
        self.model, self.each, self.skips, self.passes, self.bytes = model, each, skips, 0, 0

    def __call__(self, **words):
        self.passes += 1
        self.bytes += self.each if not (self.skips and self.passes % 3 == 0) else 0
        return self.model(**words)


def loaded_of(counting: Counting, **words) -> Loaded:
    return Loaded(
        counting, torch.device("cpu"), "as it is", 100, planned_bytes=100, copied_bytes=lambda: counting.bytes, **words
    )


def test_a_true_system_passes_every_gate(exp, model, reference) -> None:
    cold = []
    measure.measure(exp, loaded_of(Counting(model, 100), make_cold=lambda: cold.append(1)), prompt_of(model), reference)
    assert exp.result.status == "ok", exp.result.reason
    gates = {name: check["passed"] for name, check in exp.result.checks.items()}
    assert gates["tokens_equal"] and gates["logits_bit_equal"] and gates["moved_equals_plan"]
    assert gates["link_at_most_1.02_of_rate"] == "not_applicable"
    rows = {row["metric"]: row for row in summary_of(exp.result.samples)}
    assert rows["pass_s"]["n"] == rows["ttft_s"]["n"] == rows["decode_s_per_token"]["n"] == 3
    assert rows["moved_bytes"]["median"] == 100
    assert rows["effective_gbps"]["median"] == pytest.approx(100 / rows["pass_s"]["median"] / 1e9, rel=0.5)
    assert len(cold) == 4, "the warm-up and each run begin cold"
    assert sum(sample["warmup"] for sample in exp.result.samples) == 3


def test_other_weights_break_the_gates(exp, model, reference) -> None:
    config = CONFIG | {"model": CONFIG["model"] | {"seed": 1}}
    other = stock_model(source_of(config), "cpu")
    measure.measure(exp, loaded_of(Counting(other, 100)), prompt_of(model), reference)
    assert exp.result.status == "failed"
    assert exp.result.checks["logits_bit_equal"]["passed"] is False


def test_one_bit_of_one_logit_breaks_the_gate(exp, model, reference) -> None:
    flipped = reference.logits.clone()
    flipped[1, 0] = torch.nextafter(flipped[1, 0], torch.tensor(torch.inf))
    measure.check_answers(exp, [reference], dataclasses.replace(reference, logits=flipped))
    assert exp.result.checks["tokens_equal"]["passed"] is True
    assert exp.result.checks["logits_bit_equal"]["passed"] is False


def test_a_pass_that_moves_less_breaks_the_gate(exp, model, reference) -> None:
    measure.measure(exp, loaded_of(Counting(model, 100, skips=True)), prompt_of(model), reference)
    assert exp.result.status == "failed"
    assert exp.result.checks["moved_equals_plan"]["passed"] is False


def test_a_gate_once_broken_stays_broken(exp) -> None:
    for holds in (True, False, True):
        measure.keep_worst(exp, "gate", holds)
    assert exp.result.checks["gate"]["passed"] is False and exp.result.status == "failed"


def test_more_than_the_link_carries_breaks_the_gate(exp, reference) -> None:
    exp.device = "cuda:0"
    exp.result.checks.clear()
    loaded = Loaded(None, torch.device("cpu"), "", 10**9, planned_bytes=10**9)
    run = measure.Run(1.0, 1.0, 1.0, 10**9, reference)  # 1 GB/s
    measure.record(exp, loaded, run, None, (0.99, 0.99))
    assert exp.result.status == "ok"
    measure.record(exp, loaded, run, None, (0.97, 0.97))
    assert exp.result.checks["link_at_most_1.02_of_rate"]["passed"] is False


def test_what_crosses_no_link_is_not_counted(exp, model, reference) -> None:
    peer = Loaded(model, torch.device("cpu"), "as it is", 100)
    measure.measure(exp, peer, prompt_of(model), reference)
    metrics = {sample["metric"] for sample in exp.result.samples}
    assert "effective_gbps" in metrics and not metrics & {"moved_bytes", "link_gbps"}
    assert exp.config["measured"]["moved_bytes_basis"].startswith("not counted")


def test_a_slow_peer_gets_fewer_tokens() -> None:
    assert measure.fitting(50, 20.0, 0.1) == 50
    assert measure.fitting(50, 20.0, 1.5) == 13
    assert measure.fitting(50, 20.0, 90.0) == 1


def test_copies_to_the_device_are_counted() -> None:
    with torch.no_grad(), CopiesToDevice("meta") as copies:
        torch.ones(10).to("meta")
        torch.empty(5, device="meta").copy_(torch.ones(5))
        torch.ones(7) + 1
        torch.ones(3, device="meta").to("meta")
    assert copies.bytes == 60


def test_a_reference_of_other_weights_is_refused(exp, reference) -> None:
    with pytest.raises(Outcome, match="other weights"):
        resident.read(exp.out.with_name("reference.safetensors"), "another digest")
    with pytest.raises(Outcome, match="is missing"):
        resident.read(exp.out.with_name("nothing.safetensors"), "any")


def test_a_reference_that_is_not_run_has_its_file_too(tmp_path, monkeypatch) -> None:
    """The rule promises it; without it the result that tells the reason would be deleted."""
    from workflow.scripts import streaming

    out = tmp_path / "reference.json"
    words = f"streaming --run cpu --system reference --out {out} --log {tmp_path}/log"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--set", "streaming.expected.host_bytes=1000000000000000"])
    with pytest.raises(SystemExit) as end:
        streaming.main()
    assert end.value.code == 0 and read_result(out)["status"] == "unsupported"
    with pytest.raises(Outcome, match=f"the reference has no answers: {out} says why"):
        resident.read(tmp_path / "reference.safetensors", "any")


def test_a_reference_that_does_not_fit_says_the_bytes(exp, monkeypatch) -> None:
    exp.device = "cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    exp.config["activation_bytes"] = 500
    needed_bytes = weight_bytes(source_of(CONFIG)) + 500
    with pytest.raises(Outcome, match=f"{needed_bytes:,} bytes on the device, have 1,000") as raised:
        resident.run(exp, exp.out)
    assert raised.value.status == "unsupported"


def test_every_system_of_the_figure_can_be_opened(exp) -> None:
    from workflow.scripts import streaming

    exp.config["chunk_bytes"] = dict.fromkeys(SYSTEMS["streaming"], 1)
    for system in SYSTEMS["streaming"][1:]:
        if not system.startswith("deepspeed"):  # imported in the tests of the peers only: it takes seconds
            assert callable(streaming.opener(exp, system, torch.zeros(1, 1)))


@contextmanager
def logged(caplog):
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_a_failed_trace_is_reported_and_costs_nothing(exp, caplog) -> None:
    from workflow.scripts import streaming

    with logged(caplog):
        streaming.note(exp, SimpleNamespace(running=True, failure="dmon ended", peak=lambda *_: None))
    assert exp.result.checks["dmon_traced"]["passed"] is False and exp.result.status == "ok"
    assert "dmon ended" in caplog.text


def test_a_trace_that_cannot_be_read_is_reported_and_costs_nothing(exp, caplog, monkeypatch, tmp_path) -> None:
    from workflow.lib.trace import Trace
    from workflow.scripts import streaming

    (tmp_path / "dmon.csv").write_text("# gpu  rxpci\n    0\n    0   12\n")
    monkeypatch.setattr(type(exp), "is_gpu", True)
    monkeypatch.setattr(streaming, "gpu_index", lambda uuid: 0)
    with logged(caplog):
        streaming.note(exp, Trace(tmp_path / "dmon.csv", running=True))
    assert exp.result.checks["dmon_traced"]["passed"] is False and exp.result.status == "ok"
    assert "dmon.csv: line 2: 1 fields under a header of 2" in caplog.text


def test_buffers_are_computed_without_memory_for_weights(model) -> None:
    source = source_of(CONFIG)
    buffers = computed_buffers(source, "cpu")
    assert set(buffers) == {name for name, _ in model.named_buffers()}
    other = stock_model(source, "cpu")
    for buffer in other.buffers():
        buffer.zero_()
    set_buffers(other, buffers)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), model.buffers(), strict=True))


def test_the_probe_measures_what_it_copies() -> None:
    with opened("cpu", 1 << 20) as device, LinkBench(device, 1 << 20, pinning="optional") as bench:
        assert measure.back_to_back_gbps(bench, 4) > 0
        assert device.copied.h2d_bytes == 4 << 20
