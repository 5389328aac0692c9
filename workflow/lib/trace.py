"""What the GPU itself says about its link, beside a measurement: `nvidia-smi dmon`, and NVML's GPM counters.

Both corroborate. dmon samples once a second and counts protocol overhead (58-59 GB/s for a payload of 53-54), so no
claim is computed from it, and its text is kept as nvidia-smi wrote it. Columns are found by the header's names: their
order and number differ between drivers, and `-s pcit` of older scripts is refused by driver 580.

Not taken: integrating dmon's column into bytes moved. One sample a second of a varying rate is not a count.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pynvml

from workflow.lib import children
from workflow.lib.results import write_text

DMON = ("nvidia-smi", "dmon", "-s", "pct", "-d", "1", "-o", "T")
MIB = 1 << 20


class TraceError(Exception):
    """A trace that cannot be read, or counters that were asked in the wrong order; the message says what."""


def nothing_traced(path: str | Path | None, why: str) -> None:
    """A trace that holds one comment; what takes a trace overwrites it."""
    if path is not None:
        write_text(path, f"# nothing was traced: {why}\n")


@dataclass
class Trace:
    """How a trace went: `running` is False where there is no nvidia-smi, `failure` is set where it ended by itself."""

    path: Path | None
    running: bool = False
    failure: str | None = None

    def peak(self, column: str, gpu: int) -> float | None:
        """The highest value of a column for one GPU (by nvidia-smi's index); None where nothing was traced.

        A text that cannot be read is a `failure` of the trace.
        """
        if not self.running or self.failure:
            return None
        try:
            rows = parse_dmon(self.path.read_text())
        except TraceError as error:
            self.failure = f"{self.path.name}: {error}"
            return None
        seen = [row[column] for row in rows if row["gpu"] == gpu and row.get(column) is not None]
        return max(seen, default=None)


@contextmanager
def dmon(path: str | Path | None) -> Iterator[Trace]:
    """nvidia-smi's device monitor beside the `with` block, its text in `path`; yields how it goes.

    Without nvidia-smi the file holds one comment that says so; without `path` nothing is traced. A monitor that fails
    does not cost the measurement beside it: `failure` has what it wrote, and so has the file.
    """
    trace = Trace(None if path is None else Path(path))
    if path is None:
        yield trace
        return
    if shutil.which(DMON[0]) is None:
        nothing_traced(path, "nvidia-smi is not on this machine")
        yield trace
        return
    trace.path.parent.mkdir(parents=True, exist_ok=True)
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with trace.path.open("wb") as file, children.child(DMON, stdout=file, **streams) as process:
        trace.running = True
        yield trace
        ended = process.poll()
    if ended is not None:
        wrote = trace.path.read_text()[-300:].strip()
        trace.failure = f"`{' '.join(DMON)}` ended by itself with status {ended}: {wrote}"


def parse_dmon(text: str) -> list[dict[str, str | float | None]]:
    """The rows of a dmon trace, by the names in its header: numbers as floats, `-` as None, the time as text.

    dmon repeats its header; each row is read by the last header before it. A last line without an end was being written
    when dmon was ended, and is left out.

    Raises:
        TraceError: a row before any header, or of another width than its header.
    """
    rows: list[dict[str, str | float | None]] = []
    names: list[str] = []
    after_names = False
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        if line.startswith("#"):
            fields = line.lstrip("#").split()
            if "gpu" in fields:
                names, after_names = fields, True
            elif not after_names and not names:
                continue  # a comment, as on a machine without nvidia-smi
            else:
                after_names = False  # the line of units
            continue
        fields = line.split()
        if not fields:
            continue
        if len(fields) != len(names):
            raise TraceError(f"line {number}: {len(fields)} fields under a header of {len(names)}: {line.strip()!r}")
        rows.append({name: _field(name, value) for name, value in zip(names, fields, strict=True)})
    return rows


def _field(name: str, value: str) -> str | float | None:
    if name == "Time":
        return value
    if value == "-":
        return None
    try:
        return float(value)
    except ValueError as error:
        raise TraceError(f"{name}: {value!r} is not a number") from error


class PcieCounters:
    """NVML's GPM counters of the PCIe link, as a mean rate between two moments. Close it.

    Use `PcieCounters.open`, which answers None where the card or the driver has no GPM.
    """

    SETTLE_S = 0.1  # NVML wants at least this between two samples

    def __init__(self, handle: object) -> None:
        self._handle = handle
        self._before, self._after = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
        self._began_s: float | None = None

    @classmethod
    def open(cls, uuid: str | None) -> PcieCounters | None:
        """The counters of the GPU with this UUID; None without a GPU or without GPM."""
        if uuid is None:
            return None
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            if pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                return cls(handle)
        except pynvml.NVMLError:
            pass  # a card before Hopper, a driver without GPM, or one that does not let us
        pynvml.nvmlShutdown()
        return None

    def begin(self) -> None:
        """The first of the two moments."""
        pynvml.nvmlGpmSampleGet(self._handle, self._before)
        self._began_s = time.perf_counter()

    def end(self) -> dict[str, float] | None:
        """Mean `rx_gbps` (towards the GPU) and `tx_gbps` since `begin`; None when that was too short ago, or when NVML
        has no value."""
        if self._began_s is None:
            raise TraceError("PcieCounters.end() without begin()")
        elapsed_s, self._began_s = time.perf_counter() - self._began_s, None
        if elapsed_s < self.SETTLE_S:
            return None
        pynvml.nvmlGpmSampleGet(self._handle, self._after)
        wanted = {"tx_gbps": pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, "rx_gbps": pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC}
        query = pynvml.c_nvmlGpmMetricsGet_t()
        query.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = len(wanted)
        query.sample1, query.sample2 = self._before, self._after
        for index, metric in enumerate(wanted.values()):
            query.metrics[index].metricId = metric
        pynvml.nvmlGpmMetricsGet(query)
        if any(query.metrics[index].nvmlReturn != pynvml.NVML_SUCCESS for index in range(len(wanted))):
            return None
        return {name: query.metrics[index].value * MIB / 1e9 for index, name in enumerate(wanted)}  # NVML says MiB/s

    def close(self) -> None:
        """Give NVML's samples back."""
        pynvml.nvmlGpmSampleFree(self._before)
        pynvml.nvmlGpmSampleFree(self._after)
        pynvml.nvmlShutdown()


def gpu_index(uuid: str) -> int:
    """The index by which nvidia-smi names the GPU with this UUID."""
    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    finally:
        pynvml.nvmlShutdown()
