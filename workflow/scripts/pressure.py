"""Experiment 3, memory pressure: more sessions than the cap holds; who completes, at what cost.

    python -m workflow.scripts.pressure --run cpu --system djinn --out results/cpu/pressure/djinn.json

`reference` writes what an unpaused stock model says to every prompt; the other systems read it beside their own
file and compare every token. Djinn runs under the cap and, as the ideal, without one.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import djinn_core as djinn
from workflow.lib import harness
from workflow.lib.results import read_result
from workflow.lib.systems import SYSTEMS
from workflow.scripts.pressure_systems import served_run, swaps
from workflow.scripts.pressure_systems.manual import StockTenant
from workflow.scripts.pressure_systems.trace import MemoryTrace
from workflow.scripts.pressure_systems.workload import (
    Callers,
    Tenant,
    TurnTimes,
    Workload,
    reference_tokens,
    run_turns,
)
from workflow.scripts.resume import make_bench
from workflow.scripts.resume_methods.base import Bench
from workflow.scripts.resume_methods.eager import Eager
from workflow.scripts.resume_methods.manual_offload import (
    Arena,
    ManualOffload,
    ManualOffloadOverlapped,
    ManualOffloadPinned,
)

STOCK_ALLOCATOR = "expandable_segments:True"  # stock caches grow by a token: without this a quarter of the cap is holes


def main() -> None:
    args = harness.arguments("pressure", systems=SYSTEMS["pressure"])
    if args.system not in ("djinn", "djinn_uncapped"):
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", STOCK_ALLOCATOR)  # read when torch first allocates
    if args.system == "djinn":
        with harness.written():
            swaps.write_log(args.out.parent / swaps.LOG, [("no event: the result says why", ())])  # a run overwrites it
    with harness.experiment(args, experiment="pressure", system=args.system) as exp, torch.inference_mode():
        gc.disable()  # every thread would wait for a collection, and one turn would be charged with it
        if args.system in ("djinn", "djinn_uncapped"):
            served_run.run(exp, capped=args.system == "djinn", wanted=wanted_tokens(exp))
        else:
            exp.config["torch_allocator"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"]
            run_stock(exp, args.system)


def wanted_tokens(exp: harness.Experiment) -> list[list[int]]:
    """The reference's tokens, by session."""
    document = read_result(exp.out.parent / "reference.json")
    if document["status"] != "ok":
        raise harness.Outcome("inconclusive", f"the reference is {document['status']}: {document['reason']}")
    return document["details"]["tokens"]


def run_stock(exp: harness.Experiment, system: str) -> None:
    """The systems that are written with the stock model."""
    config = exp.config
    arenas = system == "manual_offload"
    with djinn.Runtime(
        device=exp.device,
        budget_bytes=config["cap_bytes"] if system != "reference" else config["uncapped_bytes"],
        activation_bytes=config["stock_activation_bytes"],
        host_bytes=config["manual_host_bytes"] if arenas else config["staging_host_bytes"],
        pinning=config["machine"]["pinning"],
    ) as runtime:
        workload = Workload.of(config)
        bench = make_bench(exp, runtime, workload.max_length)
        record_demand(exp, bench, workload)
        if system == "reference":
            make_reference(exp, bench, workload)
        elif system == "eager":
            method = Eager(bench)
            run_seed(exp, bench, workload, lambda n: StockTenant(n, workload, bench, method, None), 0, "eager")
        else:
            size_bytes = workload.kv_bytes(bench.stock.config, bench.stock.dtype)
            size_bytes += size_bytes // workload.prompt_tokens * (workload.max_length - workload.prompt_tokens)
            size_bytes += (2 * bench.depth + 1) * 256 + bench.stock.config.hidden_size * 8
            with ExitStack() as held:
                host = [runtime.host.allocate(size_bytes, f"tenant-{n}") for n in range(workload.sessions)]
                for block in host:
                    held.callback(block.free)
                exp.config["host_pinned"] = runtime.host.pinned  # the tenants' memory, too, is there by now
                for method in (ManualOffloadPinned(bench), ManualOffloadOverlapped(bench)):
                    make = offload_tenants(workload, bench, method, [block.tensor for block in host])
                    run_seed(exp, bench, workload, make, 0, method.name)


def offload_tenants(
    workload: Workload, bench: Bench, method: ManualOffload, host: list[torch.Tensor]
) -> Callable[[int], Tenant]:
    """Tenants that reuse pinned memory, made by the runtime's own host tier as Djinn's is."""
    return lambda n: StockTenant(n, workload, bench, method, Arena(host[n]))


