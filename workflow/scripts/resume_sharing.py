"""The pause trace: who can use the device while a session is paused.

A session stops halfway and pauses for some seconds, as it does while a person thinks. Meanwhile a second tenant asks
for all that was free while the session was live, and half of the session's state on top: it fits only if the session
has left. On a GPU the tenant is a process of its own; on the emulated device, which no other process can share, it
asks the same pool, and eager has no say there.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch

import djinn_core as djinn
from djinn_core.memory.ledger import Kind
from workflow.lib import children, harness
from workflow.lib.results import NOT_APPLICABLE
from workflow.scripts.resume_methods.base import Bench, Method

# The tenant: what its own context takes comes off its demand; then it computes in the memory that it got.
TENANT = """
import sys, torch
free_before, demand = int(sys.argv[1]), int(sys.argv[2])
torch.cuda.init()
torch.cuda.synchronize()
context = max(0, free_before - torch.cuda.mem_get_info()[0])
try:
    block = torch.empty(demand - context, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print("does not fit")
else:
    block.fill_(1)
    print("fits" if int(block[-1]) == 1 else "wrong bytes")
"""
TENANT_TIMEOUT_S = 60.0


def measure(
    exp: harness.Experiment, bench: Bench, runtime: djinn.Runtime, method: Method, prompt: torch.Tensor
) -> None:
    """Sample device memory through a pause, and try a second tenant in the middle of it."""
    handle = method.run_to(prompt, bench.depth // 2, "S")
    bench.device.synchronize()
    if exp.is_gpu:
        torch.cuda.empty_cache()  # what torch caches would count as taken for any method
    free_live = free_bytes(runtime)
    extra = live_bytes(bench, prompt) // 2
    method.pause(handle)
    begin_s = time.perf_counter()
    method.drain(handle)
    shared = None
    while (elapsed_s := time.perf_counter() - begin_s) < exp.config["pause_trace_s"]:
        used = bench.device.used_bytes()
        exp.result.sample("device_used_bytes", used, "bytes", method=method.name, time_s=round(elapsed_s, 3))
        if shared is None and elapsed_s >= 0.2:
            shared = tenant_fits(exp, runtime, free_live, extra, method)
        time.sleep(exp.config["pause_trace_interval_s"])
    resumed = method.resume(handle)
    resumed.done.synchronize()
    method.close(handle)
    exp.result.sample("tenant_demand_bytes", free_live + extra, "bytes", method=method.name)
    if shared is None:
        exp.result.check("gpu_shared", NOT_APPLICABLE)
    else:
        exp.result.check("gpu_shared", shared, gate=False)


def free_bytes(runtime: djinn.Runtime) -> int:
    """What a second tenant could get right now."""
    if runtime.device.is_gpu:
        return torch.cuda.mem_get_info()[0]
    return runtime.pool.free_bytes


def live_bytes(bench: Bench, prompt: torch.Tensor) -> int:
    """KV bytes of a prefill to the middle of the model."""
    config = bench.stock.config
    heads = config.num_key_value_heads * config.head_dim
    return bench.depth // 2 * prompt.shape[1] * 2 * heads * bench.stock.dtype.itemsize


def tenant_fits(
    exp: harness.Experiment, runtime: djinn.Runtime, free_live: int, extra: int, method: Method
) -> bool | None:
    """Whether a tenant that does not fit beside the live session fits now."""
    if exp.is_gpu:
        command = [sys.executable, "-c", TENANT, str(free_bytes(runtime)), str(free_live + extra)]
        with children.child(command, stdout=subprocess.PIPE, text=True) as tenant:
            answer = tenant.communicate(timeout=TENANT_TIMEOUT_S)[0].strip()
        if answer not in ("fits", "does not fit"):
            raise RuntimeError(f"the second tenant answered {answer!r}")
        return answer == "fits"
    if method.name != "djinn":
        return None
    try:
        extent = runtime.pool.acquire(free_live + extra, Kind.STAGING, "tenant")
    except djinn.OutOfDeviceMemory:
        return False
    runtime.pool.give_back(extent)
    return True
