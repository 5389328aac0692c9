"""The one protocol by which every streaming system is measured, and the gates that its answers must pass.

A run is: the link, a cold prefill (time to first token), greedy tokens from its cache, back-to-back passes of the
whole prompt without a cache, the link again. Runs follow each other in one process, after one load. How many tokens
and passes fit is decided once, from the warm-up, by the preset's time limits, so that a slow peer ends too; the
numbers are in the result.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from djinn_core import machine
from djinn_core.certify import LinkBench, opened
from djinn_core.device import Direction
from workflow.lib.harness import Experiment
from workflow.lib.results import NOT_APPLICABLE
from workflow.lib.trace import PcieCounters
from workflow.scripts.streaming_systems.base import (
    COUNTED_AT_THE_COPY,
    COUNTED_UNTIMED,
    NOT_COUNTED,
    PROBE_BYTES,
    CopiesToDevice,
    Loaded,
)
from workflow.scripts.streaming_systems.resident import Answers, decode, plain_pass, prefill

LINK_ALLOWED = 1.02  # of the rate around it; more was not measured, or not moved
PROBE_COPIES, PROBE_WARMUPS, PROBE_REPEATS = 16, 1, 5


@dataclass
class Run:
    """What one run measured."""

    ttft_s: float
    decode_s_per_token: float
    pass_s: float
    moved_bytes: float | None
    answers: Answers


def timed_pass(loaded: Loaded, prompt: torch.Tensor, passes: int = 3) -> float:
    """Seconds a pass of the prompt, of `passes` back to back, from a quiet device to a quiet device."""
    loaded.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(passes):
            plain_pass(loaded.model, prompt)
    loaded.synchronize()
    return (time.perf_counter() - began) / passes


def one_run(loaded: Loaded, prompt: torch.Tensor, tokens: int, passes: int) -> Run:
    """One cold prefill, `tokens` greedy tokens, `passes` back-to-back passes."""
    with torch.inference_mode():
        loaded.make_cold()
        loaded.synchronize()
        began = time.perf_counter()
        first, cache = prefill(loaded.model, prompt)
        loaded.synchronize()
        ttft_s = time.perf_counter() - began
        began = time.perf_counter()
        rows = decode(loaded.model, first, cache, tokens)
        loaded.synchronize()
        decode_s = time.perf_counter() - began
        del cache
        copied_bytes = loaded.copied_bytes() if loaded.copied_bytes else None
        began = time.perf_counter()
        for _ in range(passes):
            plain = plain_pass(loaded.model, prompt)
        loaded.synchronize()
        pass_s = (time.perf_counter() - began) / passes
        moved_bytes = None if copied_bytes is None else (loaded.copied_bytes() - copied_bytes) / passes
    logits = torch.cat([first, *rows])
    answers = Answers(plain.cpu(), logits.cpu(), logits.argmax(-1).cpu())
    return Run(ttft_s, decode_s / tokens, pass_s, moved_bytes, answers)


def measure(exp: Experiment, loaded: Loaded, prompt: torch.Tensor, reference: Answers) -> None:
    """Measure `loaded` and compare every answer with the reference; all of it goes into the result."""
    config, result = exp.config, exp.result
    with exp.progress.task("warm up"):
        warmup = one_run(loaded, prompt, 1, 1)
    result.sample("ttft_s", warmup.ttft_s, "s", warmup=True)
    result.sample("decode_s_per_token", warmup.decode_s_per_token, "s", warmup=True)
    result.sample("pass_s", warmup.pass_s, "s", warmup=True)
    runs = config["runs"]
    tokens = fitting(config["decode_tokens"], config["decode_limit_s"] / runs, warmup.pass_s)
    passes = fitting(config["passes"], config["pass_limit_s"] / runs, warmup.pass_s)
    untimed_bytes = count_copies(exp, loaded, prompt)
    config["measured"] = {
        "runs": runs,
        "decoded_tokens": tokens,
        "passes_between_synchronisations": passes,
        "pass_tokens": config["prompt_tokens"],
        "pass_cache": False,
        "logits_to_keep": 1,
        "moved_bytes_basis": basis(loaded, untimed_bytes),
    }
    answered = []
    counters = PcieCounters.open(machine.gpu_uuid() if exp.is_gpu else None)
    for number in range(runs):
        with exp.progress.task(f"run {number + 1} of {runs}"):
            before = link_rate(exp)
            if counters:
                counters.begin()
            run = one_run(loaded, prompt, tokens, passes)
            seen = counters.end() if counters else None
            record(exp, loaded, run, untimed_bytes, (before, link_rate(exp)))
        if seen:
            result.sample("gpm_rx_gbps", seen["rx_gbps"], "GB/s")
        answered.append(run.answers)
    if counters:
        counters.close()
    check_answers(exp, answered, reference)


def fitting(wanted: int, limit_s: float, each_s: float) -> int:
    """How many of `wanted` fit into `limit_s`, at least one."""
    return max(1, min(wanted, int(limit_s / each_s)))


def basis(loaded: Loaded, untimed_bytes: int | None) -> str:
    if loaded.copied_bytes is not None:
        return COUNTED_AT_THE_COPY
    return NOT_COUNTED if untimed_bytes is None else COUNTED_UNTIMED


def count_copies(exp: Experiment, loaded: Loaded, prompt: torch.Tensor) -> int | None:
    """Bytes that a peer's pass copies to the GPU, from one untimed pass; None where nothing can cross a link."""
    if loaded.copied_bytes is not None or not exp.is_gpu:
        return None
    with torch.no_grad(), CopiesToDevice() as copies:
        plain_pass(loaded.model, prompt)
    loaded.synchronize()
    return copies.bytes


