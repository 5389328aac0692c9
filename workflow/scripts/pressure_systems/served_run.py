"""Djinn's part of the pressure experiment: seeds, think times, the event log, and the verdicts from the samples.

Where the card holds the demand, each seed is run without the cap too, right before or after it is run under the cap,
by turns, in the same process: how fast passes are issued wanders within minutes, and ratios must not see that. Each
run begins with an empty pool of extents, as the first one does, so that device memory shows who arrives.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import djinn_core as djinn
from workflow.lib import harness
from workflow.lib.results import NOT_APPLICABLE
from workflow.scripts import pressure
from workflow.scripts.pressure_systems import swaps
from workflow.scripts.pressure_systems.served import ServedTenant
from workflow.scripts.pressure_systems.trace import MemoryTrace
from workflow.scripts.pressure_systems.workload import Callers, Workload
from workflow.scripts.resume import make_bench, note_graphs
from workflow.scripts.resume_methods.base import Bench

RELEASE_TIMEOUT_S = 60.0
PREPARED_SHARE = 0.98  # of the host budget; slabs are whole units, so not quite all of it can be asked for


def run(exp: harness.Experiment, capped: bool, wanted: list[list[int]]) -> None:
    """All seeds, and under the cap the think-time variant too."""
    config = exp.config
    paired = capped and harness.what_is_missing(config, exp.result.machine, "djinn_uncapped") is None
    config["paired_with_uncapped"] = paired
    with (
        Callers(config["callers"], config["caller_cores"]) as callers,
        djinn.Runtime(
            device=exp.device,
            budget_bytes=config["cap_bytes"] if capped and not paired else config["uncapped_bytes"],
            activation_bytes=config["activation_bytes"],
            host_bytes=config["host_bytes"] if capped else config["staging_host_bytes"],
            disk_path=exp.out.parent if capped and config["disk_bytes"] else None,
            disk_bytes=config["disk_bytes"] if capped else 0,
            pool_reserve_bytes=config["cap_bytes"] if capped else config["uncapped_bytes"],
            pinning=config["machine"]["pinning"],
        ) as runtime,
    ):
        workload = Workload.of(config)
        bench = make_bench(exp, runtime, workload.max_length)
        pressure.record_demand(exp, bench, workload)
        if paired:
            runtime.resize(config["cap_bytes"])
        with exp.progress.task("pin host memory"):
            runtime.host.prepare(int(runtime.host.free_bytes * PREPARED_SHARE))
        exp.config["host_pinned"] = runtime.host.pinned  # sessions' memory, too, is there by now
        warm_up(bench, runtime, workload)
        callers.together(lambda: warm_up(bench, runtime, workload))
        logs: list[tuple[str, list[Any]]] = []
        try:
            for number, seed in enumerate(config["seeds"]):
                if paired and number % 2 == 0:
                    run_uncapped(exp, callers, bench, runtime, workload, seed, wanted)
                logs.append((f"seed {seed}", run_seed(exp, callers, bench, runtime, workload, seed, capped, wanted)))
                if paired and number % 2:
                    run_uncapped(exp, callers, bench, runtime, workload, seed, wanted)
                if capped:
                    uncontended(exp, bench, runtime, workload, number)
        finally:
            if capped:
                swaps.write_log(exp.out.parent / swaps.LOG, logs)
        if capped and config["disk_bytes"]:
            check_tiers(exp)
        if capped:
            for hinted in (False, True):
                think(exp, callers, bench, runtime, workload, hinted, wanted)
        note_graphs(exp, bench)


def warm_up(bench: Bench, runtime: djinn.Runtime, workload: Workload) -> None:
    """One session's turns before anything is timed: layers are recorded, and what a thread needs once is there."""
    with torch.inference_mode():
        tenant = ServedTenant(0, workload, bench)
        tenant.spawn(workload.prompt(0, bench.stock))
        tenant.turn()
        tenant.session.wait_until("clean", RELEASE_TIMEOUT_S)
        runtime.evict(tenant.session)
        tenant.turn()
        tenant.close()


def run_uncapped(
    exp: harness.Experiment,
    callers: Callers,
    bench: Bench,
    runtime: djinn.Runtime,
    workload: Workload,
    seed: int,
    wanted: list[list[int]],
) -> None:
    """The ideal beside a capped run of this seed: nothing but the budget differs. The cap holds again on return."""
    runtime.resize(exp.config["uncapped_bytes"])
    runtime.pool.trim()
    dims = {"seed": seed, "method": "djinn_uncapped"}
    trace = MemoryTrace(exp, **dims, runtime=runtime, recorded=False)
    tenants = take_all(exp, callers, bench, workload, trace, dims)
    settle(tenants)
    pressure.check_tokens(exp, f"tokens_equal_uncapped_seed_{seed}", tenants, wanted)
    close_all(tenants)
    runtime.resize(exp.config["cap_bytes"])


