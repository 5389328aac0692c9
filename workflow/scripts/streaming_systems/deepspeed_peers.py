"""DeepSpeed ZeRO-3 inference, parameters offloaded to host memory or NVMe, in one process without a launcher.

DeepSpeed's own public functions throughout: `zero.Init` places each parameter on its tier while the model is built, and
`deepspeed.initialize` makes the engine. Not taken: `init_inference`, which ignores a ZeRO-3 section without a word.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.utils.cpp_extension import _get_build_directory
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from djinn_core.errors import UnsupportedModel
from djinn_core.models.source import WeightSource
from djinn_core.weights.store import read_all
from workflow.lib.config import GRID, read_grid
from workflow.lib.harness import Experiment, Outcome
from workflow.scripts.streaming_systems.base import (
    Loaded,
    cap_torch,
    computed_buffers,
    released,
    set_buffers,
    source_of,
    weight_bytes,
)

# A build belongs to its environment: ninja takes a build with other include paths for stale, so two environments that
# share torch's folder in the home directory compile each other's away, minutes each time.
if os.access(sys.prefix, os.W_OK):
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

HALF_SECTIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
NVME_BUFFERS = 8
NVME_PREFIX = "deepspeed-nvme-"
ASYNC_IO_PACKAGES = "apt install libaio-dev g++ python3-dev"
GRID_WARMUPS, GRID_TIMED = 1, 2  # of a few passes back to back; the first pass records the order of the modules


@contextmanager
def cpu(exp: Experiment) -> Iterator[Loaded]:
    """DeepSpeed's defaults, with the parameters in pinned host memory."""
    with session(exp), released():
        model, source = partitioned(exp, offload(exp, "cpu"))
        with engine(exp, model, source, offload(exp, "cpu")) as ready:
            yield loaded(exp, model, ready, "each tensor read straight into its partition in host memory")


@contextmanager
def cpu_tuned(exp: Experiment, timed_pass: Callable[[Loaded], float]) -> Iterator[Loaded]:
    """The fastest of DeepSpeed's defaults and the committed grid; each is measured briefly, by `timed_pass`."""
    with session(exp), released():
        model, source = partitioned(exp, offload(exp, "cpu"))
        how = "each tensor read straight into its partition in host memory, once for all points of the grid"
        began = time.perf_counter()
        best = search(exp, model, source, lambda ready: timed_pass(loaded(exp, model, ready, how)))
        search_s = time.perf_counter() - began
        with engine(exp, model, source, offload(exp, "cpu") | best) as ready:
            chosen = loaded(exp, model, ready, how)
            chosen.other_s = search_s
            yield chosen


def search(exp: Experiment, model: Any, source: WeightSource, seconds: Callable[[Any], float]) -> dict[str, int]:
    """The fastest of DeepSpeed's defaults and the grid; a point that the cap cannot hold is recorded and left out.

    Raises:
        Outcome: the cap holds none of them.
    """
    medians: list[tuple[float, dict[str, int]]] = []
    points = [{}, *grid_points(largest_layer_numel(model))]
    exp.config["grid"] = points
    for number, point in enumerate(points):
        try:
            with engine(exp, model, source, offload(exp, "cpu") | point) as ready:
                for _ in range(GRID_WARMUPS):
                    seconds(ready)
                times = [seconds(ready) for _ in range(GRID_TIMED)]
        except torch.OutOfMemoryError as error:
            exp.log.info("a point of the grid does not fit the cap: %s: %s", point, error)
            exp.result.extra.setdefault("grid_out_of_memory", []).append(point)
            continue
        for value in times:
            exp.result.sample("grid_pass_s", value, "s", point=number)
        medians.append((statistics.median(times), point))
    if not medians:
        raise Outcome("out_of_memory", f"the cap of {exp.config['cap_bytes']:,} bytes holds no point of {GRID.name}")
    best = min(medians, key=lambda entry: entry[0])[1]
    exp.log.info("the best of %d points: %s", len(points), best)
    return best