def record(
    exp: Experiment,
    loaded: Loaded,
    run: Run,
    untimed_bytes: int | None,
    rates: tuple[float | None, float | None],
) -> None:
    """The samples of one run, and its gates."""
    result = exp.result
    moved_bytes = untimed_bytes if run.moved_bytes is None else run.moved_bytes
    result.sample("ttft_s", run.ttft_s, "s")
    result.sample("decode_s_per_token", run.decode_s_per_token, "s")
    result.sample("pass_s", run.pass_s, "s")
    result.sample("streamed_bytes", loaded.streamed_bytes, "bytes")
    result.sample("effective_gbps", loaded.streamed_bytes / run.pass_s / 1e9, "GB/s")
    if moved_bytes is not None:
        result.sample("moved_bytes", moved_bytes, "bytes")
        result.sample("link_gbps", moved_bytes / run.pass_s / 1e9, "GB/s")
    if loaded.planned_bytes is None or run.moved_bytes is None:
        result.check("moved_equals_plan", NOT_APPLICABLE)
    else:
        keep_worst(exp, "moved_equals_plan", run.moved_bytes == loaded.planned_bytes)
    known = [rate for rate in rates if rate is not None]
    if moved_bytes is None or not exp.is_gpu or not known:
        result.check("link_at_most_1.02_of_rate", NOT_APPLICABLE)
        return
    result.sample("run_h2d_gbps", statistics.mean(known), "GB/s")
    allowed_gbps = LINK_ALLOWED * statistics.mean(known)
    keep_worst(exp, "link_at_most_1.02_of_rate", moved_bytes / run.pass_s / 1e9 <= allowed_gbps)


def keep_worst(exp: Experiment, name: str, holds: bool) -> None:
    """Check a gate once per run; a run that breaks it is not forgotten in a later one."""
    earlier = exp.result.checks.get(name)
    if earlier is None or earlier["passed"] is not False:
        exp.result.check(name, holds)


def check_answers(exp: Experiment, answered: list[Answers], reference: Answers) -> None:
    """Tokens and logits of every run against the resident model's, as far as they were decoded."""
    result = exp.result
    result.check("tokens_equal", all(torch.equal(a.tokens, reference.tokens[: len(a.tokens)]) for a in answered))
    result.check(
        "logits_bit_equal",
        all(
            torch.equal(a.logits, reference.logits[: len(a.logits)])
            and torch.equal(a.pass_logits, reference.pass_logits)
            for a in answered
        ),
    )


def link_rate(exp: Experiment) -> float | None:
    """The link's rate at this moment, host to device, in GB/s, out of the runtime's host tier; None without a link.

    One GiB goes over in copies of the probe's size queued back to back, so that the probe fits beside a filled cap and
    its copies are as dense as one long one.
    """
    if not exp.is_gpu:
        return None
    with (
        opened(exp.device, PROBE_BYTES) as device,
        LinkBench(device, PROBE_BYTES, pinning=exp.config["machine"]["pinning"]) as bench,
    ):
        for _ in range(PROBE_WARMUPS):
            back_to_back_gbps(bench, PROBE_COPIES)
        return statistics.median(back_to_back_gbps(bench, PROBE_COPIES) for _ in range(PROBE_REPEATS))


def back_to_back_gbps(bench: LinkBench, copies: int) -> float:
    """The rate of `copies` copies towards the device, queued at once."""
    stream = bench.streams[0]
    bench.device.synchronize()
    began = time.perf_counter()
    for _ in range(copies):
        bench.device.copy(bench.near[0], bench.far[0], stream, Direction.H2D)
    stream.synchronize()
    return copies * bench.size_bytes / (time.perf_counter() - began) / 1e9
