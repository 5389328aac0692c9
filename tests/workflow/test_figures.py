"""Figures: from result files alone, the same bytes each time, nothing dropped and nothing made up."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.synthetic import LAYERS, Maker
from workflow.lib.claimfiles import cases_of, filled
from workflow.lib.results import ResultError
from workflow.lib.systems import PRESSURE_SYSTEMS, RESUME_METHODS, STREAMING_SYSTEMS, SYSTEMS
from workflow.plots import fig5, fig6, fig7, style, table1
from workflow.plots.load import certificate_of, read
from workflow.scripts import memory_breakdown, report
from workflow.scripts.claims import load_claims

REPOSITORY = Path(__file__).parents[2]
PLOTS = sorted((REPOSITORY / "workflow/plots").glob("*.py"))
SERIES_AT = 3


@pytest.fixture
def run(tmp_path: Path) -> Maker:
    maker = Maker(tmp_path / "h200")
    maker.certificate()
    return maker


def number_series(tree: ast.AST) -> list[int]:
    """Lines with a literal list, tuple, set or dict of three or more numbers."""
    found = []
    for node in ast.walk(tree):
        parts = getattr(node, "elts", None) if isinstance(node, ast.List | ast.Tuple | ast.Set) else None
        parts = node.values if isinstance(node, ast.Dict) else parts
        numbers = [part for part in parts or [] if is_number(part)]
        if len(numbers) >= SERIES_AT:
            found.append(node.lineno)
    return found


def is_number(node: ast.AST) -> bool:
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


@pytest.mark.parametrize("path", PLOTS, ids=lambda path: path.name)
def test_plotting_code_holds_no_number_series(path: Path):
    lines = number_series(ast.parse(path.read_text()))
    allowed = {"rcParams", "width_ratios", "height_ratios"}
    text = path.read_text().splitlines()
    assert [line for line in lines if not any(word in text[line - 1] + text[line - 2] for word in allowed)] == []


@pytest.mark.parametrize("code", ["y = [1.0, 2, 3]", "y = (1, -2, 3)", "y = {'a': 1, 'b': 2, 'c': 3}"])
def test_a_number_series_would_be_seen(code: str):
    assert number_series(ast.parse(code)) == [1]


def test_drawing_imports_no_torch():
    modules = [f"workflow.plots.{path.stem}" for path in PLOTS] + ["workflow.scripts.claims", "workflow.scripts.report"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("rules", sorted((REPOSITORY / "workflow/rules").glob("*.smk")), ids=lambda path: path.name)
def test_rules_keep_no_list_of_systems(rules: Path):
    """The systems are in workflow/lib/systems.py alone; a rule names those only that it treats apart."""
    known = {system for systems in SYSTEMS.values() for system in systems}
    named = {name for text in re.findall(r'"([\w|]+)"', rules.read_text()) for name in text.split("|")}
    assert known & named <= {"djinn"}


def drawn(module, maker: Maker, tmp_path: Path, name: str = "a") -> tuple[bytes, pd.DataFrame]:
    out, csv = tmp_path / f"{name}.pdf", tmp_path / f"{name}.csv"
    module.draw(maker.folder, out, csv)
    return out.read_bytes(), pd.read_csv(csv)


def test_fig5_is_the_same_file_twice_with_embedded_truetype_fonts(run: Maker, tmp_path: Path):
    run.streaming()
    first, _ = drawn(fig5, run, tmp_path, "a")
    command = [
        sys.executable,
        "-m",
        "workflow.plots.fig5",
        "--results",
        str(run.folder),
        "--out",
        str(tmp_path / "b.pdf"),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, env={"PYTHONHASHSEED": "77", "PATH": "", "HOME": str(tmp_path)})
    assert (tmp_path / "b.pdf").read_bytes() == first
    assert b"/CreationDate" not in first
    assert b"/FontFile2" in first
    assert b"/Type3" not in first


def test_fig5_csv_holds_what_the_files_hold(run: Maker, tmp_path: Path):
    run.streaming()
    _, table = drawn(fig5, run, tmp_path)
    row = table[(table["system"] == "djinn_chunk64mib") & (table["metric"] == "pass_s")].iloc[0]
    values = sorted(
        fig5.read_folder(run.folder / "streaming", ["djinn_chunk64mib"])[0].values("pass_s"),
    )
    assert row["median"] == pytest.approx(values[len(values) // 2])
    assert row["n"] == len(values)
    assert set(table["system"]) == set(STREAMING_SYSTEMS)


def test_a_system_without_numbers_is_shown_as_what_it_is(run: Maker, tmp_path: Path):
    run.streaming(failing={"deepspeed_cpu": ("out_of_memory", "needs 9 bytes, has 8")})
    _, table = drawn(fig5, run, tmp_path)
    rows = table[table["system"] == "deepspeed_cpu"]
    assert set(rows["status"]) == {"out_of_memory"}
    assert rows["median"].isna().all()


@pytest.mark.parametrize(("field", "value"), [("machine_id", "machine-2"), ("source_digest", "1" * 32)])
def test_results_of_two_machines_or_two_codes_are_refused(run: Maker, tmp_path: Path, field: str, value: str):
    run.streaming()
    setattr(run, field, value)
    result = run.result("streaming", "deepspeed_cpu")
    result.sample("pass_s", 1.0, "s")
    run.write(result)
    with pytest.raises(ResultError, match=r"machine\.id|source\.digest"):
        drawn(fig5, run, tmp_path)


def test_a_missing_file_is_named_with_the_rule_to_run(run: Maker, tmp_path: Path):
    run.streaming()
    (run.folder / "streaming/deepspeed_nvme.json").unlink()
    with pytest.raises(ResultError, match=r"deepspeed_nvme\.json is missing: run `snakemake"):
        drawn(fig5, run, tmp_path)


@pytest.mark.parametrize(
    ("gpu", "verdict", "marks"),
    [("NVIDIA H200", "pass", set()), ("NVIDIA H200", "fail", {"uncertified"}), (None, "pass", {"emulated device"})],
)
def test_watermarks_say_what_a_figure_is_not(
    tmp_path: Path, monkeypatch, gpu: str | None, verdict: str, marks: set[str]
):
    maker = Maker(tmp_path / "run", gpu=gpu)
    maker.certificate(verdict)
    maker.streaming()
    written: list[str] = []
    real = fig5.plt.Figure.text
    monkeypatch.setattr(
        fig5.plt.Figure, "text", lambda self, x, y, s, **k: (written.append(s), real(self, x, y, s, **k))[1]
    )
    drawn(fig5, maker, tmp_path)
    seen = {words for line in written for words in line.split(" · ")} & {"uncertified", "emulated device"}
    assert seen == marks
    assert any("input " in words for words in written)


def test_no_certificate_and_another_machines_certify_nothing(run: Maker):
    run.streaming()
    result = fig5.read_folder(run.folder / "streaming", ["djinn_resident"])[0]
    path = run.folder / "certificate.json"
    assert certificate_of(run.folder, "streaming").covers(result)
    run.machine_id = "machine-2"
    run.certificate()
    assert not certificate_of(run.folder, "streaming").covers(result)
    path.unlink()
    assert not certificate_of(run.folder, "streaming").covers(result)


def test_the_report_keeps_the_groups_apart_and_names_what_failed(run: Maker):
    run.streaming(failing={"deepspeed_nvme": ("unsupported", "libaio is not installed")})
    text, rows = report.report(run.folder, REPOSITORY / "config/claims.yaml")
    nothing, filled = text.split("## Cap filled")
    assert "Accelerate device_map" not in nothing
    assert "DeepSpeed" not in filled.split("## Targets")[0]
    assert "libaio is not installed" in nothing
    assert "| PASS |" in filled
    assert len(rows) == len(STREAMING_SYSTEMS) * len(report.COLUMNS)


def test_fig6_shows_every_system_and_where_eager_stopped(run: Maker, tmp_path: Path):
    run.pressure()
    _, table = drawn(fig6, run, tmp_path)
    assert set(table["system"]) == set(PRESSURE_SYSTEMS)
    eager = table[table["system"] == "eager"]
    assert set(eager["status"]) == {"out_of_memory"}
    assert 0 < eager["sessions"].max() < 50
    assert set(table["source"].dropna()) == {"nvml"}
    djinn = table[(table["system"] == "djinn") & table["device_bytes"].notna()]
    assert djinn["sessions"].max() == 50
    assert djinn["device_bytes"].max() <= 80_000_000_000
    assert fig6.not_drawn(table, emulated=False) == "not drawn (no memory samples): manual offload, pinned"
    missing = table[table["method"] == "manual_offload_pinned"]
    assert missing["device_bytes"].isna().all()


def test_fig6_reads_the_ledger_where_there_is_no_gpu(tmp_path: Path):
    maker = Maker(tmp_path / "cpu", gpu=None, run="cpu")
    maker.certificate()
    maker.pressure(sessions=8, cap=30_000_000_000)
    _, table = drawn(fig6, maker, tmp_path)
    assert set(table["source"].dropna()) == {"ledger"}


def lone(run: Maker, method: str, value: float) -> None:
    """A method's own file with other numbers than its rows in Djinn's."""
    result = run.result("resume", method)
    for metric in ("ready_ms", "next_logits_ms"):
        result.sample(metric, value, "ms", layer=LAYERS[-1], state="S", method=method)
    run.write(result)


def test_fig7_and_table1_show_the_rows_that_the_claims_judge(run: Maker, tmp_path: Path):
    run.resume()
    lone(run, "eager", 123.0)
    lone(run, "recompute", 456.0)
    _, table = drawn(fig7, run, tmp_path)
    files = dict(table[["method", "file"]].drop_duplicates().itertuples(index=False))
    apart = ("recompute", "manual_offload_pageable")
    assert files == {m: f"{m}.json" if m in apart else "djinn.json" for m in RESUME_METHODS}
    assert set(table[(table["method"] == "recompute") & table["median"].notna()]["median"]) == {456.0}
    djinn = read(run.folder / "resume/djinn.json")
    drawn_rows = table.set_index(["method", "metric", "state", "layer"])["median"]
    compared = [claim for claim in load_claims(REPOSITORY / "config/claims.yaml") if claim["value"].get("paired")]
    nodes = [
        filled(node, case)
        for claim in compared
        if claim["experiment"] == "resume"
        for case in cases_of(claim)
        for node in claim["value"]["ratio"]
    ]
    assert len(nodes) > 20
    for node in nodes:
        where = node["where"]
        shown = drawn_rows[(where["method"], node["metric"], where["state"], where["layer"])]
        assert shown == pytest.approx(djinn.median(node["metric"], where), rel=1e-6)
    table1.draw(run.folder, tmp_path / "table1.md")
    rows = pd.read_csv(tmp_path / "table1.csv").set_index("method")
    assert rows["next_logits_ms"]["recompute"].startswith("456 ")
    assert not rows["next_logits_ms"]["eager"].startswith("123 ")
    assert "in runs of their own: recompute; manual offload, pageable" in (tmp_path / "table1.md").read_text()


def test_a_figure_without_djinns_rows_shows_each_methods_own(run: Maker, tmp_path: Path):
    run.resume()
    lone(run, "eager", 123.0)
    result = run.result("resume", "djinn")
    result.fail("failed", "as the test wants")
    run.write(result)
    _, table = drawn(fig7, run, tmp_path)
    assert set(table[table["method"] == "eager"]["median"]) == {123.0}
    assert table[table["method"] == "djinn"]["status"].tolist() == ["failed"]


def test_fig7_keeps_a_method_that_failed(run: Maker, tmp_path: Path):
    run.resume()
    result = run.result("resume", "recompute")
    result.fail("failed", "as the test wants")
    run.write(result)
    _, table = drawn(fig7, run, tmp_path)
    assert list(table[table["method"] == "recompute"]["status"]) == ["failed"]


METHOD_SOURCE = """
class Base:
    name = "base"

    def pause(self):
        # user-code begin
        a = 1

        # a remark
        b = 2
        # user-code end

    def resume(self):
        # user-code begin
        c = 3
        # user-code end
        return c