@contextmanager
def nvme(exp: Experiment) -> Iterator[Loaded]:
    """DeepSpeed's defaults, with the parameters in files that async_io reads; the files are removed afterwards."""
    reason = async_io_missing()
    if reason:
        raise Outcome("unsupported", reason)
    with (
        session(exp),
        released(),
        tempfile.TemporaryDirectory(prefix=NVME_PREFIX, dir=nvme_folder(exp)) as folder,
    ):
        zero = offload(exp, "nvme", folder)
        model, source = partitioned(exp, zero)
        written_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        exp.result.sample("nvme_written_bytes", written_bytes, "bytes")
        exp.result.check("nvme_written", written_bytes > 0)
        with engine(exp, model, source, zero) as ready:
            yield loaded(
                exp, model, ready, "each tensor gathered, read and written to its file (parameters from 1 MiB)"
            )


def grid_points(layer_numel: int) -> list[dict[str, int]]:
    """The committed grid in DeepSpeed's units (elements) for layers of this size."""
    return [
        {
            "stage3_prefetch_bucket_size": int(point["prefetch_layers"] * layer_numel),
            "stage3_max_live_parameters": int(point["live_layers"] * layer_numel),
            "stage3_max_reuse_distance": int(point["reuse_layers"] * layer_numel),
            "stage3_param_persistence_threshold": int(point["persistence_numel"]),
        }
        for point in read_grid()
    ]


def offload(exp: Experiment, where: str, folder: str | None = None) -> dict[str, Any]:
    """The ZeRO section's settings beyond DeepSpeed's defaults."""
    section: dict[str, Any] = {"device": where, "pin_memory": exp.is_gpu}
    if where == "nvme":
        source = source_of(exp.config)
        largest = max(shape.numel() for shape, _ in map(source.meta, source.names()))
        section |= {"nvme_path": folder, "buffer_count": NVME_BUFFERS, "buffer_size": largest}
    return {"offload_param": section}


def ds_config(dtype: torch.dtype, zero: dict[str, Any]) -> dict[str, Any]:
    """A whole DeepSpeed configuration for inference with ZeRO-3."""
    half = {HALF_SECTIONS[dtype]: {"enabled": True}} if dtype in HALF_SECTIONS else {}
    return half | {
        "zero_optimization": {"stage": 3} | zero,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
        "steps_per_print": 10**9,
    }


@contextmanager
def session(exp: Experiment) -> Iterator[None]:
    """DeepSpeed's process group of one, quiet, and gone afterwards."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not exp.is_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles that op for a minute
    deepspeed.init_distributed("nccl" if exp.is_gpu else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def partitioned(exp: Experiment, zero: dict[str, Any]) -> tuple[Any, WeightSource]:
    """The model with each parameter on its tier, filled with the same bytes as every other system's."""
    cap_torch(exp)
    source = source_of(exp.config)
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=ds_config(source.dtype, zero)):
        model = AutoModelForCausalLM.from_config(source.config, dtype=source.dtype)
    model.eval().requires_grad_(False)
    parameters = {name: model.get_parameter(name) for name in source.names()}
    if zero["offload_param"]["device"] == "cpu":
        for name, parameter in parameters.items():
            if parameter.ds_tensor.numel() != parameter.ds_numel:
                raise UnsupportedModel(f"{name}: DeepSpeed split it over ranks, and there is one rank")
        read_all(source, [(name, p.ds_tensor.data.view(p.ds_shape)) for name, p in parameters.items()])
        return model, source
    for name, parameter in parameters.items():
        host = torch.empty(parameter.ds_shape, dtype=source.dtype)
        source.read_into(name, host)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(host)
    return model, source


