"""Claims: the verdict follows from the files, and every kind of verdict can come out."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.workflow.synthetic import Maker
from workflow.lib.claimfiles import input_files
from workflow.lib.claims import FAIL, INCONCLUSIVE, NOT_RUN, OTHER_HARDWARE, PASS
from workflow.lib.results import DRIFTED, ResultError, validate
from workflow.lib.systems import SYSTEMS
from workflow.scripts import claims

REPOSITORY = Path(__file__).parents[2]
BY_ID = {claim["id"]: claim for claim in claims.load_claims(REPOSITORY / "config/claims.yaml")}


@pytest.fixture
def run(tmp_path: Path) -> Maker:
    maker = Maker(tmp_path / "h200")
    maker.certificate()
    return maker


def judged(maker: Maker, name: str):
    return claims.judge_all([BY_ID[name]], maker.folder)[0]


def pair(maker: Maker, top: list[float], bottom: list[float], **changes) -> dict:
    """A claim on the paired ratio of two systems' pass_s, with the result files that it reads."""
    for system, values in (("djinn_a", top), ("peer_b", bottom)):
        result = maker.result("streaming", system)
        for value in values:
            result.sample("pass_s", value, "s")
        maker.write(result)
    claim = {
        "id": "made-up",
        "sentence": "A claim of this test alone.",
        "figure": "fig5",
        "experiment": "streaming",
        "value": {"ratio": [{"system": "djinn_a", "metric": "pass_s"}, {"system": "peer_b", "metric": "pass_s"}]},
        "comparator": "at_most",
        "bound": 1.1,
    }
    claim |= changes
    validate({"claims": [claim]}, "claims", "test")
    return claim


def test_claims_read_files_that_the_experiments_name():
    named = {name.split("/")[0] for name in input_files(BY_ID.values())}
    assert named == {"streaming", "resume", "pressure"}


def test_a_bar_that_was_set_stays():
    """Every bar with a number, once more: a change of one is a change of this list, and is seen."""
    assert {
        name: (claim["comparator"], claim["bound"])
        for name, claim in BY_ID.items()
        if not isinstance(claim["bound"], bool)
    } == {
        "streaming-link-rate": ("at_least", 0.98),
        "streaming-vs-deepspeed-tuned": ("at_least", 1.15),
        "streaming-vs-deepspeed": ("at_least", 1.3),
        "streaming-vs-accelerate": ("at_least", 6.5),
        "streaming-coded-vs-deepspeed": ("at_least", 1.3),
        "streaming-coded-first-token": ("at_most", 1.08),
        "streaming-filled-vs-accelerate": ("at_least", 5),
        "streaming-filled-as-planned": ("at_most", 1.05),
        "streaming-host-bytes": ("at_most", 1.05),
        "streaming-under-cap": ("at_most", 1),
        "streaming-first-token": ("at_most", 1.08),
        "resume-tokens-equal": ("at_least", 1),
        "resume-ready": ("at_most", 1.10),
        "resume-ready-flat": ("below", 0.01),
        "resume-next-logits-vs-eager": ("at_most", 1.03),
        "resume-next-logits-vs-pinned-shallow": ("at_most", 1.01),
        "resume-next-logits-vs-pinned": ("below", 1),
        "resume-next-logits-vs-overlapped": ("at_most", 1.03),
        "resume-next-token": ("at_most", 1.05),
        "resume-drain": ("at_least", 0.95),
        "resume-pause-call": ("below", 1),
        "pressure-all-complete": ("at_least", 1),
        "pressure-under-cap-ledger": ("at_most", 1),
        "pressure-under-cap": ("at_most", 1),
        "pressure-total": ("at_most", 1.05),
        "pressure-total-by-turns": ("at_most", 1.05),
        "pressure-swap-rate": ("at_least", 0.95),
        "pressure-ready-tail": ("at_most", 2),
        "pressure-hint": ("at_least", 0.9),
    }


