"""Experiment 3, resume latency: stop a prefill after a layer, take the state away, bring it back, go on.

    python -m workflow.scripts.resume --run cpu --system djinn --out results/cpu/resume/djinn.json

Each file holds one method and, interleaved with it repeat by repeat, the methods that it is compared with, so that
ratios are paired: row i of one method and row i of another were taken one after the other. Every resume is checked
against the uninterrupted logits of a stock model with its stock cache, bit for bit.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

import djinn_core as djinn
from djinn_core.models.stack import bind, build_meta_model
from workflow.lib import harness
from workflow.scripts import resume_sharing
from workflow.scripts.resume_methods.base import Bench, Method
from workflow.scripts.resume_methods.djinn import Djinn
from workflow.scripts.resume_methods.eager import Eager
from workflow.scripts.resume_methods.manual_offload import (
    ManualOffloadOverlapped,
    ManualOffloadPageable,
    ManualOffloadPinned,
)
from workflow.scripts.resume_methods.recompute import Recompute

METHODS = {
    method.name: method
    for method in (Eager, Recompute, ManualOffloadPageable, ManualOffloadPinned, ManualOffloadOverlapped, Djinn)
}
# what runs interleaved with a method, in its own file
PARTNERS = {
    "djinn": ("eager", "manual_offload_pinned", "manual_offload_overlapped"),
    "eager": (),
}
DEFAULT_PARTNERS = ("eager",)


@dataclass
class Contender:
    """One method with one state set, as it is interleaved with the others."""

    method: Method
    state: str
    handle: Any = None

    @property
    def dims(self) -> dict[str, str]:
        return {"method": self.method.name, "state": self.state}


def main() -> None:
    args = harness.arguments("resume", systems=tuple(METHODS))
    with harness.experiment(args, experiment="resume", system=args.system) as exp, torch.inference_mode():
        run(exp, args.system)


def run(exp: harness.Experiment, system: str) -> None:
    """Measure `system` with its partners at every layer, then what only this system is asked."""
    config = exp.config
    with djinn.Runtime(
        device=exp.device,
        budget_bytes=config["cap_bytes"],
        activation_bytes=config["activation_bytes"],
        host_bytes=config["host_bytes"],
        pool_reserve_bytes=0,
        pinning=config["machine"]["pinning"],
    ) as runtime:
        bench = make_bench(exp, runtime, config["prompt_tokens"] + config["answer_tokens"] + 1)
        names = (system, *PARTNERS.get(system, DEFAULT_PARTNERS))
        methods = [METHODS[name](bench) for name in names]
        prompt = seeded_prompt(bench, config["prompt_tokens"], seed=0)
        reference = uninterrupted(exp, bench, prompt)
        gc.disable()  # a collection in the middle of one repeat would be read as that method's time
        for layer in config["layers"]:
            measure_layer(exp, bench, methods, prompt, layer, reference)
            measure_drain(exp, bench, methods, prompt, layer)
        measure_next_token(exp, bench, methods, prompt)
        gc.enable()
        if system == "djinn":
            check_tokens(exp, bench)
            check_steering(exp, bench, prompt, reference)
        if system in ("eager", "djinn"):
            resume_sharing.measure(exp, bench, runtime, methods[0], prompt)
        exp.config["host_pinned"] = runtime.host.pinned  # sessions' memory, too, is there by now
        note_graphs(exp, bench)


def make_bench(exp: harness.Experiment, runtime: djinn.Runtime, max_length: int) -> Bench:
    """The served model, resident, and a stock model on the very same weights; sessions of `max_length` tokens."""
    config = exp.config
    dtype = getattr(torch, config["dtype"])
    with exp.progress.loading("load") as progress:
        model = config["model"]
        name = model["path"] or model["name"]
        served = runtime.load(
            name,
            dtype=dtype,
            seed=model["seed"],
            resident_layers="all",
            graphs=config["graphs"],
            progress=progress,
        )
    exp.config["host_pinned"] = runtime.host.pinned  # False: the system refused, and copies block
    loaded = served.djinn
    exp.result.weights = {"kind": loaded.source.kind, "digest": loaded.source.digest}
    stock = build_meta_model(loaded.source.config, dtype)
    bind(stock, {name: parameter.data for name, parameter in served.named_parameters()})
    gc.collect()
    gc.freeze()  # or a full collection walks over all that was imported while every thread waits
    return Bench(runtime.device, stock.eval(), served, max_length)


def note_graphs(exp: harness.Experiment, bench: Bench) -> None:
    """Which layers' passes came from graphs, if several in a launch, and why others did not; nothing without graphs."""
    graphs = bench.served.djinn.graphs
    if graphs is not None:
        exp.config["graphs_recorded"] = graphs.recorded
        exp.config["graphs_chained"] = graphs.chained > 0
        exp.config["graphs_refused"] = sorted(graphs.refused)


