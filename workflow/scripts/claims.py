"""Judge every claim of config/claims.yaml from a run's result files, and write the verdicts.

    python -m workflow.scripts.claims --results results/cpu --out results/cpu/claims.json --table results/cpu/claims.md

A failed claim is a line in the table, not an exit status: it neither stops the pipeline nor hides a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workflow.lib.claimfiles import CLAIMS, input_files, load_claims
from workflow.lib.claims import OTHER_HARDWARE, VERDICTS, Case, Judged, judge, load_files
from workflow.lib.results import ResultError, write_json, write_text
from workflow.lib.systems import SYSTEMS
from workflow.plots.load import certificate_of, digest
from workflow.plots.style import machine_line

# statuses that another run may change; running out of memory is a measurement
REPEATABLE = ("failed", "inconclusive", "unsupported")
SYMBOLS = {"at_least": "≥", "at_most": "≤", "below": "<", "above": ">", "is": "="}


def judge_all(claims: Iterable[Mapping[str, Any]], results_dir: Path) -> list[Judged]:
    claims = list(claims)
    certificates = {name: certificate_of(results_dir, name) for name in {claim["experiment"] for claim in claims}}
    loaded = load_files(input_files(claims), results_dir)
    return [judge(claim, loaded, certificates[claim["experiment"]]) for claim in claims]


def document(judged: list[Judged], results_dir: Path) -> dict[str, Any]:
    """What claims.json holds."""
    used = [results_dir / name for name in input_files(item.claim for item in judged)]
    counts = Counter(item.verdict for item in judged)
    return {
        "schema": "djinn-claims/1",
        "input": digest([path for path in used if path.exists()]),
        "counts": {verdict: counts[verdict] for verdict in VERDICTS},
        "claims": [entry(item) for item in judged],
    }


def entry(item: Judged) -> dict[str, Any]:
    claim, case = item.claim, item.deciding
    return {
        "id": claim["id"],
        "sentence": claim["sentence"],
        "figure": claim["figure"],
        "files": item.files,
        "verdict": item.verdict,
        "value": case.value,
        "ci95_low": case.low,
        "ci95_high": case.high,
        "comparator": claim["comparator"],
        "bound": claim["bound"],
        "holds_for": claim.get("holds_for", {}),
        "reason": case.reason,
        "cases": [vars(case) for case in item.cases],
    }


def number(value: float | bool | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}"


def measured(case: Case) -> str:
    interval = "" if case.low is None else f" [{number(case.low)}, {number(case.high)}]"
    return number(case.value) + interval


def table(judged: list[Judged], results_dir: Path, name: Path | None = None) -> str:
    """claims.md: a line per claim, the case that decided, then what a reader needs to know of the verdicts.

    `name` is where the files of `results_dir` will be found, if not there.
    """
    counts = Counter(item.verdict for item in judged)
    lines = [
        f"# Claims, judged from `{name or results_dir}`",
        "",
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]),
        "",
        "| claim | verdict | measured | bar | figure | remark |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for item in judged:
        case, claim = item.deciding, item.claim
        where = ", ".join(f"{name} {value}" for name, value in case.variables.items())
        shown = isinstance(case.value, float) and len(item.cases) > 1
        others = sorted({other.reason for other in item.cases if other.verdict == OTHER_HARDWARE} - {case.reason})
        remark = "; ".join(part for part in (f"worst: {where}" if shown else "", case.reason, *others) if part)
        bar = f"{SYMBOLS[claim['comparator']]} {number(claim['bound'])}"
        cells = (claim["sentence"], item.verdict, measured(case), bar, claim["figure"], remark)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    lines += [
        "",
        "A missed bar is FAIL. A bar that is met while the 95 % bootstrap interval (in brackets) reaches past it is",
        "INCONCLUSIVE, and so is anything on hardware whose certificate failed. NOT-APPLICABLE: the claim speaks of",
        "other hardware, or the system does not run here. NOT-RUN: a result that it needs is not there. Each case of",
        "each claim is in `claims.json`.",
    ]
    lines += ["", *measured_with(judged, results_dir)]
    lines += [] if name else again(judged, results_dir)
    return "\n".join(lines) + "\n"


def measured_with(judged: list[Judged], results_dir: Path) -> list[str]:
    """A line for each experiment: the machine and the code behind its verdicts, and a digest of the files."""
    lines = []
    for experiment in sorted({item.claim["experiment"] for item in judged}):
        names = input_files(item.claim for item in judged if item.claim["experiment"] == experiment)
        files = list(load_files(names, results_dir).values())
        if files:
            paths = [file.path for file in files]
            lines.append(f"- {experiment}: {machine_line(files)} · input {digest(paths)}")
    return lines


def again(judged: list[Judged], results_dir: Path) -> list[str]:
    """The command that measures again what has no numbers: its files are there, so that Snakemake has nothing to do."""
    experiments = sorted({item.claim["experiment"] for item in judged})
    names = [f"{experiment}/{system}.json" for experiment in experiments for system in SYSTEMS[experiment]]
    left = [file for file in load_files(names, results_dir).values() if file.status in REPEATABLE]
    if not left:
        return []
    told = ", ".join(f"{file.data['experiment']}/{file.system} ({file.status})" for file in left)
    paths = " ".join(str(file.path) for file in left)
    command = f"snakemake all --config run={left[0].data['run']} --forcerun {paths}"
    return [f"- not measured, and kept until forced: {told}; again with `{command}`"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="a run's folder, such as results/cpu")
    parser.add_argument("--claims", type=Path, default=CLAIMS)
    parser.add_argument("--out", type=Path, required=True, help="claims.json")
    parser.add_argument("--table", type=Path, required=True, help="claims.md")
    args = parser.parse_args()
    try:
        judged = judge_all(load_claims(args.claims), args.results)
        write_json(args.out, document(judged, args.results))
        write_text(args.table, table(judged, args.results))
    except ResultError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 1
    counts = Counter(item.verdict for item in judged)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