def test_a_ratio_beyond_the_bound_fails_and_within_passes(run: Maker):
    claim = pair(run, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert claims.judge_all([claim], run.folder)[0].verdict == PASS
    claim = pair(run, [1.2, 1.2, 1.2], [1.0, 1.0, 1.0])
    item = claims.judge_all([claim], run.folder)[0]
    assert item.verdict == FAIL
    assert item.deciding.value == pytest.approx(1.2)


def test_a_bound_met_by_luck_is_inconclusive(run: Maker):
    claim = pair(run, [0.9, 1.0, 1.3], [1.0, 1.0, 1.0])
    item = claims.judge_all([claim], run.folder)[0]
    assert item.verdict == INCONCLUSIVE
    assert item.deciding.low < 1.1 < item.deciding.high


def test_paired_ratios_are_taken_row_by_row(run: Maker):
    slow_then_fast, partner = [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]
    metric = {"metric": "pass_s"}
    ratio = [{"system": "djinn_a", **metric}, {"system": "peer_b", **metric}]
    claim = pair(run, slow_then_fast, partner, value={"ratio": ratio, "paired": True})
    case = claims.judge_all([claim], run.folder)[0].deciding
    assert (case.value, case.low, case.high) == (1.0, 1.0, 1.0)
    claim = pair(run, slow_then_fast, partner[:3], value={"ratio": ratio, "paired": True})
    assert claims.judge_all([claim], run.folder)[0].verdict == INCONCLUSIVE


@pytest.mark.parametrize(("share", "verdict"), [(0.99, PASS), (0.95, FAIL)])
def test_the_share_of_the_link_is_of_the_limits_around_the_result(run: Maker, share: float, verdict: str):
    for size in (16, 64, 128, 512):
        result = run.result("streaming", f"djinn_chunk{size}mib")
        for _ in range(3):
            result.sample("link_gbps", share * result.limits["h2d_gbps"], "GB/s")
            result.sample("run_h2d_gbps", 0.97 * result.limits["h2d_gbps"], "GB/s")  # another one, that is not asked
        run.write(result)
    item = judged(run, "streaming-link-rate")
    assert item.verdict == verdict
    assert item.deciding.value == pytest.approx(share)


def test_a_slope_is_that_of_the_samples(run: Maker):
    result = run.result("resume", "djinn_a")
    for layer in (1, 2, 3, 4) * 5:
        result.sample("ready_ms", 5.0 + 0.25 * layer, "ms", layer=layer)
    run.write(result)
    sampled = {"system": "djinn_a", "metric": "ready_ms"}
    claim = pair(run, [1.0], [1.0], experiment="resume", value={"slope": sampled, "by": "layer"}, bound=0.3)
    case = claims.judge_all([claim], run.folder)[0].deciding
    assert case.verdict == PASS
    assert case.value == pytest.approx(0.25)
    claim["value"]["by"] = "depth"
    assert claims.judge_all([claim], run.folder)[0].verdict == NOT_RUN


def test_warmups_do_not_count(run: Maker):
    claim = pair(run, [1.0, 1.0], [1.0, 1.0])
    result = run.result("streaming", "djinn_a")
    result.sample("pass_s", 50.0, "s", warmup=True)
    result.sample("pass_s", 1.0, "s")
    run.write(result)
    assert claims.judge_all([claim], run.folder)[0].deciding.value == 1.0


def test_the_worst_case_decides(run: Maker):
    run.streaming(rates={"djinn_chunk128mib": 50.0})
    item = judged(run, "streaming-link-rate")
    assert item.verdict == FAIL
    assert item.deciding.variables == {"system": "djinn_chunk128mib"}
    assert sorted(case.verdict for case in item.cases) == [FAIL, PASS, PASS, PASS]


def test_what_was_not_run_says_so(run: Maker):
    item = judged(run, "resume-ready")
    assert item.verdict == NOT_RUN
    assert item.deciding.value is None


def test_claims_of_a_gpu_are_not_applicable_elsewhere_but_correctness_is(tmp_path: Path):
    maker = Maker(tmp_path / "cpu", gpu=None, run="cpu")
    maker.certificate()
    maker.streaming()
    assert judged(maker, "streaming-vs-deepspeed").verdict == OTHER_HARDWARE
    assert judged(maker, "streaming-logits-equal").verdict == PASS
    assert judged(maker, "streaming-under-cap").verdict == PASS


def test_a_broken_gate_fails_even_though_the_result_is_failed(run: Maker):
    run.streaming()
    result = run.result("streaming", "djinn_resident")
    result.sample("pass_s", 0.1, "s")
    result.check("logits_bit_equal", False)
    run.write(result)
    item = judged(run, "streaming-logits-equal")
    assert item.verdict == FAIL
    assert "logits_bit_equal" in item.deciding.reason
    assert judged(run, "streaming-filled-vs-accelerate").verdict == FAIL


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("inconclusive", INCONCLUSIVE), ("out_of_memory", INCONCLUSIVE), ("unsupported", OTHER_HARDWARE)],
)
def test_a_peer_without_numbers_is_no_victory(run: Maker, status: str, verdict: str):
    run.streaming(failing={"deepspeed_cpu": (status, "as the test wants")})
    assert judged(run, "streaming-vs-deepspeed").verdict == verdict


