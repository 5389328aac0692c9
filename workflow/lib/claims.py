"""Claims: a sentence, a number out of result files, a bound, and the verdict that follows.

A claim's value is a small expression over the samples of result files; nothing in it is a number that was measured
elsewhere. A missed bound is FAIL; a bound that is met while the 95 % interval reaches past it is INCONCLUSIVE, so that
luck is not called a pass. Not taken: Python expressions in the config, which a reader cannot check and a test cannot
bound.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workflow.lib.claimfiles import cases_of, files_of, filled, systems_of
from workflow.lib.results import DRIFTED, NOT_APPLICABLE, ResultError, assert_comparable
from workflow.lib.stats import seed_of
from workflow.plots.load import Certificate, ResultFile, read

PASS, FAIL, INCONCLUSIVE, NOT_RUN, OTHER_HARDWARE = "PASS", "FAIL", "INCONCLUSIVE", "NOT-RUN", "NOT-APPLICABLE"
VERDICTS = (FAIL, INCONCLUSIVE, NOT_RUN, PASS, OTHER_HARDWARE)
ANY_GPU = "."  # of `holds_for`: whatever the name
COMPARATORS = {
    "at_least": operator.ge,
    "at_most": operator.le,
    "below": operator.lt,
    "above": operator.gt,
    "is": operator.eq,
}
STATS = {
    "median": lambda values: np.median(values, axis=-1),
    "mean": lambda values: np.mean(values, axis=-1),
    "p95": lambda values: np.percentile(values, 95, axis=-1),
    "p99": lambda values: np.percentile(values, 99, axis=-1),
    "min": lambda values: np.min(values, axis=-1),
    "max": lambda values: np.max(values, axis=-1),
}
EXTREMES = ("min", "max")
COUNTED = {"sessions", "bytes", "bytes/session"}  # units of what no link's speed changes
RESAMPLES = 1000


class Undecided(Exception):
    """The value cannot be computed; carries the verdict that follows and why."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict
        self.reason = reason


@dataclass
class Case:
    """One instance of a claim: its variables filled in, its value, its verdict."""

    variables: dict[str, Any]
    verdict: str
    reason: str = ""
    value: float | bool | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Judged:
    """A claim with the verdict over all its cases; value and interval are those of the case that decided."""

    claim: Mapping[str, Any]
    files: list[str]
    cases: list[Case] = field(default_factory=list)

    @property
    def deciding(self) -> Case:
        return min(self.cases, key=lambda case: (VERDICTS.index(case.verdict), -self._miss(case)))

    @property
    def verdict(self) -> str:
        return self.deciding.verdict

    def _miss(self, case: Case) -> float:
        """How near the bound, or how far beyond it, a case is: the larger the worse."""
        bound = self.claim.get("bound")
        if not isinstance(case.value, float) or not isinstance(bound, int | float):
            return 0.0
        sign = -1.0 if self.claim["comparator"] in ("at_least", "above") else 1.0
        return sign * (case.value - bound)


