"""What every experiment does around its own work, so that no experiment can leave it out.

    args = harness.arguments("streaming", systems=SYSTEMS)
    with harness.experiment(args, experiment="streaming", system=args.system) as exp:
        ...                                   # measure; exp.result.sample(...), exp.result.check(...)

Entering: settings are read and checked, the GPU is locked (others wait), the machine's state and the device memory
before this process are noted, threads and attention are set alike for all systems, the link is measured. Leaving:
the link and the state are measured again, and one valid file is written. A recorded outcome (out of memory,
unsupported, inconclusive, a broken gate) exits 0 with its file; a bug writes nothing and exits 1.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from djinn_core import machine
from djinn_core.errors import CapacityError, DjinnError, PinningRefused, UnsupportedModel
from workflow.lib import cgroup, children, identity, limits
from workflow.lib.config import SettingsError, load_config, section
from workflow.lib.gpulock import LockError, gpu_lock
from workflow.lib.memory import MemorySampler
from workflow.lib.progress import Progress
from workflow.lib.results import DRIFTED, NotWritten, Result, writing

log = logging.getLogger("djinn.experiment")
Measure = Callable[[str, dict[str, Any]], dict[str, float | None]]
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Outcome(Exception):
    """Raised by an experiment to end with a recorded status: `unsupported`, `out_of_memory` or `inconclusive`."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass
class Experiment:
    """One experiment while it runs.

    Attributes:
        result: what will be written; add samples and checks to it.
        config: the effective settings of this experiment, the same object as `result.config`: what the code finds
            out on the way is added here. `config["machine"]` has the machine's settings.
        settings: the whole run's settings.
        device: ``"cuda:0"`` or ``"cpu"``.
        baseline_bytes: device memory in use before this process touched the device; None without a GPU.
        progress: bars on a terminal, quiet lines in a log.
        at_end: called once the link has been measured again and `result.limits` is whole: for ratios to it.
    """

    result: Result
    config: dict[str, Any]
    settings: dict[str, Any]
    device: str
    baseline_bytes: int | None
    progress: Progress
    out: Path
    log: logging.Logger = field(default=log)
    at_end: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    def memory_sampler(self, hz: float = 20.0) -> MemorySampler:
        """A sampler of this process's memory, host and device, in a process of its own (a context manager)."""
        return MemorySampler(hz=hz, gpu=machine.gpu_uuid() if self.is_gpu else None, baseline_bytes=self.baseline_bytes)

    def time_left_s(self) -> float:
        """What is left of the time that the preset expects this system to take (`expected.time_s`), not below 0."""
        return max(0.0, self.config["expected"]["time_s"] - self.progress.elapsed_s)


def arguments(experiment: str, *, systems: Sequence[str] = (), argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of an experiment script: --run, --out, --set, and --system where there are several."""
    parser = argparse.ArgumentParser(prog=f"python -m workflow.scripts.{experiment}")
    parser.add_argument("--run", required=True, help="a preset: the name of a file in config/presets")
    if systems:
        parser.add_argument("--system", required=True, choices=list(systems))
    parser.add_argument("--out", required=True, type=Path, help="the result file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument("--log", type=Path, help="write the log here instead of to stderr")
    return parser.parse_args(argv)


class LogFile(logging.FileHandler):
    """A log that may end before the work does: what the disk does not take is told once, and stops nothing."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where `record` could not be written."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print(f"{self.baseFilename} lacks lines from here on: {error.strerror}; make room", file=sys.stderr)


def start_logging(path: Path | None) -> None:
    """The log goes to `path`, warnings also to stderr; without a path all of it goes to stderr.

    Raises:
        SystemExit: with status 1 and one line, `path` cannot be written.
    """
    to_stderr = logging.StreamHandler()
    handlers: list[logging.Handler] = [to_stderr]
    if path is not None:
        with written(), writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(LogFile(path, mode="w", encoding="utf-8"))
        to_stderr.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, handlers=handlers, force=True)