def take_all(
    exp: harness.Experiment,
    callers: Callers,
    bench: Bench,
    workload: Workload,
    trace: MemoryTrace,
    dims: dict[str, Any],
) -> list[ServedTenant]:
    """Spawn everyone, and all rounds of turns in the seed's order: what `total_s` is of.

    Between two arrivals the device is not waited for: write-backs run beside the next prefill.
    """
    tenants: list[ServedTenant] = []

    def arrive(number: int) -> None:
        arrived_s = time.perf_counter()
        trace.arriving(number + 1)
        tenant = ServedTenant(number, workload, bench)
        tenant.spawn(workload.prompt(number, bench.stock))
        tenants.append(tenant)
        exp.result.sample("spawn_ms", (time.perf_counter() - arrived_s) * 1e3, "ms", **dims, session=number)

    arrivals = exp.progress.track(range(workload.sessions), f"seed {dims['seed']}: spawn")
    bench.device.synchronize()
    begin_s = time.perf_counter()
    with trace:
        callers.share(arrivals, arrive, alone=True)
        trace.phase = "resume"
        pressure.take_rounds(exp, callers, workload, tenants, dims)
        bench.device.synchronize()
        total_s = time.perf_counter() - begin_s
    exp.result.sample("total_s", total_s, "s", **dims)
    return tenants


def run_seed(
    exp: harness.Experiment,
    callers: Callers,
    bench: Bench,
    runtime: djinn.Runtime,
    workload: Workload,
    seed: int,
    capped: bool,
    wanted: list[list[int]],
) -> list[Any]:
    """`take_all` of one seed, and what the samples say of it; returns the pager's events."""
    dims = {"seed": seed, "method": "djinn"}
    runtime.events.clear()
    runtime.pool.trim()
    origin = bench.device.event(timing=True)
    origin.record(bench.device.current_stream())
    trace = MemoryTrace(exp, **dims, runtime=runtime)
    tenants = take_all(exp, callers, bench, workload, trace, dims)
    if capped:
        settle(tenants)
    events = list(runtime.events)
    complete = sum(tenant.tokens == wanted[tenant.number] for tenant in tenants)
    exp.result.sample("completed_sessions", complete, "sessions", **dims)
    exp.result.sample("sessions_at_cap", len(tenants), "sessions", **dims)
    pressure.check_tokens(exp, f"tokens_equal_seed_{seed}", tenants, wanted)
    swaps.record(exp, events, origin, {tenant.session.id: tenant.number for tenant in tenants}, dims)
    if capped:
        check_cap(exp, trace, seed)
        check_evicted(exp, seed)
    close_all(tenants)
    return events


def settle(tenants: list[ServedTenant]) -> None:
    """Wait for the write-backs that the last pauses began; they are not part of the time."""
    for tenant in tenants:
        tenant.session.wait_until("clean", RELEASE_TIMEOUT_S)


def close_all(tenants: list[ServedTenant]) -> None:
    for tenant in tenants:
        tenant.close()
    tenants.clear()
    gc.collect()


def check_cap(exp: harness.Experiment, trace: MemoryTrace, seed: int) -> None:
    """No sample above the cap, and a flat line once it is reached."""
    peak_bytes, cap_bytes = trace.peak_bytes, exp.config["cap_bytes"]
    exp.result.check(f"under_cap_seed_{seed}", NOT_APPLICABLE if peak_bytes is None else peak_bytes <= cap_bytes)
    exp.result.sample("peak_device_bytes", peak_bytes or 0, "bytes", seed=seed, method="djinn")
    slope, error = slope_after_cap(exp, seed)
    exp.result.sample("slope_bytes_per_session", slope, "bytes/session", seed=seed, method="djinn")
    exp.result.sample("slope_error_bytes_per_session", error, "bytes/session", seed=seed, method="djinn")
    # within noise: twice its standard error, or a hundredth of what a session adds where nothing is evicted
    flat = abs(slope) <= max(2 * error, 0.01 * exp.config["session_kv_bytes"])
    exp.result.check(f"flat_after_cap_seed_{seed}", flat, gate=False)