class Evaluator:
    """Computes expressions over one experiment's files: one number, or while `generator` is set one per resample."""

    def __init__(self, files: Mapping[str, ResultFile]) -> None:
        self.files = files
        self.generator: np.random.Generator | None = None
        self.selected: dict[str, pd.DataFrame] = {}

    def file(self, system: str) -> ResultFile:
        if system not in self.files:
            raise Undecided(NOT_RUN, f"{system} was not run")
        return self.files[system]

    def measured(self, system: str, *, counted: bool = False) -> ResultFile:
        """A file whose numbers may be used; those that are `counted` also where only the link's rates drifted."""
        result = self.file(system)
        if result.ok or (counted and result.status == "inconclusive" and result.reason.startswith(DRIFTED)):
            return result
        told = f"{system} is {result.status.replace('_', ' ')}: {result.reason}"
        if result.status == "unsupported":
            raise Undecided(OTHER_HARDWARE, told)
        broken = result.status in ("failed", "out_of_memory") and system.startswith("djinn")
        raise Undecided(FAIL if broken else INCONCLUSIVE, told)

    def value(self, node: Any) -> float | np.ndarray:
        if isinstance(node, int | float):
            return float(node)
        if "ratio" in node:
            return self.paired(node) if node.get("paired") else self.quotient(*(self.value(n) for n in node["ratio"]))
        if "difference" in node:
            first, second = (self.value(item) for item in node["difference"])
            return first - second
        if "product" in node:
            return functools.reduce(operator.mul, [self.value(item) for item in node["product"]])
        if "magnitude" in node:
            return abs(self.value(node["magnitude"]))
        if "slope" in node:
            return self.slope(node["slope"], node["by"])
        if "metric" in node:
            return STATS[node.get("stat", "median")](self.draw(self.samples(node)))
        kind = next(name for name in ("limit", "config", "weights") if name in node)
        result = self.measured(node["system"], counted=kind != "limit")
        stated = {"limit": result.limit, "config": result.config.get, "weights": result.data["weights"].get}
        found = stated[kind](node[kind])
        if found is None:
            raise Undecided(NOT_RUN, f"{result.path.name} has no {kind} {node[kind]}")
        return float(found)

    def rows(self, node: Mapping[str, Any]) -> pd.DataFrame:
        key = repr((node["system"], node["metric"], node.get("where")))
        if key not in self.selected:
            found = self.file(node["system"]).select(node["metric"], node.get("where"))
            self.measured(node["system"], counted=len(found) > 0 and set(found["unit"]) <= COUNTED)
            self.selected[key] = found
        return self.selected[key]

    def samples(self, node: Mapping[str, Any]) -> np.ndarray:
        values = self.rows(node)["value"].to_numpy(float)
        if not len(values):
            where = "".join(f", {name} {value}" for name, value in (node.get("where") or {}).items())
            raise Undecided(NOT_RUN, f"{node['system']}.json has no sample of {node['metric']}{where}")
        return values

    def draw(self, values: np.ndarray) -> np.ndarray:
        """The values [n], or as many resamples of them [RESAMPLES, n]; rows of a 2D array stay together."""
        if self.generator is None:
            return values
        return values[self.generator.integers(0, len(values), size=(RESAMPLES, len(values)))]

    @staticmethod
    def quotient(top: float | np.ndarray, bottom: float | np.ndarray) -> float | np.ndarray:
        if not np.all(bottom):
            raise Undecided(INCONCLUSIVE, "a denominator is zero")
        return top / bottom

    def paired(self, node: Mapping[str, Any]) -> float | np.ndarray:
        """The median of the ratios of pairs: rows i of two interleaved methods were taken one after the other."""
        top, bottom = (self.samples(item) for item in node["ratio"])
        if len(top) != len(bottom):
            raise Undecided(INCONCLUSIVE, f"{len(top)} samples and {len(bottom)} are no pairs")
        return np.median(self.draw(self.quotient(top, bottom)), axis=-1)

    def slope(self, node: Mapping[str, Any], by: str) -> float | np.ndarray:
        """The least-squares slope of a metric over one of its dimensions, from every sample."""
        rows = self.rows(node)
        rows = rows[rows[by].notna()] if by in rows.columns else rows.iloc[0:0]
        points = rows.reindex(columns=[by, "value"]).to_numpy(float)
        if not len(points) or np.ptp(points[:, 0]) == 0:
            raise Undecided(NOT_RUN, f"{node['system']}.json has no {node['metric']} at two values of {by}")
        drawn = self.draw(points)
        across, up = drawn[..., 0], drawn[..., 1]
        spread = across - across.mean(axis=-1, keepdims=True)
        return self.quotient((spread * up).sum(axis=-1), (spread * spread).sum(axis=-1))


def load_files(names: Iterable[str], results_dir: Path) -> dict[str, ResultFile]:
    """Those of the result files that are there, by their name relative to the run's folder."""
    return {name: read(results_dir / name) for name in names if (results_dir / name).exists()}


