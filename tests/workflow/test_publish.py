"""Publishing: experiments of one kind of machine stand beside each other, each under its own certificate."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.synthetic import Maker
from workflow.lib.claims import INCONCLUSIVE, PASS
from workflow.lib.results import NotWritten, ResultError
from workflow.plots.load import certificate_of, read
from workflow.scripts import claims, memory_breakdown, publish, report

REPOSITORY = Path(__file__).parents[2]
CLAIMS = REPOSITORY / "config/claims.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Maker:
    return certified(tmp_path / "h200")


def certified(folder: Path, machine_id: str = "machine-1") -> Maker:
    maker = Maker(folder)
    maker.machine_id = machine_id
    maker.certificate()
    return maker


def put(maker: Maker, target: Path, **words) -> list[str]:
    return publish.publish([maker.folder], target, claims_path=CLAIMS, **words)


def measured_line(table: str, experiment: str) -> str:
    """What claims.md says an experiment's verdicts rest on."""
    return next(line for line in table.splitlines() if line.startswith(f"- {experiment}: "))


def test_publishing_copies_draws_and_judges(run: Maker, tmp_path: Path):
    run.streaming()
    run.resume()
    (run.folder / "streaming/dmon_djinn_resident.csv").write_text("# nvidia-smi's own text\n")
    target = tmp_path / "published/h200"
    assert put(run, target) == ["fig5.pdf", "fig7.pdf", "table1.md"]
    for name in ("djinn_resident.json", "dmon_djinn_resident.csv"):
        assert (target / "streaming" / name).read_bytes() == (run.folder / "streaming" / name).read_bytes()
    assert (target / "claims.md").exists()
    with pytest.raises(ResultError, match="has streaming, resume already: pass --replace"):
        put(run, target)
    assert [path.name for path in target.parent.iterdir()] == ["h200"]


def test_reports_are_made_from_the_copies(run: Maker, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(publish, "draw_figures", lambda folder: [])
    run.streaming()
    run.pressure()
    (run.folder / "streaming/report.md").write_text("of an earlier run\n")
    (run.folder / "pressure/pressure.log").write_text("12:00:00 a session is evicted\n")
    put(run, tmp_path / "set")
    text, _ = report.report(tmp_path / "set", CLAIMS)
    assert (tmp_path / "set/streaming/report.md").read_text() == text
    table = pd.read_csv(tmp_path / "set/pressure/memory_breakdown.csv")
    wanted = memory_breakdown.breakdown(read(tmp_path / "set/pressure/djinn.json"))
    assert table["peak_bytes"].tolist() == wanted["peak_bytes"].tolist()
    for name in ("streaming/report.csv", "pressure/memory_breakdown.md", "pressure/pressure.log"):
        assert (tmp_path / "set" / name).is_file()


@pytest.mark.parametrize("fault", ["dirty", "kind", "certificate", "empty", "two machines"])
def test_publishing_refuses_what_cannot_stand(run: Maker, tmp_path: Path, fault: str):
    said = {
        "dirty": "uncommitted",
        "kind": r"machine\.kind\.gpu",
        "certificate": "certify",
        "empty": "no result",
        "two machines": r"differ in machine\.id",
    }
    if fault != "empty":
        run.streaming()
    if fault == "certificate":
        run.certificate("fail")
    run.dirty, run.gpu = fault == "dirty", "NVIDIA L4" if fault == "kind" else run.gpu
    run.machine_id = "machine-2" if fault == "two machines" else run.machine_id
    if fault in ("dirty", "kind", "two machines"):
        result = run.result("streaming" if fault == "two machines" else "resume", "eager")
        result.sample("ready_ms", 1.0, "ms")
        run.write(result)
    target = tmp_path / "published/h200"
    with pytest.raises(ResultError, match=said[fault]):
        put(run, target)
    assert not target.exists()


def test_a_published_set_says_which_system_was_not_run(run: Maker, tmp_path: Path):
    run.resume()
    (run.folder / "resume/manual_offload_pageable.json").unlink()
    with pytest.raises(ResultError, match=r"manual_offload_pageable\.json is missing"):
        put(run, tmp_path / "published")
    put(run, tmp_path / "published", without={"resume/manual_offload_pageable": "no time was left"})
    drawn = pd.read_csv(tmp_path / "published/figures/fig7.csv")
    assert drawn[drawn["method"] == "manual_offload_pageable"]["status"].tolist() == ["not_run"]
    assert drawn[drawn["method"] == "manual_offload_pinned"]["median"].notna().all()
    assert "not run" in (tmp_path / "published/figures/table1.md").read_text()


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ({"resume/eager": "it is slow"}, r"resume/eager\.json is there"),
        ({"pressure/eager": "no time"}, "wanted SYSTEM of resume"),
        ({"resume/other": ""}, "and a reason"),
    ],
)
def test_what_was_measured_is_not_called_not_run(run: Maker, tmp_path: Path, without: dict[str, str], said: str):
    run.resume()
    with pytest.raises(ResultError, match=said):
        put(run, tmp_path / "set", without=without)


def test_experiments_of_two_cards_of_one_kind_stand_in_one_set(run: Maker, tmp_path: Path):
    run.streaming()
    other = certified(tmp_path / "other", "machine-2")
    other.resume()
    target = tmp_path / "set"
    publish.publish([run.folder, other.folder], target, claims_path=CLAIMS)
    assert not (target / "certificate.json").exists()
    for name, machine in (("streaming", "machine-1"), ("resume", "machine-2")):
        assert certificate_of(target, name).machine_id == machine
    verdicts = {claim["id"]: claim["verdict"] for claim in json.loads((target / "claims.json").read_text())["claims"]}
    assert verdicts["streaming-vs-deepspeed"] == verdicts["resume-next-token"] == PASS
    assert "uncertified" not in (target / "figures/table1.md").read_text()
    # with one card's certificate for both, nothing of the other's could be decided
    (target / "resume/certificate.json").write_bytes((target / "streaming/certificate.json").read_bytes())
    by_id = [claim for claim in claims.load_claims(CLAIMS) if claim["id"] == "resume-next-token"]
    assert claims.judge_all(by_id, target)[0].verdict == INCONCLUSIVE