def seeded_prompt(bench: Bench, length: int, seed: int) -> torch.Tensor:
    """Token ids [1, length], the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, bench.stock.config.vocab_size, (1, length), generator=generator)
    return ids.to(bench.device.torch_device)


def uninterrupted(exp: harness.Experiment, bench: Bench, prompt: torch.Tensor) -> torch.Tensor:
    """The stock model's logits [1, vocab], shown to repeat themselves; only then does equal mean equal."""
    first, second = (bench.stock(prompt, logits_to_keep=1).logits[:, -1].clone() for _ in range(2))
    exp.result.check("reference_repeats", torch.equal(first, second))
    return first


def measure_layer(
    exp: harness.Experiment,
    bench: Bench,
    methods: list[Method],
    prompt: torch.Tensor,
    layer: int,
    reference: torch.Tensor,
) -> None:
    """All methods at one breakpoint, interleaved; every logit compared."""
    contenders = [Contender(method, state) for method in methods for state in method.states]
    for contender in contenders:
        contender.handle = contender.method.run_to(prompt, layer, contender.state)
        contender.method.pause(contender.handle)
        contender.method.drain(contender.handle)
    equal = executed_as_said = True
    repeats = exp.config["warmups"] + exp.config["repeats"]
    for repeat in exp.progress.track(range(repeats), f"after layer {layer}"):
        warmup = repeat < exp.config["warmups"]
        for contender in balanced(contenders, repeat):
            logits, executed = measure_resume(exp, bench, contender, warmup, {"layer": layer})
            equal &= torch.equal(logits, reference)
            wanted = bench.depth if contender.method.name == "recompute" else bench.depth - layer
            executed_as_said &= executed == wanted
            del logits
            contender.method.rewind(contender.handle)
    for contender in contenders:
        contender.method.close(contender.handle)
    exp.result.check(f"logits_bit_equal_layer_{layer}", equal)
    exp.result.check(f"executed_layers_layer_{layer}", executed_as_said)


