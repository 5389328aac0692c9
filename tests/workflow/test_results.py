"""Result files: what goes in comes out, by the schema; warm-ups count for nothing; no half file is ever seen."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from workflow.lib import stats
from workflow.lib.results import (
    NOT_APPLICABLE,
    NotWritten,
    Result,
    ResultError,
    assert_comparable,
    read_result,
    summary_of,
    summary_row,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]
KIND = {
    **dict.fromkeys(("gpu", "driver", "pcie_generation", "pcie_width")),
    "cpu": "made up",
    "cores": 2,
    "memory_bytes": 1,
    "numa_nodes": 1,
    "system": "Linux",
}
STATE = {"time_utc": "2026-01-01T00:00:00+00:00", "load_1min": 0.0, "host_free_bytes": 1, "foreign_processes": []}


def made_up(system: str = "djinn", digest: str = "0" * 32, machine_id: str = "cpu/1") -> Result:
    result = Result("streaming", system, "cpu", {"model": {"name": "tiny"}})
    result.machine = {"kind": KIND, "id": machine_id, "state": {"before": STATE, "after": STATE}}
    result.source = {"commit": None, "dirty": None, "digest": digest}
    result.sample("pass_s", 9.0, "s", warmup=True, layer=1)
    for value in (1.0, 2.0, 3.0):
        result.sample("pass_s", value, "s", layer=1)
    result.sample("pass_s", 5.0, "s", layer=2)
    return result


def test_round_trip(tmp_path: Path) -> None:
    result = made_up()
    result.check("tokens_equal", True)
    result.check("under_cap", NOT_APPLICABLE)
    result.check("link_share", 0.98, passed=True)
    result.write(tmp_path / "deep" / "djinn.json")
    document = read_result(tmp_path / "deep" / "djinn.json")
    assert document == json.loads(json.dumps(result.document()))
    assert document["status"] == "ok"
    assert document["checks"]["under_cap"] == {"value": "not_applicable", "passed": "not_applicable"}
    assert len(document["samples"]) == 5
    assert summary_row(document, "pass_s", layer=1)["median"] == 2.0
    assert summary_row(document, "pass_s", layer=1)["n"] == 3
    assert summary_row(document, "pass_s", layer=2)["p99"] == 5.0
    with pytest.raises(ResultError, match="2 summary rows"):
        summary_row(document, "pass_s")


def test_a_broken_gate_fails_and_a_report_does_not() -> None:
    result = made_up()
    result.check("gpu_shared", False, gate=False)
    assert result.status == "ok"
    result.check("logits_equal", False)
    assert (result.status, result.reason) == ("failed", "gate logits_equal is broken: False")


def test_the_worst_status_stays() -> None:
    result = made_up()
    result.fail("out_of_memory", "first")
    result.fail("inconclusive", "second")
    assert (result.status, result.reason) == ("out_of_memory", "first; second")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_finite_values_are_samples(value: float) -> None:
    with pytest.raises(ResultError, match="finite"):
        made_up().sample("pass_s", value, "s")


def test_a_number_says_whether_it_passed() -> None:
    with pytest.raises(ResultError, match="must say whether it passed"):
        made_up().check("link_share", 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", {"commit": None, "dirty": None, "digest": "short"}),
        ("machine", {}),
        ("experiment", ""),
        ("limits", 3),
    ],
)
def test_the_schema_refuses(field: str, value: object, tmp_path: Path) -> None:
    result = made_up()
    setattr(result, field, value)
    with pytest.raises(ResultError, match=field):
        result.write(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_an_ok_result_without_samples_is_refused(tmp_path: Path) -> None:
    result = made_up()
    result.samples.clear()
    with pytest.raises(ResultError, match="samples"):
        result.write(tmp_path / "x.json")


def test_only_one_machine_and_one_code_are_compared() -> None:
    assert_comparable([made_up("a").document(), made_up("b").document()])
    with pytest.raises(ResultError, match=r"a and b differ in source\.digest"):
        assert_comparable([made_up("a").document(), made_up("b", digest="1" * 32).document()])
    with pytest.raises(ResultError, match=r"a and b differ in machine\.id"):
        assert_comparable([made_up("a").document(), made_up("b", machine_id="cpu/2").document()])


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    code = (
        "import sys; from workflow.lib.results import write_text\nwhile True: write_text(sys.argv[1], 'new' * 3000000)"
    )
    for delay_s in (0.0, 0.005, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", code, str(target)], cwd=ROOT)
        while not list(tmp_path.glob(".*.part")) and writer.poll() is None:
            time.sleep(0.001)
        time.sleep(delay_s)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        assert target.read_text() in ("old", "new" * 3000000)
    write_text(target, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert target.read_text() == "after"


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "quota"), (errno.EIO, "name a place that can be")],
)
def test_a_disk_that_takes_no_more_is_said_and_leaves_no_half_file(
    tmp_path: Path, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "x.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten) as refusal:
        write_text(path, "é" * 1000)
    told = str(refusal.value)
    assert told.startswith(f"{path} was not written: ") and "2,000 bytes were wanted" in told and said in told
    assert (f"make room in {tmp_path} and run it again" in told) == (number != errno.EIO)
    assert os.listdir(tmp_path) == ["x.json"] and path.read_text() == "old"


def test_a_place_that_takes_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=r"file/x\.json was not written: Not a directory|File exists"):
        write_text(tmp_path / "file" / "x.json", "text")


def test_percentiles_and_median_of_known_values() -> None:
    row = stats.summarise([float(value) for value in range(1, 102)], label="x")
    assert (row["median"], row["p05"], row["p50"], row["p95"], row["p99"], row["n"]) == (51, 6, 51, 96, 100, 101)


def test_the_bootstrap_covers_the_median_and_repeats_itself() -> None:
    values = np.random.default_rng(0).normal(10.0, 1.0, 400).tolist()
    low, high = stats.bootstrap_ci95(values, seed=1)
    assert (low, high) == stats.bootstrap_ci95(values, seed=1)
    # the median of n normal values has a standard error of 1.2533 / sqrt(n): 0.0627 here
    assert low < 10.0 < high
    assert 0.15 < high - low < 0.35
    assert stats.bootstrap_ci95([4.0], seed=0) == (4.0, 4.0)


def test_rows_that_differ_in_a_dimension_are_summarised_apart() -> None:
    rows = [{"metric": "m", "unit": "s", "value": 1.0, "warmup": False, "layer": layer} for layer in (1, 2, 2)]
    assert [(row["layer"], row["n"]) for row in summary_of(rows)] == [(1, 1), (2, 2)]
