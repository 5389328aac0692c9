"""Result files read for figures, tables and claims, and refused where they may not be compared.

Invariant: nothing here invents a number. A value that a file does not hold is `None` or an error that names the file,
and files that were measured on different machines, or by different code, are never put beside each other.
Not taken: reading the files' own summaries, since a claim may group the samples otherwise; both use one `stats`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow.lib.results import ResultError, assert_comparable, read_result
from workflow.lib.stats import summarise

# the name under which a file's own rows stand in the dimension `method`, where it is not the system's
OWN_METHOD = {"djinn_uncapped": "djinn"}
NOT_RUN = "not_run.json"  # of a published set: what it lacks, and why
CERTIFICATE = "certificate.json"
IDENTITY = ("metric", "value", "unit", "warmup")


@dataclass(frozen=True, eq=False)
class ResultFile:
    """One result file as it was written: the outcome of one system in one experiment."""

    path: Path
    data: Mapping[str, Any]

    @property
    def system(self) -> str:
        return self.data["system"]

    @property
    def status(self) -> str:
        return self.data["status"]

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> str:
        return self.data.get("reason") or ""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.data.get("config") or {}

    @property
    def checks(self) -> Mapping[str, Mapping[str, Any]]:
        return self.data.get("checks") or {}

    @property
    def machine_kind(self) -> Mapping[str, Any]:
        return self.data["machine"]["kind"]

    @property
    def gpu(self) -> str | None:
        """The GPU's name, or None where the device is emulated."""
        return gpu_name(self.machine_kind)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The measured rows, warm-ups left out."""
        rows = pd.DataFrame([row for row in self.data["samples"] if not row.get("warmup", False)])
        return rows if len(rows) else pd.DataFrame(columns=list(IDENTITY))

    def select(self, metric: str, where: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The samples of a metric whose dimensions are those of `where`, in the order they were measured.

        Rows of an interleaved partner carry its name in the dimension `method`; without one in `where` only the
        file's own rows are taken. A dimension that is None in `where` must be absent.
        """
        wanted = dict(where or {})
        rows = self.samples
        rows = rows[rows["metric"] == metric]
        if "method" in rows.columns and "method" not in wanted:
            rows = rows[rows["method"].isna() | (rows["method"] == OWN_METHOD.get(self.system, self.system))]
        for name, value in wanted.items():
            if value is None:
                rows = rows[rows[name].isna()] if name in rows.columns else rows
            elif name not in rows.columns:
                return rows.iloc[0:0]
            else:
                rows = rows[rows[name] == value]
        return rows

    def values(self, metric: str, where: Mapping[str, Any] | None = None) -> np.ndarray:
        return self.select(metric, where)["value"].to_numpy(dtype=float)

    def median(self, metric: str, where: Mapping[str, Any] | None = None) -> float | None:
        values = self.values(metric, where)
        return float(np.median(values)) if len(values) else None

    def summary(self, metric: str, where: Mapping[str, Any] | None = None) -> dict[str, float | int] | None:
        """median, percentiles, ci95_low, ci95_high and n over the samples selected, or None where there are none."""
        values = self.values(metric, where)
        if not len(values):
            return None
        return summarise(values.tolist(), label=json.dumps([metric, dict(where or {})], sort_keys=True))

    def limit(self, name: str) -> float | None:
        """A certified rate as it was measured around this result (before and after)."""
        return bracketed_limit(self.data.get("limits") or {}, name)


def bracketed_limit(limits: Mapping[str, Any], name: str) -> float | None:
    """The rate `name` of a result: the one it states, or the mean of what was measured before and after it."""
    if limits.get(name) is not None:
        return float(limits[name])
    around = [limits[side][name] for side in ("before", "after") if (limits.get(side) or {}).get(name) is not None]
    return float(np.mean(around)) if around else None


def gpu_name(kind: Mapping[str, Any]) -> str | None:
    return kind.get("gpu")