def balanced(contenders: list[Contender], repeat: int) -> list[Contender]:
    """The order of this repeat, by a Williams design: a method inherits warm caches, or cold ones, from whoever ran
    before it, so everyone runs equally often right behind each other one: once in as many repeats as there are
    contenders, or, of an odd number, twice in twice as many. Who is first runs behind the repeat before."""
    count = len(contenders)
    inwards = [place for step in range(count // 2 + 1) for place in (step, count - step)]
    order = [contenders[(place + repeat) % count] for place in dict.fromkeys(place % count for place in inwards)]
    return order[::-1] if count % 2 and repeat // count % 2 else order


def measure_resume(
    exp: harness.Experiment,
    bench: Bench,
    contender: Contender,
    warmup: bool,
    dims: dict[str, Any],
    next_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """One resume, timed. Returns the logits and how many layers ran."""
    device, method, handle = bench.device, contender.method, contender.handle
    device.synchronize()
    start = device.event(timing=True)
    begin_s = time.perf_counter()
    start.record(device.current_stream())
    resumed = method.resume(handle, next_ids)
    resumed.done.synchronize()
    method.restored(handle)
    device.synchronize()
    restored_ms = (time.perf_counter() - begin_s) * 1e3
    last = "next_logits_ms" if next_ids is None else "next_token_ms"
    marks = {last: start.elapsed_time(resumed.done), "restored_ms": restored_ms}
    if next_ids is None:
        marks["ready_ms"] = start.elapsed_time(resumed.ready)
    dims = dims | contender.dims
    for metric, value in marks.items():
        # an event before `start` on an idle device may read as a hair below zero
        exp.result.sample(metric, max(0.0, value), "ms", warmup=warmup, **dims)
    record_transfer(exp, contender, restored_ms, warmup, dims)
    if exp.is_gpu:
        rest(restored_ms / 1e3)
    return resumed.logits, resumed.executed


def rest(seconds: float) -> None:
    """Leave the device idle, and the processor awake.

    Passes of a long prompt, one behind the other, drive a GPU to its power limit; how fast the next one is, is then up
    to those before it.
    """
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def record_transfer(
    exp: harness.Experiment, contender: Contender, elapsed_ms: float, warmup: bool, dims: dict[str, Any]
) -> None:
    """The bytes of a resume, what the certified rate would take for them, and the ratio to it."""
    size_bytes = contender.method.state_bytes(contender.handle)
    exp.result.sample("state_bytes", size_bytes, "bytes", warmup=warmup, **dims)

    def record_ratio() -> None:
        theoretical_ms = size_bytes / (exp.result.limits["h2d_gbps"] * 1e9) * 1e3
        exp.result.sample("theoretical_ms", theoretical_ms, "ms", warmup=warmup, **dims)
        exp.result.sample("ratio_to_theoretical", elapsed_ms / theoretical_ms, "ratio", warmup=warmup, **dims)

    if size_bytes:
        exp.at_end.append(record_ratio)


def measure_drain(
    exp: harness.Experiment, bench: Bench, methods: list[Method], prompt: torch.Tensor, layer: int
) -> None:
    """How long the first method's pause call takes, and how long until its memory is free, on a fresh state each time.

    `run_ms` has the way there, with eager's beside it: what a method does beforehand shows there.
    """
    own = methods[0]
    eager = [method for method in methods if method.name == "eager"] if own.name == "djinn" else []
    for state in own.states:
        for repeat in range(1 + exp.config["drain_repeats"]):
            for method in eager:
                handle = timed_run(exp, bench, method, prompt, layer, state="S", warmup=repeat == 0)
                method.close(handle)
            handle = timed_run(exp, bench, own, prompt, layer, state=state, warmup=repeat == 0)
            begin_s = time.perf_counter()
            own.pause(handle)
            paused_s = time.perf_counter()
            own.drain(handle)
            drained_s = time.perf_counter()
            dims = {"layer": layer, "method": own.name, "state": state, "warmup": repeat == 0}
            size_bytes, moved_bytes = own.drained_bytes(handle), own.moved_bytes(handle)
            own.close(handle)
            exp.result.sample("pause_ms", (paused_s - begin_s) * 1e3, "ms", **dims)
            exp.result.sample("drain_ms", (drained_s - begin_s) * 1e3, "ms", **dims)
            if size_bytes:
                gbps = size_bytes / (drained_s - begin_s) / 1e9
                exp.result.sample("drain_gbps", gbps, "GB/s", **dims)
                exp.result.sample("drain_moved_bytes", moved_bytes, "bytes", **dims)


def timed_run(
    exp: harness.Experiment, bench: Bench, method: Method, prompt: torch.Tensor, layer: int, *, state: str, warmup: bool
) -> Any:
    """Prefill to the end of `layer`, until the device is idle, copies included; the method's handle."""
    bench.device.synchronize()
    begin_s = time.perf_counter()
    handle = method.run_to(prompt, layer, state)
    bench.device.synchronize()
    took_ms = (time.perf_counter() - begin_s) * 1e3
    exp.result.sample("run_ms", took_ms, "ms", warmup=warmup, layer=layer, method=method.name, state=state)
    return handle


def measure_next_token(exp: harness.Experiment, bench: Bench, methods: list[Method], prompt: torch.Tensor) -> None:
    """From a finished prefill, paused: resume and run one token, which needs the whole KV cache."""
    contenders = [Contender(method, "S") for method in methods]
    next_ids = seeded_prompt(bench, 1, seed=1)
    for contender in contenders:
        contender.handle = contender.method.run_prefill(prompt)
        contender.method.pause(contender.handle)
        contender.method.drain(contender.handle)
    cache = bench.stock(prompt, use_cache=True, logits_to_keep=1).past_key_values
    reference = bench.stock(next_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].clone()
    del cache
    equal = True
    for repeat in range(exp.config["warmups"] + exp.config["repeats"]):
        warmup = repeat < exp.config["warmups"]
        for contender in balanced(contenders, repeat):
            logits, _ = measure_resume(exp, bench, contender, warmup, {}, next_ids)
            equal &= torch.equal(logits, reference)
            contender.method.rewind(contender.handle)
    for contender in contenders:
        contender.method.close(contender.handle)
    exp.result.check("next_token_logits_bit_equal", equal)


def check_tokens(exp: harness.Experiment, bench: Bench) -> None:
    """Tokens after a resume against the uninterrupted run: three depths, three prompts each."""
    count, equal, trials = exp.config["answer_tokens"], 0, 0
    for share in (0.25, 0.5, 0.75):
        for trial in range(exp.config["token_trials"]):
            prompt = seeded_prompt(bench, exp.config["prompt_tokens"], seed=100 + trial)
            wanted = bench.stock.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),  # else `generate` takes some token of it for padding
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )[:, prompt.shape[1] :]
            session = djinn.open_session(bench.served, max_length=bench.max_length)
            session.forward(prompt, stop_after=round(share * bench.depth))
            session.pause(release=True)
            session.wait_until("released", 60.0)
            session.resume()
            tokens = session.generate(count)
            session.close()
            equal += int((tokens == wanted).sum())
            trials += count
    exp.result.sample("token_accuracy", equal / trials, "share")
    exp.result.check("tokens_equal", equal == trials)


def check_steering(exp: harness.Experiment, bench: Bench, prompt: torch.Tensor, reference: torch.Tensor) -> None:
    """An edited resume must differ from the uninterrupted run; the checkpoint resumed again, unedited, must not."""
    session = djinn.open_session(bench.served, max_length=bench.max_length)
    checkpoint = session.forward(prompt, stop_after=bench.depth // 2)
    session.pause(release=True)
    session.wait_until("released", 60.0)
    steered = session.resume(checkpoint, edits=(djinn.Scale(0.9),))
    exp.result.check("steering_changes_logits", not torch.equal(steered, reference))
    session.pause(release=True)
    session.wait_until("released", 60.0)
    exp.result.check("unedited_checkpoint_unchanged", torch.equal(session.resume(checkpoint), reference))
    session.close()


if __name__ == "__main__":
    main()
