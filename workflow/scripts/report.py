"""The comparison of the streaming systems, as a table to read (report.md) and one to compute with (report.csv).

    python -m workflow.scripts.report --results results/cpu --out results/cpu/streaming/report.md

The two groups stand in tables of their own. Targets are the streaming claims of config/claims.yaml, judged as
`claims` judges them; no number in this file is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from workflow.lib.results import ResultError, write_text
from workflow.lib.systems import STREAMING_GROUPS, STREAMING_SYSTEMS
from workflow.plots.fig5 import chunk_bytes
from workflow.plots.load import ResultFile, certificate_of, digest, read_folder
from workflow.plots.style import label, machine_line
from workflow.scripts.claims import CLAIMS, SYMBOLS, judge_all, load_claims, measured, number

COLUMNS = (
    ("pass_s", "pass (s)", 1.0),
    ("effective_gbps", "effective (GB/s)", 1.0),
    ("link_gbps", "moved (GB/s)", 1.0),
    ("ttft_s", "first token (s)", 1.0),
    ("decode_s_per_token", "decode (s/token)", 1.0),
    ("load_s", "load (s)", 1.0),
    ("peak_vram_bytes", "device peak (GB)", 1e-9),
    ("host_bytes", "host (GB)", 1e-9),
)
GATES = ("tokens_equal", "logits_bit_equal", "moved_equals_plan", "link_at_most_1.02_of_rate", "under_cap")


def rows_of(results: dict[str, ResultFile]) -> pd.DataFrame:
    """Every system with every metric: report.csv."""
    rows = []
    for group, systems in STREAMING_GROUPS.items():
        for system in systems:
            result = results[system]
            for metric, _, _ in COLUMNS:
                summary = result.summary(metric) or {}
                row = {"group": group, "system": system, "status": result.status, "metric": metric}
                row |= {name: summary.get(name) for name in ("median", "ci95_low", "ci95_high", "n")}
                row |= {"h2d_gbps": result.limit("h2d_gbps"), "reason": result.reason}
                rows.append(row)
    return pd.DataFrame(rows)


def gates(result: ResultFile) -> str:
    """The gates that a result breaks, or that it holds all that apply to it."""
    broken = [name for name in GATES if name in result.checks and result.checks[name]["passed"] is False]
    if broken:
        return "broken: " + ", ".join(broken)
    held = sum(1 for name in GATES if name in result.checks and result.checks[name]["passed"] is True)
    return f"{held} held" if held else "–"


def group_table(results: list[ResultFile]) -> list[str]:
    """One group: a line per system, its numbers or why there are none."""
    heads = [head for _, head, _ in COLUMNS]
    djinn_s = [result.median("pass_s") for result in results if result.ok and result.system.startswith("djinn")]
    best_s = min((seconds for seconds in djinn_s if seconds is not None), default=None)
    lines = [
        "| system | status | " + " | ".join(heads) + " | share of link | pass, x best Djinn | gates |",
        "| --- | --- |" + " ---: |" * (len(heads) + 2) + " --- |",
    ]
    for result in results:
        cells = []
        for metric, _, scale in COLUMNS:
            median = result.median(metric)
            cells.append("–" if median is None else f"{median * scale:.3g}")
        rate, moved = result.limit("h2d_gbps"), result.median("link_gbps")
        cells.append(f"{moved / rate:.3f}" if rate and moved is not None else "–")
        seconds = result.median("pass_s") if result.ok else None
        cells.append("–" if best_s is None or seconds is None else f"{seconds / best_s:.2f}")
        name = label(result.system, chunk_bytes(result))
        lines.append(f"| {name} | {result.status.replace('_', ' ')} | " + " | ".join(cells) + f" | {gates(result)} |")
    reasons = [
        f"- {label(r.system, chunk_bytes(r))}: {r.status.replace('_', ' ')}: {r.reason}" for r in results if not r.ok
    ]
    return [*lines, "", *reasons, ""] if reasons else [*lines, ""]


def targets(results_dir: Path, claims_path: Path) -> list[str]:
    """The streaming claims with what was measured."""
    claims = [claim for claim in load_claims(claims_path) if claim["experiment"] == "streaming"]
    lines = ["| target | bar | measured | verdict |", "| --- | ---: | ---: | --- |"]
    for item in judge_all(claims, results_dir):
        bar = f"{SYMBOLS[item.claim['comparator']]} {number(item.claim['bound'])}"
        lines.append(f"| {item.claim['sentence']} | {bar} | {measured(item.deciding)} | {item.verdict} |")
    return lines


def report(results_dir: Path, claims_path: Path) -> tuple[str, pd.DataFrame]:
    """The text of report.md and the rows of report.csv.

    Raises:
        ResultError: a file is missing, or the files may not be compared.
    """
    loaded = read_folder(results_dir / "streaming", STREAMING_SYSTEMS)
    results = {result.system: result for result in loaded}
    certificate = certificate_of(results_dir, "streaming")
    first = loaded[0]
    settings = ", ".join(
        f"{name} {first.config[name]:,}" for name in ("prompt_tokens", "cap_bytes") if name in first.config
    )
    lines = [
        "# Streaming: a model larger than its memory",
        "",
        f"{machine_line(loaded)} · input {digest([result.path for result in loaded])}",
        "",
        f"{settings}; weights: {first.data['weights'].get('kind', 'not said')}; certificate: {certificate.verdict}.",
        "Medians; intervals are in `report.csv`. Ratios are formed inside a group only.",
        "",
    ]
    for group, names in STREAMING_GROUPS.items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", *group_table([results[name] for name in names])]
    lines += ["## Targets", "", *targets(results_dir, claims_path)]
    return "\n".join(lines) + "\n", rows_of(results)


def write(results_dir: Path, claims_path: Path, out: Path) -> None:
    """Write the text as `out` and the rows beside it as .csv; raises as `report` does."""
    text, rows = report(results_dir, claims_path)
    write_text(out, text)
    write_text(out.with_suffix(".csv"), rows.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="a run's folder, such as results/cpu")
    parser.add_argument("--claims", type=Path, default=CLAIMS)
    parser.add_argument("--out", type=Path, required=True, help="report.md; report.csv is written beside it")
    args = parser.parse_args()
    try:
        write(args.results, args.claims, args.out)
    except ResultError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
