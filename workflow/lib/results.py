"""Result files: one experiment, one system, one file, checked by a schema and moved into place in one step.

A result keeps every sample, warm-ups included and flagged; the summary is computed from the others when the file
is written. Figures and claims read these files and nothing else, so this module imports no torch.

Not taken: a results database. Files can be read, compared and published one by one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema

from workflow.lib.stats import summarise

SCHEMA = "djinn-result/1"
SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
NOT_APPLICABLE = "not_applicable"
DRIFTED = "the link drifted around the measurement"  # so begins the reason of a result whose only fault it is
# from best to worst: an outcome is never replaced by a better one
STATUSES = ("ok", "inconclusive", "unsupported", "out_of_memory", "failed")
SAMPLE_FIELDS = frozenset({"metric", "value", "unit", "warmup"})
# dimensions that number the samples of one quantity: kept in the samples, not a group of their own in the summary
INDEX_DIMENSIONS = frozenset({"repeat", "session", "time_s"})


class ResultError(Exception):
    """A result that cannot be written, read or compared; the message names the file and the field."""


class NotWritten(ResultError):
    """The file system did not take a file; what was there before is as it was."""


class Result:
    """What one system did in one experiment, collected while it runs.

    Attributes:
        status, reason: `ok` until `fail` or a broken gate says otherwise.
        config: effective settings, with what the code found out (threads, attention) added as it goes.
        machine, source, libraries, limits: filled by the harness.
        weights: what the model's weights were: kind (`checkpoint` or `seeded`), digest, bytes.
        extra: further top-level facts of an experiment, under `details` in the file.
    """

    def __init__(self, experiment: str, system: str, run: str, config: dict[str, Any]) -> None:
        self.experiment = experiment
        self.system = system
        self.run = run
        self.config = config
        self.status = "ok"
        self.reason = ""
        self.machine: dict[str, Any] = {"kind": {}, "id": "", "state": {}}
        self.source: dict[str, Any] = {}
        self.libraries: dict[str, str] = {}
        self.weights: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.checks: dict[str, dict[str, Any]] = {}

    def sample(self, metric: str, value: float, unit: str, *, warmup: bool = False, **dims: Any) -> None:
        """Add one measured value; `dims` say what it was measured on (layer, state, size_bytes, session, …)."""
        clash = SAMPLE_FIELDS & dims.keys()
        if clash:
            raise ResultError(f"{self.experiment}/{self.system}: dimension {sorted(clash)[0]!r} is a field's name")
        if not math.isfinite(value):
            raise ResultError(f"{self.experiment}/{self.system}: {metric} is {value}; only finite values are samples")
        self.samples.append({**dims, "metric": metric, "value": value, "unit": unit, "warmup": warmup})

    def check(self, name: str, value: Any, passed: bool | None = None, *, gate: bool = True) -> None:
        """Record a check. A gate that is not passed makes the result `failed`, whatever its speed.

        Args:
            value: True, False, a number, or `NOT_APPLICABLE`.
            passed: for a number, whether it is good enough; of a boolean the default is the boolean itself.
            gate: False for what is only reported.
        """
        if value == NOT_APPLICABLE:
            verdict: bool | str = NOT_APPLICABLE
        elif passed is None:
            if not isinstance(value, bool):
                raise ResultError(f"check {name!r} of value {value!r} must say whether it passed")
            verdict = value
        else:
            verdict = bool(passed)
        self.checks[name] = {"value": value, "passed": verdict}
        if gate and verdict is False:
            self.fail("failed", f"gate {name} is broken: {value}")

    def fail(self, status: str, reason: str) -> None:
        """Record why this is not a plain `ok`; the worst status wins, reasons are kept in order."""
        if status not in STATUSES or status == "ok":
            raise ResultError(f"unknown status {status!r}; allowed: {', '.join(STATUSES[1:])}")
        if STATUSES.index(status) > STATUSES.index(self.status):
            self.status = status
        self.reason = f"{self.reason}; {reason}" if self.reason else reason

    def document(self) -> dict[str, Any]:
        """The file's content, summary included."""
        return {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "system": self.system,
            "run": self.run,
            "status": self.status,
            "reason": self.reason,
            "machine": self.machine,
            "source": self.source,
            "libraries": self.libraries,
            "config": self.config,
            "weights": self.weights,
            "limits": self.limits,
            "details": self.extra,
            "samples": self.samples,
            "summary": summary_of(self.samples),
            "checks": self.checks,
        }

    def write(self, path: str | Path) -> None:
        """Check the document and move it into place in one step."""
        document = self.document()
        validate(document, "result", str(path))
        write_json(path, document)