def record_demand(exp: harness.Experiment, bench: Bench, workload: Workload) -> None:
    """The bytes that all sessions and the weights would take together."""
    weights = sum(p.nbytes for p in bench.stock.parameters())
    kv_bytes = workload.kv_bytes(bench.stock.config, bench.stock.dtype)
    exp.config["demand_bytes"] = weights + workload.sessions * kv_bytes
    exp.config["session_kv_bytes"] = kv_bytes
    exp.config["weights_bytes"] = weights


def make_reference(exp: harness.Experiment, bench: Bench, workload: Workload) -> None:
    """Tokens of every session, and that saying them again gives the same ones."""
    tokens = [
        reference_tokens(bench.stock, workload, session)
        for session in exp.progress.track(range(workload.sessions), "reference")
    ]
    exp.result.extra["tokens"] = tokens
    again = reference_tokens(bench.stock, workload, 0)
    exp.result.check("reference_repeats", again == tokens[0])
    exp.result.sample("completed_sessions", len(tokens), "sessions")


def run_seed(
    exp: harness.Experiment,
    bench: Bench,
    workload: Workload,
    make: Callable[[int], Tenant],
    seed: int,
    method: str,
) -> None:
    """Spawn everyone, two rounds of turns, one caller: what a stock system does with this demand."""
    wanted = wanted_tokens(exp)
    tenants: list[Tenant] = []
    dims = {"seed": seed, "method": method}
    stopped: torch.OutOfMemoryError | None = None
    bench.device.synchronize()
    begin_s = time.perf_counter()
    with Callers(1, exp.config["caller_cores"]) as callers, MemoryTrace(exp, seed=seed, method=method) as trace:

        def arrive(number: int) -> None:
            spawn_s = time.perf_counter()
            trace.arriving(number + 1)
            tenant = make(number)
            tenant.spawn(workload.prompt(number, bench.stock))
            tenants.append(tenant)
            bench.device.synchronize()
            exp.result.sample("spawn_ms", (time.perf_counter() - spawn_s) * 1e3, "ms", **dims, session=number)

        try:
            callers.share(exp.progress.track(range(workload.sessions), f"{method}: spawn"), arrive, alone=True)
            trace.phase = "resume"
            take_rounds(exp, callers, workload, tenants, dims)
        except torch.OutOfMemoryError as error:
            stopped = error
        bench.device.synchronize()
        total_s = time.perf_counter() - begin_s
    exp.result.sample("sessions_at_cap", len(tenants), "sessions", **dims)
    complete = [t for t in tenants if len(t.tokens) == len(wanted[0])]
    exp.result.sample("completed_sessions", len(complete), "sessions", **dims)
    if stopped is None:
        exp.result.sample("total_s", total_s, "s", **dims)
    check_tokens(exp, f"tokens_equal_{method}_seed_{seed}", tenants, wanted, whole=stopped is None)
    opened = len(tenants)
    for tenant in tenants:
        tenant.close()
    tenants.clear()
    gc.collect()
    if stopped is not None:
        where = f"{method}: {opened} of {workload.sessions} sessions were open, {len(complete)} complete"
        raise harness.Outcome("out_of_memory", f"{where}: {str(stopped).splitlines()[0]}")


def check_tokens(
    exp: harness.Experiment, name: str, tenants: Sequence[Tenant], wanted: list[list[int]], *, whole: bool = True
) -> None:
    """The tokens equal the reference's, all of them or (not `whole`) those said so far; the log names who differs."""
    wrong = [t.number for t in tenants if t.tokens != wanted[t.number][: None if whole else len(t.tokens)]]
    if wrong:
        logging.getLogger("djinn.experiment").warning("%s: other tokens in sessions %s", name, wrong)
    exp.result.check(name, not wrong)


def record_times(exp: harness.Experiment, times: TurnTimes, dims: dict[str, Any]) -> None:
    """The samples of one turn; those of all turns are in one order, whatever the metric."""
    for metric in ("ready_ms", "next_token_ms", "begun_ms", "issue_ms", "token_ms"):
        if (value := getattr(times, metric)) is not None:
            exp.result.sample(metric, value, "ms", **dims)
    for span, value in times.spans.items():
        exp.result.sample("span_ms", value, "ms", span=span, **dims)


def take_rounds(
    exp: harness.Experiment, callers: Callers, workload: Workload, tenants: list[Any], dims: dict[str, Any]
) -> None:
    """All rounds of turns, in the seed's order."""

    def done(tenant: Tenant, times: TurnTimes) -> None:
        record_times(exp, times, dims | {"session": tenant.number})

    orders = [workload.order(dims["seed"], round_index) for round_index in range(workload.rounds)]
    cpu_s = sum(run_turns(callers, tenants, order, done) for order in orders)
    exp.result.sample("caller_cpu_s", cpu_s, "s", **dims)


if __name__ == "__main__":
    main()