@pytest.mark.parametrize(
    ("reason", "unit", "verdict"),
    [
        (f"{DRIFTED}: bidirectional_gbps by 2.4%", "sessions", PASS),
        (f"{DRIFTED}: bidirectional_gbps by 2.4%", "s", INCONCLUSIVE),
        ("another process used the GPU", "sessions", INCONCLUSIVE),
    ],
)
def test_what_is_counted_does_not_hang_on_the_links_rate(run: Maker, reason: str, unit: str, verdict: str):
    result = run.result("pressure", "djinn")
    result.sample("completed_sessions", 50.0, unit, method="djinn", seed=0)
    result.config["sessions"] = 50
    result.fail("inconclusive", reason)
    run.write(result)
    assert judged(run, "pressure-all-complete").verdict == verdict


def test_other_code_or_another_machine_is_not_compared(run: Maker):
    claim = pair(run, [1.0, 1.0], [1.0, 1.0])
    run.source_digest = "1" * 32
    result = run.result("streaming", "peer_b")
    result.sample("pass_s", 1.0, "s")
    run.write(result)
    item = claims.judge_all([claim], run.folder)[0]
    assert item.verdict == INCONCLUSIVE
    assert "source.digest" in item.deciding.reason


def test_an_uncertified_gpu_decides_nothing(run: Maker):
    run.streaming()
    run.certificate("fail")
    assert judged(run, "streaming-vs-deepspeed").verdict == INCONCLUSIVE
    assert judged(run, "streaming-logits-equal").verdict == PASS


def test_resume_and_pressure_claims_find_their_numbers(run: Maker):
    run.resume()
    run.pressure()
    for name in ("resume-ready-flat", "resume-next-logits-vs-eager", "resume-next-token", "resume-drain"):
        assert judged(run, name).verdict == PASS, name
    for name in ("pressure-all-complete", "pressure-under-cap", "pressure-flat", "pressure-total"):
        assert judged(run, name).verdict == PASS, name
    assert judged(run, "resume-eager-holds-the-gpu").verdict == PASS
    assert judged(run, "resume-next-token").deciding.value == pytest.approx(1.0, abs=0.02)


def test_the_command_writes_both_files_and_a_failed_claim_is_no_error(run: Maker, monkeypatch: pytest.MonkeyPatch):
    run.streaming(rates={"djinn_chunk16mib": 30.0})
    out, text = run.folder / "claims.json", run.folder / "claims.md"
    arguments = ["claims", "--results", str(run.folder), "--claims", str(REPOSITORY / "config/claims.yaml")]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out), "--table", str(text)])
    assert claims.main() == 0
    document = json.loads(out.read_text())
    assert document["counts"][FAIL] > 0
    assert {entry["id"] for entry in document["claims"]} == set(BY_ID)
    assert "| FAIL |" in text.read_text() and "\n- streaming: NVIDIA H200 · " in text.read_text()
    first = out.read_bytes()
    assert claims.main() == 0
    assert out.read_bytes() == first


