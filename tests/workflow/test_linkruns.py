"""Runs between two looks at the link: what was timed while it moved stays in the file, and counts nowhere."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.synthetic import Maker
from tests.workflow.test_harness import STEADY
from workflow.lib import harness
from workflow.lib.claims import INCONCLUSIVE, PASS
from workflow.lib.linkruns import LinkRuns
from workflow.lib.results import DRIFTED, read_result
from workflow.plots.load import ResultFile
from workflow.scripts import claims

MOVED = STEADY | {"bidirectional_gbps": 78.0}  # by 2.5 %
WILD = [STEADY, MOVED, STEADY, STEADY]
DECIDES = ["machine.limits.drift_decides=true"]
NEEDED = 2
CLAIMS = Path(__file__).parents[2] / "config/claims.yaml"


def measured(
    tmp_path: Path, looks: list[dict[str, Any]], body: Callable[[harness.Experiment], None], overrides: Any = DECIDES
) -> dict[str, Any]:
    """The result of a body around which the link was found to be `looks`; every look is taken."""
    out, left = tmp_path / "pressure/djinn.json", iter(looks)
    args = Namespace(run="cpu", out=out, overrides=list(overrides), log=tmp_path / "log")
    with harness.experiment(args, experiment="pressure", system="djinn", measure=lambda *_: next(left)) as exp:
        body(exp)
    assert next(left, None) is None
    return read_result(out)


def seeds(count: int) -> Callable[[harness.Experiment], None]:
    """As many runs, each with a time and a count of its own number."""

    def body(exp: harness.Experiment) -> None:
        with LinkRuns(exp, NEEDED) as link:
            for seed in range(count):
                with link.run(seed=seed):
                    exp.result.sample("total_s", float(seed), "s", seed=seed)
                    exp.result.sample("found_resident", 1.0, "share", seed=seed)
                    exp.result.sample("evicted_bytes", seed, "bytes", seed=seed)

    return body


def of(document: dict[str, Any], metric: str) -> list[int]:
    """The seeds of a metric's samples that are judged."""
    rows = ResultFile(Path("x"), document).select(metric)
    return sorted(rows["seed"]) if len(rows) else []


def test_what_was_timed_while_the_link_moved_counts_nowhere(tmp_path: Path) -> None:
    document = measured(tmp_path, [STEADY, STEADY, STEADY, MOVED, MOVED, STEADY, MOVED], seeds(4))
    assert document["status"] == "ok", document["reason"]  # the two looks around all of it decide nothing then
    assert [run["drifted"] for run in document["limits"]["runs"]] == [False, True, False, True]
    assert len([row for row in document["samples"] if row["metric"] == "total_s"]) == 4
    assert of(document, "total_s") == of(document, "found_resident") == [0, 2]
    assert of(document, "evicted_bytes") == [0, 1, 2, 3]
    assert sorted(row["seed"] for row in document["summary"] if row["metric"] == "total_s") == [0, 2]


def test_each_run_is_held_against_the_looks_right_around_it(tmp_path: Path) -> None:
    """A link that moves by a little in each run ends far from where it began."""
    slower = [STEADY | {"h2d_gbps": 50.0 * 0.985**n} for n in range(4)]
    document = measured(tmp_path, [STEADY, *slower, slower[-1]], seeds(3))
    assert document["status"] == "ok" and of(document, "total_s") == [0, 1, 2]
    for run, before, after in zip(document["limits"]["runs"], slower, slower[1:], strict=False):
        assert (run["before"], run["after"]) == (before, after)


@pytest.mark.parametrize(("looks", "status"), [([STEADY, MOVED, MOVED, MOVED], "ok"), (WILD, "inconclusive")])
def test_with_too_few_whose_link_stood_still_it_is_inconclusive(tmp_path: Path, looks: list, status: str) -> None:
    document = measured(tmp_path, [STEADY, *looks, STEADY], seeds(3))
    assert document["status"] == status
    told = f"{DRIFTED}: of 3 runs 1 moved by no more than 2%; 2 are needed"
    assert document["reason"] == ("" if status == "ok" else told)


def test_a_body_gets_the_rates_around_it(tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        with LinkRuns(exp, 0) as link, link.run(seed=0) as around:
            rates = around()
            assert rates == around() and rates["bidirectional_gbps"] == pytest.approx(79.0)
            exp.result.sample("swap_rate_ratio", 0.97, "ratio", seed=0)

    document = measured(tmp_path, [STEADY, STEADY, MOVED, STEADY], body)
    assert document["status"] == "ok" and of(document, "swap_rate_ratio") == []


def test_where_drift_decides_nothing_nothing_is_left_out(tmp_path: Path) -> None:
    document = measured(tmp_path, [STEADY, STEADY, MOVED, STEADY, STEADY, STEADY], seeds(3), overrides=())
    assert document["status"] == "ok" and of(document, "total_s") == [0, 1, 2]
    assert [run["drift"] for run in document["limits"]["runs"]][:1] == [pytest.approx(0.025)]


def test_a_run_that_raises_is_told_as_it_is(tmp_path: Path) -> None:
    def body(exp: harness.Experiment) -> None:
        with LinkRuns(exp, NEEDED) as link, link.run(seed=0):
            raise harness.Outcome("unsupported", "as the test wants")

    document = measured(tmp_path, [STEADY, STEADY, STEADY], body)
    assert (document["status"], document["reason"]) == ("unsupported", "Outcome: as the test wants")
    assert document["limits"]["runs"] == []


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    made = Maker(tmp_path / "h200")
    made.certificate()
    return made


def judged(maker: Maker, name: str) -> tuple[str, str]:
    claim = next(each for each in claims.load_claims(CLAIMS) if each["id"] == name)
    found = claims.judge_all([claim], maker.folder)[0]
    return found.verdict, found.deciding.reason


@pytest.mark.parametrize(("drifted", "verdict"), [([1], PASS), ([0, 1, 2, 3], INCONCLUSIVE)])
def test_claims_take_the_other_runs(maker: Maker, drifted: list[int], verdict: str) -> None:
    """Where the link drifted the cap costs a tenth."""
    result = maker.result("pressure", "djinn")
    for seed in range(4):
        for method, value in (("djinn", 11.0 if seed in drifted else 10.0), ("djinn_uncapped", 10.0)):
            result.sample("total_s", value, "s", method=method, seed=seed)
            if seed in drifted:
                result.samples[-1]["drifted"] = True
    maker.write(result)
    found, reason = judged(maker, "pressure-total-by-turns")
    assert found == verdict
    assert verdict == PASS or (reason.startswith(DRIFTED) and "total_s" in reason)


def test_pairs_of_two_files_are_of_one_seed(maker: Maker) -> None:
    """Each file has lost another run; seeds take 10, 20, 30 and 40 s in both."""
    for system, lost in (("djinn", 1), ("djinn_uncapped", 2)):
        result = maker.result("pressure", system)
        for seed in range(4):
            result.sample("total_s", 10.0 * (seed + 1), "s", method="djinn", seed=seed)
            if seed == lost:
                result.samples[-1] |= {"drifted": True, "value": 99.0}
        maker.write(result)
    assert judged(maker, "pressure-total") == (PASS, "")