class Better(Base):
    name = "better"

    def resume(self):
        d = 0
        # user-code begin
        e = 1
        f = 2
        g = 3
        # user-code end
"""


def test_user_code_is_counted_in_the_source_with_what_is_inherited(tmp_path: Path):
    (tmp_path / "methods.py").write_text(METHOD_SOURCE)
    assert table1.user_lines(tmp_path) == {"base": 3, "better": 5}
    (tmp_path / "methods.py").write_text(
        METHOD_SOURCE.replace("        # user-code end\n        return", "        return")
    )
    with pytest.raises(ResultError, match="without its partner"):
        table1.user_lines(tmp_path)


def test_table1_counts_the_real_methods():
    counted = table1.user_lines(table1.METHODS_FOLDER)
    assert set(RESUME_METHODS) <= set(counted)
    assert all(counted[method] > 0 for method in RESUME_METHODS)


def test_table1_says_not_run_where_there_is_no_pressure_run(run: Maker, tmp_path: Path):
    run.resume()
    out = tmp_path / "table1.md"
    table1.draw(run.folder, out)
    rows = pd.read_csv(out.with_suffix(".csv"))
    assert list(rows["sessions"]) == ["not run"] * len(RESUME_METHODS)
    run.pressure()
    table1.draw(run.folder, out)
    sessions = dict(pd.read_csv(out.with_suffix(".csv"))[["method", "sessions"]].itertuples(index=False))
    assert sessions["Djinn"] == "50 of 50"
    assert sessions["eager"].endswith("of 50")
    assert sessions["eager"] != "50 of 50"
    assert r"\begin{tabular}" in out.with_suffix(".tex").read_text()


@pytest.mark.parametrize("uncertified", ["resume", "pressure"])
def test_table1_needs_both_certificates(run: Maker, tmp_path: Path, uncertified: str):
    run.resume()
    run.machine_id = "machine-2"
    run.pressure()
    run.certificate(verdict="fail" if uncertified == "pressure" else "pass", beside="pressure")
    run.machine_id = "machine-1" if uncertified == "pressure" else "machine-3"
    run.certificate()
    table1.draw(run.folder, tmp_path / "table1.md")
    assert "uncertified machine" in (tmp_path / "table1.md").read_text()
    run.machine_id = "machine-2"
    run.certificate(beside="pressure")
    run.machine_id = "machine-1"
    run.certificate()
    table1.draw(run.folder, tmp_path / "table1.md")
    assert "uncertified" not in (tmp_path / "table1.md").read_text()


def test_a_figure_that_the_disk_does_not_take_is_one_line_and_no_half_file(
    run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.pressure()
    out = tmp_path / "figures/fig6.pdf"
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["fig6", "--results", str(run.folder), "--out", str(out)])
    assert style.command("fig6", "of the test", fig6.draw) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"fig6: {out} was not written: No space left on device; ") and told.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_the_breakdown_adds_up_at_the_peak(run: Maker):
    run.pressure()
    result = fig6.read_folder(run.folder / "pressure", ["djinn"])[0]
    table = memory_breakdown.breakdown(result)
    assert table["peak_bytes"].sum() == result.values("device_bytes", {"source": "ledger"}).max()
    assert "resident weights" in memory_breakdown.markdown(table, result)


def test_no_ledger_samples_are_no_breakdown(run: Maker):
    run.streaming()
    with pytest.raises(ResultError, match="ledger_bytes"):
        memory_breakdown.breakdown(fig6.read_folder(run.folder / "streaming", ["djinn_resident"])[0])


def test_the_breakdown_of_what_was_not_measured_says_why(run: Maker, tmp_path: Path):
    result = run.result("pressure", "djinn")
    result.fail("unsupported", "needs 2 bytes of free host memory, have 1")
    run.write(result)
    memory_breakdown.write(run.folder / "pressure/djinn.json", tmp_path / "memory_breakdown.md")
    assert "unsupported, needs 2 bytes" in (tmp_path / "memory_breakdown.md").read_text()
    assert (tmp_path / "memory_breakdown.csv").read_text() == "part,peak_bytes,median_bytes,max_bytes\n"