def test_each_card_needs_its_own_certificate(run: Maker, tmp_path: Path):
    run.streaming()
    other = Maker(tmp_path / "other")
    other.machine_id = "machine-2"
    other.resume()
    with pytest.raises(ResultError, match=r"other/certificate\.json \(missing"):
        publish.publish([run.folder, other.folder], tmp_path / "set", claims_path=CLAIMS)


def test_one_experiment_of_two_folders_is_refused_until_one_is_chosen(run: Maker, tmp_path: Path):
    run.streaming()
    run.resume()
    other = certified(tmp_path / "other")
    other.resume()
    with pytest.raises(ResultError, match=r"resume is in .*h200 and in .*other: give it once, or choose with --only"):
        publish.publish([run.folder, other.folder], tmp_path / "set", claims_path=CLAIMS)
    with pytest.raises(ResultError, match="other holds no result of streaming"):
        publish.publish([run.folder, other.folder], tmp_path / "set", only=["streaming"], claims_path=CLAIMS)
    put(run, tmp_path / "set", only=["streaming"])
    assert not (tmp_path / "set/resume").exists()


def test_an_experiment_joins_those_that_are_there_or_replaces_itself(run: Maker, tmp_path: Path, monkeypatch):
    run.resume()
    (run.folder / "resume/manual_offload_pageable.json").unlink()
    target = tmp_path / "set"
    put(run, target, without={"resume/manual_offload_pageable": "no time was left"})
    kept = {path.name: path.read_bytes() for path in (target / "resume").iterdir()}
    other = certified(tmp_path / "other", "machine-2")
    other.streaming()
    assert put(other, target) == ["fig5.pdf", "fig7.pdf", "table1.md"]  # nothing is replaced: it was not there
    monkeypatch.setattr(publish, "draw_figures", lambda folder: [])  # the rest is about files
    other.streaming(rates={"deepspeed_cpu": 10.0})
    with pytest.raises(ResultError, match="has streaming already"):
        put(other, target)
    table = (target / "claims.md").read_text()
    put(other, target, replace=True)
    again = (target / "claims.md").read_text()
    assert all(text.startswith(f"# Claims, judged from `{target}`") for text in (table, again))
    assert measured_line(again, "streaming") != measured_line(table, "streaming"), "it is of what was replaced"
    assert measured_line(again, "resume") == measured_line(table, "resume")
    assert read(target / "streaming/deepspeed_cpu.json").median("effective_gbps") == pytest.approx(10.0, rel=0.05)
    assert {path.name: path.read_bytes() for path in (target / "resume").iterdir()} == kept
    assert json.loads((target / "not_run.json").read_text()) == {"resume/manual_offload_pageable": "no time was left"}
    run.resume()
    put(run, target, replace=True)
    assert not (target / "not_run.json").exists()  # it was about what has been replaced
    assert certificate_of(target, "streaming").machine_id == "machine-2"


def test_a_copy_that_the_disk_does_not_take_is_told_and_changes_nothing(run: Maker, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.resume()
    target = tmp_path / "published/h200"
    monkeypatch.setattr(publish.shutil, "copy2", full)
    with pytest.raises(NotWritten, match=f"{target} was not written: No space .*; make room in {target.parent} and"):
        put(run, target)
    assert list(target.parent.iterdir()) == []


def test_another_kind_does_not_join(run: Maker, tmp_path: Path):
    run.resume()
    put(run, tmp_path / "set")
    before = sorted(path for path in (tmp_path / "set").rglob("*"))
    other = Maker(tmp_path / "other", gpu="NVIDIA L4")
    other.certificate()
    other.streaming()
    with pytest.raises(ResultError, match=r"machine\.kind\.gpu .*another name"):
        put(other, tmp_path / "set")
    assert sorted(path for path in (tmp_path / "set").rglob("*")) == before


def test_one_kind_is_told_by_whole_gib_of_memory(run: Maker):
    result = run.result("streaming", "eager")
    result.sample("pass_s", 1.0, "s")
    here = read(run.write(result))
    kinds = []
    for extra_bytes in (4096, 2 << 30):
        result.machine["kind"]["memory_bytes"] = here.machine_kind["memory_bytes"] + extra_bytes
        kinds.append(publish.machine_kind(read(run.write(result))))
    assert kinds[0] == publish.machine_kind(here) != kinds[1]


@pytest.mark.parametrize("folder", sorted((REPOSITORY / "results/published").iterdir()), ids=lambda path: path.name)
def test_what_is_published_is_whole(folder: Path):
    """Every set here stands: certified, of one kind, and its verdicts are those that its files give today."""
    sources = publish.given_sources([folder])
    publish.refuse_unfit(sources)
    assert all((folder / name / "certificate.json").is_file() for name in sources)
    written = {claim["id"]: claim["verdict"] for claim in json.loads((folder / "claims.json").read_text())["claims"]}
    judged = claims.judge_all(claims.load_claims(CLAIMS), folder)
    again = {item.claim["id"]: item.verdict for item in judged if item.claim["id"] in written}
    assert {name: written[name] for name in again} == again