def judge(claim: Mapping[str, Any], loaded: Mapping[str, ResultFile], certificate: Certificate) -> Judged:
    """The verdict on one claim from the files of a run."""
    files = files_of(claim)
    present = {loaded[name].system: loaded[name] for name in files if name in loaded}
    return Judged(claim, files, [judge_case(claim, case, present, certificate) for case in cases_of(claim)])


def judge_case(
    claim: Mapping[str, Any], variables: dict[str, Any], loaded: Mapping[str, ResultFile], certificate: Certificate
) -> Case:
    node = filled(claim["value"], variables)
    used = {system: loaded[system] for system in systems_of(node) if system in loaded}
    try:
        applies(claim.get("holds_for") or {}, used, certificate)
        if "check" in node:
            return judge_check(claim, node, variables, Evaluator(used))
        evaluator = Evaluator(used)
        value = float(evaluator.value(node))
        low, high = interval(node, evaluator, claim["id"] + repr(variables))
    except Undecided as undecided:
        return Case(variables, undecided.verdict, undecided.reason)
    compare = COMPARATORS[claim["comparator"]]
    bound = claim["bound"]
    if not compare(value, bound):
        return Case(variables, FAIL, "", value, low, high)
    if low is not None and not (compare(low, bound) and compare(high, bound)):
        return Case(variables, INCONCLUSIVE, "the 95 % interval reaches past the bound", value, low, high)
    return Case(variables, PASS, "", value, low, high)


def applies(holds_for: Mapping[str, str], used: Mapping[str, ResultFile], certificate: Certificate) -> None:
    """Refuse what the claim does not speak of: other hardware, another model, code or machines that differ."""
    if not used:
        raise Undecided(NOT_RUN, "no result file")
    first = next(iter(used.values()))
    if "gpu" in holds_for and not re.search(holds_for["gpu"], first.gpu or ""):
        wanted = "a GPU" if holds_for["gpu"] == ANY_GPU else holds_for["gpu"]
        raise Undecided(OTHER_HARDWARE, f"speaks of {wanted}, this is {first.gpu or 'an emulated device'}")
    if "model" in holds_for and not re.search(holds_for["model"], str(first.config.get("model", ""))):
        raise Undecided(OTHER_HARDWARE, f"speaks of {holds_for['model']}, this is {first.config.get('model')}")
    try:
        assert_comparable(result.data for result in used.values())
    except ResultError as error:
        raise Undecided(INCONCLUSIVE, str(error)) from error
    if "gpu" in holds_for and not certificate.covers(first):
        raise Undecided(INCONCLUSIVE, f"this machine's certificate: {certificate.verdict}, of {certificate.machine_id}")


def judge_check(claim: Mapping[str, Any], node: Mapping[str, Any], variables: dict[str, Any], files: Evaluator) -> Case:
    """A recorded check. It counts whatever the result's status: a broken gate is what made it `failed`."""
    result = files.file(node["system"])
    found = {name: check for name, check in result.checks.items() if fnmatchcase(name, node["check"])}
    if not found:
        files.measured(node["system"])
        raise Undecided(NOT_RUN, f"{result.path.name} has no check {node['check']}")
    decided = {name: check for name, check in found.items() if check["passed"] != NOT_APPLICABLE}
    if not decided:
        raise Undecided(OTHER_HARDWARE, f"{node['check']} does not apply here")
    wanted = claim["bound"]
    wrong = [name for name, check in decided.items() if bool(check["passed"]) is not wanted]
    if wrong:
        return Case(variables, FAIL, f"{node['system']}: {', '.join(wrong)} is {not wanted}", not wanted)
    return Case(variables, PASS, "", wanted)


def interval(node: Any, evaluator: Evaluator, label: str) -> tuple[float | None, float | None]:
    """The 95 % bootstrap interval of an expression; none where it rests on extremes, which say all there is."""
    if has_extreme(node):
        return None, None
    evaluator.generator = np.random.default_rng(seed_of(label))
    values = np.atleast_1d(evaluator.value(node))
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def has_extreme(node: Any) -> bool:
    if isinstance(node, Mapping):
        return node.get("stat") in EXTREMES or any(has_extreme(value) for value in node.values())
    return isinstance(node, list) and any(has_extreme(item) for item in node)