@contextmanager
def one_line(what: type[Exception], status: int = 1) -> Iterator[None]:
    """An error of this kind, which its user can mend, ends the process with one line in the log and this status."""
    try:
        yield
    except what as error:
        log.error("%s", error)
        raise SystemExit(status) from error


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The run's checked settings; wrong ones end the process with status 2 and one line."""
    with one_line(SettingsError, 2):
        return load_config(args.run, args.overrides)


def own_section(settings: dict[str, Any], experiment: str) -> dict[str, Any]:
    """The experiment's settings; a preset that does not measure it ends the process with status 2 and one line."""
    with one_line(SettingsError, 2):
        return section(settings, experiment)


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Log, settings, and an end that leaves nothing behind; what every script does first."""
    start_logging(args.log)
    children.terminate_cleanly()
    return read_settings(args)


@contextmanager
def lock_of(device: str) -> Iterator[float]:
    """The lock that a job on `device` must hold, none on the emulated device; one that cannot be taken ends it."""
    uuid = machine.gpu_uuid() if device != "cpu" else None
    with one_line(LockError), nullcontext(0.0) if uuid is None else gpu_lock(uuid) as waited_s:
        yield waited_s


def written() -> AbstractContextManager[None]:
    """Around the writing of a file: one that the disk does not take ends the process with status 1 and one line."""
    return one_line(NotWritten)


@contextmanager
def experiment(
    args: argparse.Namespace, *, experiment: str, system: str, measure: Measure = limits.measure
) -> Iterator[Experiment]:
    """Run the body of a `with` as one experiment; see the module's text.

    Args:
        measure: how the link is measured.

    Raises:
        SystemExit: with status 2 and one line, the settings are wrong; with status 0 before the body, the file is
            written and says why nothing was measured.
    """
    settings = begin(args)
    config = own_section(settings, experiment)
    device = config["machine"]["device"]
    result = Result(experiment, system, args.run, config)
    progress = Progress(f"{experiment}/{system}")
    with lock_of(device) as waited_s:
        log.info("%s/%s on %s, waited %.1f s for it", experiment, system, device, waited_s)
        uuid = describe(result, device)
        reason = what_is_missing(config, result.machine, system)
        if reason is not None:
            leave_early(result, args.out, "unsupported", reason)
        if result.machine["state"]["before"]["foreign_processes"]:
            leave_early(result, args.out, "inconclusive", foreign_reason(result, "before"))
        baseline_bytes = machine.device_used_bytes(uuid) if uuid is not None and device != "cpu" else None
        equal_conditions(config)
        before = measure(device, config["machine"])
        result.limits = {"before": before}
        exp = Experiment(result, config, settings, device, baseline_bytes, progress, args.out)
        began_s = time.monotonic()
        try:
            yield exp
        except BaseException as error:
            first = origin(error)
            status = status_of(first)
            if isinstance(first, NotWritten):
                with written():
                    raise first from first.__cause__
            if status is None:
                log.exception("%s/%s was interrupted, or failed on a bug: no file", experiment, system)
                raise
            reason = "; ".join([f"{type(first).__name__}: {first}", *getattr(first, "__notes__", ())])
            log.warning("%s: %s", status, reason)
            log.info("where it was raised", exc_info=error)  # for the file: a user's mistake needs no traceback
            result.fail(status, reason)
            traceback.clear_frames(error.__traceback__)  # their tensors would stand in the way of the next measurement
        took_s = time.monotonic() - began_s
        give_back_memory(device)
        after = measure(device, config["machine"])
        result.limits = limits.bracket(experiment, system, before, after, config["machine"])
        for late in exp.at_end:
            late()
        result.machine["state"]["after"] = machine.state(uuid)
    judge(result)
    with written():
        result.write(args.out)
    log.info(
        "%s/%s: %s in %.1f s of %.1f s in all, %d samples, in %s%s",
        *(experiment, system, result.status, took_s, progress.elapsed_s, len(result.samples), args.out),
        f" ({result.reason})" if result.reason else "",
    )


def describe(result: Result, device: str) -> str | None:
    """Fill in machine, source and libraries; returns the GPU's UUID where the experiment runs on one."""
    uuid = machine.gpu_uuid() if device != "cpu" else None
    kind = machine.kind(uuid)
    before = machine.state(uuid)
    result.machine = {"kind": kind, "id": machine.identity(kind, uuid), "state": {"before": before, "after": before}}
    result.source = identity.source_of(result.experiment)
    result.libraries = identity.libraries()
    return uuid