def test_the_table_ends_with_the_command_that_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And so does `make reproduce`. A published set has none: no pipeline measures it."""
    monkeypatch.chdir(tmp_path)
    run = Maker(Path("results/h200"))
    run.certificate()
    run.pressure()
    run.streaming(failing={"deepspeed_nvme": ("unsupported", "no libaio"), "djinn_ans": ("out_of_memory", "full")})
    broken = run.result("pressure", "reference")
    broken.check("reference_repeats", False)
    run.write(broken)
    judged = claims.judge_all(BY_ID.values(), run.folder)
    command = (
        "snakemake all --config run=h200 --forcerun results/h200/pressure/reference.json"
        " results/h200/streaming/deepspeed_nvme.json"
    )
    left = "pressure/reference (failed), streaming/deepspeed_nvme (unsupported)"
    told = f"- not measured, and kept until forced: {left}; again with `{command}`"
    table = claims.table(judged, run.folder)
    assert table.endswith(f"\n{told}\n")
    assert "--forcerun" not in claims.table(judged, run.folder, Path("results/published/h200"))
    (run.folder / "claims.md").write_text(table)
    snakemake = tmp_path / ".venv/bin/snakemake"
    snakemake.parent.mkdir(parents=True)
    snakemake.write_text("#!/bin/sh\n")
    snakemake.chmod(0o755)
    made = ["make", "--silent", "--file", str(REPOSITORY / "Makefile"), "--old-file", "setup"]
    said = subprocess.run([*made, "VENV=.venv", "reproduce"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines().count(told) == 1
    run.streaming()
    (run.folder / "pressure/reference.json").unlink()
    assert "--forcerun" not in claims.table(claims.judge_all(BY_ID.values(), run.folder), run.folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("comparator",), "about"),
        (("bound",), "many"),
        (("value", "ratio"), [1.0]),
        (("value",), {"system": "djinn", "metric": "pass_s", "statistic": "median"}),
        (("speed",), 3),
    ],
)
def test_a_claim_that_the_schema_does_not_know_is_refused(tmp_path: Path, path: tuple[str, ...], value: object):
    claim = copy.deepcopy(BY_ID["streaming-filled-vs-accelerate"])
    place = claim
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": [claim]}))
    with pytest.raises(ResultError):
        claims.load_claims(file)


def test_an_id_used_twice_is_refused(tmp_path: Path):
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": [BY_ID["resume-drain"]] * 2}))
    with pytest.raises(ResultError, match="resume-drain"):
        claims.load_claims(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"- a", "holds a list"),
        (b"claims: [", "line 1: while parsing"),
        (b"\xff", "not UTF-8"),
        (b"claims: []\nclaims: []", "line 2: claims: given twice"),
        (b"claims: null", "None is not of type 'array'"),
    ],
)
def test_a_file_without_claims_is_refused(
    tmp_path: Path, content: bytes, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    file = tmp_path / "claims.yaml"
    file.write_bytes(content)
    words = f"claims --results {tmp_path} --claims {file} --out {tmp_path}/claims.json --table {tmp_path}/claims.md"
    monkeypatch.setattr("sys.argv", words.split())
    assert claims.main() == 1
    told = capsys.readouterr().err
    assert told.startswith(f"claims: {file}") and said in told and told.count("\n") == 1


def test_a_name_that_each_does_not_give_is_refused(tmp_path: Path):
    claim = copy.deepcopy(BY_ID["streaming-link-rate"]) | {"each": {"sytem": ["djinn_ans"]}}
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps({"claims": [claim]}))
    with pytest.raises(ResultError, match=r"streaming-link-rate: \$system is not of `each`; allowed: sytem"):
        claims.load_claims(file)


@pytest.mark.parametrize("system", ["djinn_an", "", "../streaming/djinn_ans", 3, None])
def test_a_system_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path, system: object):
    claim = copy.deepcopy(BY_ID["streaming-link-rate"])
    claim["each"]["system"].append(system)
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps({"claims": [claim]}))
    with pytest.raises(ResultError) as refusal:
        claims.load_claims(file)
    assert str(refusal.value).startswith(f"{file}: streaming-link-rate: streaming has no system {system!r}; allowed: ")
    assert all(name in str(refusal.value) for name in SYSTEMS["streaming"])


def test_only_one_value_is_a_value_of_each(tmp_path: Path):
    claim = copy.deepcopy(BY_ID["streaming-link-rate"])
    claim["each"]["system"].append(["djinn_ans"])
    file = tmp_path / "claims.yaml"
    file.write_text(json.dumps({"claims": [claim]}))
    with pytest.raises(ResultError, match=r"each\.system\[4\]: \['djinn_ans'\] is not of type"):
        claims.load_claims(file)