def summary_of(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each metric and set of dimensions, warm-ups left out, in order of first appearance."""
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for sample in samples:
        if sample["warmup"]:
            continue
        key = {name: value for name, value in sample.items() if name not in INDEX_DIMENSIONS | {"value", "warmup"}}
        label = json.dumps(key, sort_keys=True)
        groups.setdefault(label, (key, []))[1].append(sample["value"])
    return [key | summarise(values, label=label) for label, (key, values) in groups.items()]


def summary_row(document: dict[str, Any], metric: str, **dims: Any) -> dict[str, Any]:
    """The one summary row of `metric` whose dimensions include `dims`.

    Raises:
        ResultError: there is none, or more than one.
    """
    rows = [
        row
        for row in document["summary"]
        if row["metric"] == metric and all(row.get(name) == value for name, value in dims.items())
    ]
    if len(rows) != 1:
        where = f"{document['experiment']}/{document['system']} ({document['status']})"
        raise ResultError(f"{where}: {len(rows)} summary rows of {metric} with {dims}, wanted one")
    return rows[0]


@lru_cache
def schema(name: str) -> dict[str, Any]:
    """The JSON schema `workflow/schemas/NAME.schema.json`."""
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text())


def validate(document: dict[str, Any], schema_name: str, where: str) -> None:
    """Refuse a document that its schema does not allow, with the first field that is wrong."""
    validator = jsonschema.Draft202012Validator(schema(schema_name))
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is not None:
        raise ResultError(f"{where}: {error.json_path}: {error.message}")


def read_result(path: str | Path, schema_name: str = "result") -> dict[str, Any]:
    """The document in `path`, checked by its schema.

    Raises:
        ResultError: no JSON, or not this schema.
    """
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    validate(document, schema_name, str(path))
    return document


def assert_comparable(documents: Iterable[dict[str, Any]]) -> None:
    """Refuse to compare systems that did not run on one machine with one code.

    Raises:
        ResultError: two of them differ in `machine.id` or `source.digest`; the message says which and how.
    """
    first: dict[str, Any] | None = None
    for document in documents:
        if first is None:
            first = document
            continue
        for section, field in (("machine", "id"), ("source", "digest")):
            if first[section][field] != document[section][field]:
                raise ResultError(
                    f"{document['experiment']}: {first['system']} and {document['system']} differ in {section}.{field} "
                    f"({first[section][field]} and {document[section][field]}): run both again"
                )


def write_json(path: str | Path, document: Any) -> None:
    """Write beside `path` and move it into place, so that a reader finds the whole file or none."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """As `write_json`, for text."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """As `write_json`, for bytes.

    Raises:
        NotWritten: with the path, the bytes that were wanted and what to do.
    """
    target = Path(path)
    with writing(target, f"; {len(data):,} bytes were wanted"):
        _replace(target, data)


@contextmanager
def writing(target: Path, wanted: str = "") -> Iterator[None]:
    """Around what writes `target`: the file system's refusal as NotWritten, with what was `wanted` and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = f"make room in {target.parent} and run it again" if full else "name a place that can be written"
        raise NotWritten(f"{target} was not written: {error.strerror or error}{wanted}; {todo}") from error


def _replace(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.part"):  # of a writer that was killed in the middle
        leftover.unlink(missing_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