def slope_after_cap(exp: harness.Experiment, seed: int) -> tuple[float, float]:
    """Least-squares slope of device memory over open sessions while they spawn, once their demand passes the cap."""
    config = exp.config
    fits = (config["cap_bytes"] - config["weights_bytes"]) // config["session_kv_bytes"]
    source = "nvml" if exp.is_gpu else "ledger"
    rows = [
        (row["sessions"], row["value"])
        for row in exp.result.samples
        if row["metric"] == "device_bytes"
        and row.get("source") == source
        and row.get("seed") == seed
        and row["variant"] == "rounds"
        and row["phase"] == "spawn"
        and row["sessions"] > fits + 1  # the first that does not fit may still be arriving
    ]
    if len({sessions for sessions, _ in rows}) < 3:
        raise harness.Outcome("inconclusive", f"{len(rows)} memory samples after the cap was reached are too few")
    x, y = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    residual = y - y.mean() - slope * x
    error = float(np.sqrt((residual**2).sum() / max(1, len(x) - 2) / (x * x).sum()))
    return slope, error


def check_evicted(exp: harness.Experiment, seed: int) -> None:
    """At least what does not fit had to leave."""
    evicted = sum(
        row["value"] for row in exp.result.samples if row["metric"] == "evicted_bytes" and row.get("seed") == seed
    )
    shortfall = exp.config["demand_bytes"] - exp.config["cap_bytes"]
    exp.result.check(f"evicted_at_least_demand_minus_cap_seed_{seed}", evicted >= shortfall)


def check_tiers(exp: harness.Experiment) -> None:
    """Where a disk is given, sessions went there and came back: the demand is more than device and host hold."""
    seen = {row["metric"] for row in exp.result.samples}
    exp.result.check("went_to_disk_and_back", {"disk_write_bytes", "disk_read_bytes"} <= seen)


def uncontended(exp: harness.Experiment, bench: Bench, runtime: djinn.Runtime, workload: Workload, number: int) -> None:
    """What `ready_ms` is when nobody else is there: one caller, one session, off the device at each resume.

    A share of the repeats behind each seed's run (`number` counts them): how fast Python is wanders within minutes.
    """
    runs, repeats = len(exp.config["seeds"]), exp.config["uncontended_repeats"]
    share = repeats // runs + (number < repeats % runs)
    tenant = ServedTenant(0, replace(workload, rounds=1 + share), bench)
    tenant.spawn(workload.prompt(0, bench.stock))

    def call() -> None:
        with torch.inference_mode():
            for repeat in range(1 + share):
                tenant.session.wait_until("clean", RELEASE_TIMEOUT_S)
                runtime.evict(tenant.session)
                bench.device.synchronize()
                times = tenant.turn()
                pressure.record_times(exp, times, {"method": "djinn_uncontended", "warmup": repeat == 0})

    with Callers(1, exp.config["caller_cores"]) as caller:
        caller.together(call)
    tenant.close()


def think(
    exp: harness.Experiment,
    callers: Callers,
    bench: Bench,
    runtime: djinn.Runtime,
    workload: Workload,
    hinted: bool,
    wanted: list[list[int]],
) -> None:
    """Sessions think between turns, for seeded log-normal times; who is told when, finds its state resident."""
    variant = "think_hinted" if hinted else "think"
    settings = exp.config["think"]
    draws = np.random.default_rng(settings["seed"]).lognormal(
        np.log(settings["median_s"]), settings["sigma"], (workload.rounds, workload.sessions)
    )
    dims = {"seed": settings["seed"], "method": "djinn", "variant": variant}
    tenants = [ServedTenant(number, workload, bench) for number in range(workload.sessions)]
    due: list[tuple[float, int]] = []
    taken, recording = [0] * workload.sessions, threading.Lock()

    def arrive(number: int) -> None:
        tenant, pause_s = tenants[number], float(draws[0, number])
        tenant.expected_resume_s = pause_s if hinted else None
        tenant.spawn(workload.prompt(number, bench.stock))
        due.append((time.monotonic() + pause_s, number))

    def turn(number: int) -> float | None:
        tenant = tenants[number]
        taken[number] += 1
        pause_s = None if taken[number] == workload.rounds else float(draws[taken[number], number])
        tenant.expected_resume_s = pause_s if hinted else None
        times = tenant.turn()
        with recording:
            exp.result.sample("found_resident", float(tenant.found_resident), "share", **dims, session=number)
            pressure.record_times(exp, times, dims | {"session": number})
        return pause_s

    callers.share(exp.progress.track(range(workload.sessions), f"{variant}: spawn"), arrive, alone=True)
    callers.when_due(due, turn)
    share = np.mean(
        [r["value"] for r in exp.result.samples if r["metric"] == "found_resident" and r["variant"] == variant]
    )
    logging.getLogger("djinn.experiment").info(
        "%s: %.1f %% of resumes found their state resident", variant, 100 * share
    )
    pressure.check_tokens(exp, f"tokens_equal_{variant}", tenants, wanted)
    close_all(tenants)
