"""Experiment 2, streaming: a model larger than the memory that it may use, by every system, measured one way.

    python -m workflow.scripts.streaming --run cpu --system djinn_chunk16mib \
        --out results/cpu/streaming/djinn_chunk16mib.json --trace results/cpu/streaming/dmon_djinn_chunk16mib.csv

The system `reference` goes first: the stock model, resident, whose tokens and logits all others must repeat bit for
bit. It writes them to reference.safetensors beside its result.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import torch

from djinn_core import machine
from workflow.lib import harness
from workflow.lib.memory import host_bytes, torch_pinned_outside_bytes
from workflow.lib.results import NOT_APPLICABLE
from workflow.lib.systems import SYSTEMS
from workflow.lib.trace import Trace, dmon, gpu_index, nothing_traced
from workflow.scripts.streaming_systems import measure, resident
from workflow.scripts.streaming_systems.base import Loaded, source_of, weight_bytes


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--trace", type=Path, help="write the text of nvidia-smi dmon here")
    mine, rest = own.parse_known_args()
    args = harness.arguments("streaming", systems=SYSTEMS["streaming"], argv=rest)
    with harness.written():
        nothing_traced(mine.trace, "the system was not run on this machine; its result says why")
        if args.system == "reference":
            resident.write(answers_file(args.out), {}, "")  # a run overwrites it
    with harness.experiment(args, experiment="streaming", system=args.system) as exp:
        exp.config["disable_kv_swap"] = True  # nothing here opens a session, so no KV can leave the device
        with dmon(mine.trace) as trace:
            if args.system == "reference":
                resident.run(exp, answers_file(exp.out))
            else:
                run(exp, args.system)
        note(exp, trace)


def note(exp: harness.Experiment, trace: Trace) -> None:
    """What the trace saw, and whether it was taken at all: reported, never a gate."""
    if not trace.running:
        return
    peak = trace.peak("rxpci", gpu_index(machine.gpu_uuid())) if exp.is_gpu else None
    exp.result.check("dmon_traced", trace.failure is None, gate=False)
    if trace.failure:
        exp.log.warning("%s", trace.failure)
    if peak is not None:
        exp.result.sample("dmon_rxpci_peak_gbps", peak / 1000, "GB/s")


def answers_file(out: Path) -> Path:
    """Where the reference's answers lie, beside every result of the run."""
    return out.with_name("reference.safetensors")


def run(exp: harness.Experiment, system: str) -> None:
    """Load one system, measure it, and check its memory."""
    config, result = exp.config, exp.result
    source = source_of(config)
    result.weights = {"kind": source.kind, "digest": source.digest, "size_bytes": weight_bytes(source)}
    reference = resident.read(answers_file(exp.out), source.digest)
    device = torch.device(exp.device)
    prompt = resident.seeded_prompt(source.config.vocab_size, config["prompt_tokens"], config["seed"], device)
    open_system = opener(exp, system, prompt)
    before_bytes = host_bytes()
    own_device_bytes = 0
    with exp.memory_sampler() as memory, ExitStack() as stack:
        with exp.progress.task("load"):
            began = time.perf_counter()
            loaded = stack.enter_context(open_system())
            loaded.synchronize()
            result.sample("load_s", time.perf_counter() - began - loaded.other_s, "s")
        config["system"] = loaded.settings | {"load_how": loaded.load_how}
        measure.measure(exp, loaded, prompt, reference)
        if loaded.own_device_bytes is not None:
            own_device_bytes = loaded.own_device_bytes()
        outside_bytes = torch_pinned_outside_bytes() if exp.is_gpu else 0
    # on the emulated device its memory is host memory too, and is no part of what the system needs of the host
    result.sample("host_bytes", memory.peak_host_bytes + outside_bytes - before_bytes - own_device_bytes, "bytes")
    check_cap(exp, memory.peak_device_bytes if exp.is_gpu else own_device_bytes or None)


def check_cap(exp: harness.Experiment, peak_bytes: int | None) -> None:
    """The peak of device memory under the cap; of a peer on a machine without a GPU, not applicable."""
    if peak_bytes is None:
        exp.result.check("under_cap", NOT_APPLICABLE)
        return
    exp.result.sample("peak_vram_bytes", peak_bytes, "bytes")
    exp.result.check("under_cap", peak_bytes <= exp.config["cap_bytes"])


def opener(exp: harness.Experiment, system: str, prompt: torch.Tensor) -> Callable[[], AbstractContextManager[Loaded]]:
    """What opens `system`; its libraries are imported here, before any clock runs."""
    if system.startswith("accelerate"):
        from workflow.scripts.streaming_systems import accelerate_peers

        return partial(getattr(accelerate_peers, system.removeprefix("accelerate_")), exp)
    if system.startswith("deepspeed"):
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if exp.is_gpu else "cpu")  # read when it is imported
        from workflow.scripts.streaming_systems import deepspeed_peers

        if system == "deepspeed_cpu_tuned":
            return partial(deepspeed_peers.cpu_tuned, exp, partial(measure.timed_pass, prompt=prompt))
        return partial(getattr(deepspeed_peers, system.removeprefix("deepspeed_")), exp)
    from workflow.scripts.streaming_systems import djinn_ring

    resident_layers = "fill" if system == "djinn_resident" else "none"
    chunk_bytes = exp.config["chunk_bytes"][system]
    coding = "ans" if system == "djinn_ans" else None
    return partial(djinn_ring.ring, exp, resident_layers=resident_layers, chunk_bytes=chunk_bytes, coding=coding)


if __name__ == "__main__":
    main()