def what_is_missing(config: dict[str, Any], facts: dict[str, Any], system: str) -> str | None:
    """One line "needs X, have Y" when this machine cannot hold the experiment; None when it can."""
    kind = facts["kind"]
    if config["machine"]["device"] != "cpu" and kind["gpu"] is None:
        return "needs an NVIDIA GPU and its driver, have none; use the cpu preset"
    needs = config["expected"] | config.get("expected_by_system", {}).get(system, {})
    host_bytes = facts["state"]["before"]["host_free_bytes"]
    limited_bytes = cgroup.free_bytes()
    have = {
        "device_bytes": kind["gpu_memory_bytes"],
        "host_bytes": host_bytes if limited_bytes is None else min(host_bytes, limited_bytes),
    }
    for name, where in (("device_bytes", "on the GPU"), ("host_bytes", "of free host memory")):
        if have[name] is not None and needs[name] > have[name]:
            return f"needs {needs[name]:,} bytes {where}, have {have[name]:,}"
    return None


def foreign_reason(result: Result, when: str) -> str:
    processes = result.machine["state"][when]["foreign_processes"]
    return f"other processes used the GPU {when} the measurement: {', '.join(processes)}"


def leave_early(result: Result, out: Path, status: str, reason: str) -> None:
    """Write a result without a measurement and end with status 0."""
    result.fail(status, reason)
    with written():
        result.write(out)
    log.warning("%s/%s: %s: %s", result.experiment, result.system, status, reason)
    raise SystemExit(0)


def equal_conditions(config: dict[str, Any]) -> None:
    """The same threads and attention for every system, and a record of all of it in `config`.

    Snakemake exports OMP_NUM_THREADS=1 into its jobs, so threads are set here, for this process and its children.
    cuDNN's attention does not repeat itself in fp16, so it is off. With Python's own switch interval, 5 ms, a thread
    that launches kernels holds up one that issues copies for as long as several layers take; how short it had better be
    depends on whether one resume has to be quick or many callers get on, so each experiment sets it.
    """
    threads = config["machine"]["threads"] or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.backends.cuda.enable_cudnn_sdp(False)
    sys.setswitchinterval(config["switch_interval_s"])
    config["threads"] = torch.get_num_threads()
    config["attention"] = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }


def origin(error: BaseException) -> BaseException:
    """What went wrong first: an error raised while another one was on its way out tells the end of the story only."""
    while error.__cause__ is None and error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def status_of(error: BaseException) -> str | None:
    """The status that an exception stands for; None for a bug and for an interruption."""
    if isinstance(error, Outcome):
        return error.status
    if isinstance(error, UnsupportedModel):
        return "unsupported"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out_of_memory"
    if isinstance(error, CapacityError) and not isinstance(error, PinningRefused):
        return "out_of_memory"
    return "failed" if isinstance(error, DjinnError) else None


def give_back_memory(device: str) -> None:
    """What the body left behind, so that the link is measured on the same machine as before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def judge(result: Result) -> None:
    """Foreign processes, and drift of a rate that the experiment's ratios use, make a measurement inconclusive."""
    if result.machine["state"]["after"]["foreign_processes"]:
        reason = foreign_reason(result, "after")
        if result.status == "out_of_memory":  # whose memory it was cannot be said
            result.status = "inconclusive"
        result.fail("inconclusive", reason)
    link = result.limits
    drifted = limits.moved(link)
    if link["drift_decides"] and drifted:
        by = ", ".join(f"{name} by {share:.2%}" for name, share in drifted.items())
        allowed = f"{link['drift_allowed']:.0%} is allowed"
        result.fail("inconclusive", f"{DRIFTED}: {by}; {allowed}")
