"""Who holds the device's memory while sessions press on it: the ledger's own samples of the pressure run.

    python -m workflow.scripts.memory_breakdown --result results/cpu/pressure/djinn.json --out .../memory_breakdown.md

The peak column is the ledger at the moment when most was in use, so that its parts add up; the medians are each
part's own and need not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from workflow.lib.results import ResultError, write_text
from workflow.plots.load import ResultFile, digest, read
from workflow.plots.style import machine_line

METRIC = "ledger_bytes"
UNUSED = ("free", "free_bytes")


def breakdown(result: ResultFile) -> pd.DataFrame:
    """One row per part of the ledger: its bytes at the peak, its median and its own maximum; none without samples.

    Raises:
        ResultError: the result is ok and holds no ledger samples.
    """
    rows = result.select(METRIC)
    if rows.empty and result.ok:
        raise ResultError(f"{result.path} is ok and holds no {METRIC} samples")
    if rows.empty:
        return pd.DataFrame(columns=["part", "peak_bytes", "median_bytes", "max_bytes"])
    moment = [name for name in ("variant", "seed", "time_s") if name in rows.columns]
    rows = rows.drop_duplicates([*moment, "part"], keep="last")  # two reads within a millisecond are one moment
    used = rows[~rows["part"].isin(UNUSED)].groupby(moment, dropna=False)["value"].sum()
    peak = used.idxmax() if isinstance(used.idxmax(), tuple) else (used.idxmax(),)
    at_peak = rows
    for name, value in zip(moment, peak, strict=True):
        at_peak = at_peak[at_peak[name].isna() if pd.isna(value) else at_peak[name] == value]
    parts = rows.groupby("part", sort=False)["value"]
    table = pd.DataFrame({"peak_bytes": at_peak.groupby("part")["value"].sum(), "median_bytes": parts.median()})
    table["max_bytes"] = parts.max()
    return table.reindex(list(parts.groups)).rename_axis("part").reset_index()


def markdown(table: pd.DataFrame, result: ResultFile) -> str:
    cap = result.config.get("cap_bytes")
    used = table[~table["part"].isin(UNUSED)]["peak_bytes"].sum()
    lines = [
        "# Device memory under pressure, by the ledger",
        "",
        f"{machine_line([result])} · input {digest([result.path])}",
    ]
    if table.empty:
        return "\n".join([*lines, "", f"Not measured: {result.status.replace('_', ' ')}, {result.reason}"]) + "\n"
    lines += ["", "| part | at the peak (GB) | share | median (GB) | maximum (GB) |", "| --- |" + " ---: |" * 4]
    for row in table.itertuples():
        share = f"{row.peak_bytes / used:.1%}" if used and row.part not in UNUSED else "–"
        numbers = " | ".join(f"{value / 1e9:.4g}" for value in (row.median_bytes, row.max_bytes))
        name = row.part.removesuffix("_bytes").replace("_", " ")
        lines.append(f"| {name} | {row.peak_bytes / 1e9:.4g} | {share} | {numbers} |")
    lines += ["", f"In use at the peak: {used / 1e9:.4g} GB" + (f" of a cap of {cap / 1e9:.4g} GB." if cap else ".")]
    return "\n".join(lines) + "\n"


def write(path: Path, out: Path) -> None:
    """Write the breakdown of the result at `path` as `out`, and beside it as .csv; raises as `breakdown` does."""
    result = read(path)
    table = breakdown(result)
    write_text(out, markdown(table, result))
    write_text(out.with_suffix(".csv"), table.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True, help="the pressure run's djinn.json")
    parser.add_argument("--out", type=Path, required=True, help="memory_breakdown.md; the .csv is written beside it")
    args = parser.parse_args()
    try:
        write(args.result, args.out)
    except ResultError as error:
        print(f"memory_breakdown: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