def read(path: str | Path) -> ResultFile:
    """One result file, checked by its schema.

    Raises:
        ResultError: it is missing (the rule to run is named), is not JSON, or is not a result.
    """
    path = Path(path)
    if not path.exists():
        raise ResultError(f"{path} is missing: run `snakemake {path}`")
    return ResultFile(path, read_result(path))


def read_comparable(paths: Iterable[str | Path]) -> list[ResultFile]:
    """The files of one experiment, in the order given.

    Raises:
        ResultError: they come from different machines or from different code, and are not compared.
    """
    results = [read(path) for path in paths]
    assert_comparable(result.data for result in results)
    return results


def read_folder(folder: str | Path, systems: Sequence[str]) -> list[ResultFile]:
    """`{folder}/{system}.json` for those systems, in that order.

    A published set may lack a system, if its `not_run.json` says so and why; it then reads as `not_run`.

    Raises:
        ResultError: a file is missing and nothing says why, or the files may not be compared.
    """
    folder = Path(folder)
    reasons = not_run_reasons(folder.parent)
    absent = {s: reasons[f"{folder.name}/{s}"] for s in systems if f"{folder.name}/{s}" in reasons}
    results = read_comparable(folder / f"{system}.json" for system in systems if system not in absent)
    found = {result.system: result for result in results}
    return [found.get(s) or not_run(folder / f"{s}.json", absent[s], results[0]) for s in systems]


def not_run_reasons(folder: Path) -> dict[str, str]:
    """Why a published set lacks a system, by `experiment/system`; empty for a run of the pipeline."""
    path = folder / NOT_RUN
    return json.loads(path.read_text()) if path.exists() else {}


def not_run(path: Path, reason: str, beside: ResultFile) -> ResultFile:
    """The place of a system that was not run on the machine, and with the code, of the others."""
    nothing = {"config": {}, "limits": {}, "weights": {}, "samples": [], "summary": [], "checks": {}}
    told = {"system": path.stem, "status": "not_run", "reason": reason}
    return ResultFile(path, {**beside.data, **nothing, **told})


def shown_from(results: Sequence[ResultFile], system: str = "djinn") -> dict[str, ResultFile]:
    """The file from which each method's rows are shown.

    It is `system`'s file for the methods that ran interleaved with it, as the claims compare them; a method that runs
    without others between is a little faster. The rest are shown from their own files.
    """
    together = next(result for result in results if result.system == system)
    beside = set(together.samples["method"].dropna()) if together.ok and "method" in together.samples else set()
    return {result.system: together if result.system in beside else result for result in results}


@dataclass(frozen=True)
class Certificate:
    """What certify said, and of which machine: `verdict` is pass, warn, fail or missing."""

    path: Path
    verdict: str
    machine_id: str | None = None

    def covers(self, result: ResultFile) -> bool:
        """Whether the machine of this result is certified. A certificate of another machine certifies nothing."""
        return self.verdict in ("pass", "warn") and self.machine_id == result.data["machine"]["id"]


def read_certificate(path: str | Path) -> Certificate:
    """The machine's certificate; one that is not there certifies nothing, and says so."""
    path = Path(path)
    if not path.exists():
        return Certificate(path, "missing")
    data = read_result(path, "certificate")
    return Certificate(path, data["verdict"], data["machine"]["id"])


def certificate_of(results_dir: Path, experiment: str) -> Certificate:
    """The certificate under which an experiment was measured.

    A published set has one beside each experiment's results, since they may come from different cards; a run of the
    pipeline has one for all.
    """
    own = results_dir / experiment / CERTIFICATE
    return read_certificate(own if own.exists() else results_dir / CERTIFICATE)


def digest(paths: Iterable[str | Path]) -> str:
    """A short digest over the bytes and names of the files that a figure was drawn from."""
    total = hashlib.sha256()
    for path in sorted(Path(item) for item in paths):
        total.update(path.name.encode())
        total.update(path.read_bytes() if path.exists() else b"missing")
    return total.hexdigest()[:12]


def in_words(status: str) -> str:
    return status.replace("_", " ")