@contextmanager
def engine(exp: Experiment, model: Any, source: WeightSource, zero: dict[str, Any]) -> Iterator[Any]:
    """DeepSpeed's engine over a partitioned model; afterwards the model can have another one."""
    ready = deepspeed.initialize(model=model, config=ds_config(source.dtype, zero))[0]
    ready.module.eval()
    set_buffers(model, computed_buffers(source, exp.device))  # DeepSpeed casts every buffer that it sees made
    cap_torch(exp)  # again: the communicator lies outside torch's allocator
    try:
        yield ready
    finally:
        ready.destroy()
        model.ds_inflight_param_registry.clear()  # a pass that ran out of memory leaves fetches behind
        for parameter in model.parameters():
            parameter.ds_persist = False
            if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                parameter.ds_status = ZeroParamStatus.AVAILABLE
                parameter.ds_active_sub_modules.clear()
                parameter.partition()


def loaded(exp: Experiment, model: Any, ready: Any, how: str) -> Loaded:
    """An engine, as the protocol sees it; parameters below the persistence threshold stay on the device."""
    streamed = [p for p in model.parameters() if not p.ds_persist]
    streamed_bytes = sum(p.ds_numel * p.element_size() for p in streamed)
    return Loaded(ready, torch.device(exp.device), how, streamed_bytes, settings={"deepspeed": effective(ready)})


def effective(ready: Any) -> dict[str, Any]:
    """The ZeRO settings as the engine has them, defaults included."""
    known = ready._config.zero_config.model_dump(mode="json")
    wanted = (
        "stage",
        "overlap_comm",
        "prefetch_bucket_size",
        "max_live_parameters",
        "max_reuse_distance",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "offload_param",
    )
    settings = {name: known[name] for name in wanted}
    settings["offload_param"].pop("nvme_path")  # a temporary folder
    return settings | {"aio": dict(ready._config.aio_config)}


def largest_layer_numel(model: Any) -> int:
    """Elements of the largest decoder layer of a partitioned model."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return max(sum(p.ds_numel for p in layer.parameters()) for layer in layers)


def nvme_folder(exp: Experiment) -> str:
    """Where the files go: beside the results, so that they are on the disk that the run was given.

    What a killed run left there, as large as the model, is removed; nobody else uses it, since a run measures alone.

    Raises:
        Outcome: there is not enough room; with the bytes.
    """
    folder = exp.out.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(f"{NVME_PREFIX}*"):
        exp.log.warning("removing %s, left by a run that was killed", rest)
        shutil.rmtree(rest)
    needed_bytes, free_bytes = weight_bytes(source_of(exp.config)), shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise Outcome("unsupported", f"needs {needed_bytes:,} bytes of disk for the parameters, have {free_bytes:,}")
    return str(folder)


def async_io_missing() -> str | None:
    """Builds DeepSpeed's async_io (once per machine, minutes on two cores); None, or what is missing to build it."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures.replace("a", "")  # its builder knows no suffix, as in 9.0a
    if not architectures:
        del os.environ["TORCH_CUDA_ARCH_LIST"]
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return f"DeepSpeed's async_io needs libaio and a compiler; {ASYNC_IO_PACKAGES}"
    try:
        with building_alone(builder.name, "pin_memory"):  # it builds the second one first
            builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        return f"DeepSpeed's async_io was not built ({ASYNC_IO_PACKAGES}): {str(error)[-400:]}"
    return None


@contextmanager
def building_alone(*names: str) -> Iterator[None]:
    """Hold the build of these torch extensions against every other process that asks here.

    Torch's own lock is a file that a killed build leaves behind, and the next build waits for it without end. One that
    no process has open is such a rest, and goes; one of a build that did not ask here stays, and torch waits for it.
    """
    folders = [Path(_get_build_directory(name, verbose=False)) for name in names]
    with (folders[0] / "djinn.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for folder in folders:
            if not is_open(folder / "lock"):
                (folder / "lock").unlink(missing_ok=True)
        yield


def is_open(path: Path) -> bool:
    """Whether a process of this user has it open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process is gone, or another user's
            if link.samefile(path):
                return True
    return False


if __name__ == "__main__":
    print(async_io_missing() or "DeepSpeed's async_io is ready")
