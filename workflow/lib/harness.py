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
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow.lib import children, identity, limits, machine
from workflow.lib.config import SettingsError, load_config, section
from workflow.lib.gpulock import gpu_lock
from workflow.lib.memory import MemorySampler
from workflow.lib.progress import Progress
from workflow.lib.results import Result

log = logging.getLogger("djinn.experiment")


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
    """

    result: Result
    config: dict[str, Any]
    settings: dict[str, Any]
    device: str
    baseline_bytes: int | None
    progress: Progress
    out: Path
    log: logging.Logger = field(default=log)

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
    parser.add_argument("--run", required=True, help="a preset: cpu, l4, h100, h200")
    if systems:
        parser.add_argument("--system", required=True, choices=list(systems))
    parser.add_argument("--out", required=True, type=Path, help="the result file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument("--log", type=Path, help="write the log here instead of to stderr")
    return parser.parse_args(argv)


@contextmanager
def experiment(
    args: argparse.Namespace,
    *,
    experiment: str,
    system: str,
    measure: Callable[[str, dict[str, Any]], dict[str, float | None]] | None = None,
) -> Iterator[Experiment]:
    """Run the body of a `with` as one experiment; see the module's text.

    Args:
        measure: how the link is measured, for tests; the default is `limits.measure`.

    Raises:
        SystemExit: with status 2 and one line, the settings are wrong.
    """
    raise NotImplementedError
    yield
