"""Figure 7: how long a resume takes against the depth at which the pass was stopped.

Each mark is a median with its bootstrap interval, of the rows that the claims judge: those of Djinn's file, in which
its rivals ran interleaved with it, and of a method's own file where it did not. The two end points are apart: when the
next layer may start, and when the next logits are there. The bounds drawn are the bytes of the state over the
host-to-device rate measured around Djinn's result: no method that brings state back can be below its bound.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from workflow.lib.systems import RESUME_METHODS
from workflow.plots import style
from workflow.plots.load import ResultFile, certificate_of, read_folder, shown_from

WHOLE, BOUNDARY = "S", "A"
STATES = (WHOLE, BOUNDARY)
METRICS = ("ready_ms", "next_logits_ms", "next_token_ms")
BOUNDS = {WHOLE: ":", BOUNDARY: "-."}
MARKERS = dict(zip(RESUME_METHODS, "osv^Dp", strict=False))


def collect(results: list[ResultFile]) -> pd.DataFrame:
    """The numbers drawn: by method, state set and layer; a method without numbers keeps a row with its status."""
    rows = []
    for method, file in shown_from(results).items():
        head = {"method": method, "status": file.status, "file": file.path.name}
        drawn = [
            row | head | {"metric": metric}
            for metric in (*METRICS, "state_bytes")
            for row in summaries(file, metric, method)
        ]
        rows += drawn or [head]
    columns = ["method", "status", "file", "metric", "unit", "state", "layer", "median", "ci95_low", "ci95_high", "n"]
    return pd.DataFrame(rows).reindex(columns=columns)


def summaries(file: ResultFile, metric: str, method: str) -> list[dict]:
    """A row per state set and layer, of the rows of one method in a file."""
    if not file.ok:
        return []
    whose = {} if file.system == method else {"method": method}
    found = file.select(metric, whose)
    rows = []
    for state in STATES:
        layers = found[found["state"] == state]["layer"] if {"state", "layer"} <= set(found.columns) else []
        for layer in [*sorted(set(pd.Series(layers, dtype=float).dropna())), None]:
            summary = file.summary(metric, whose | {"state": state, "layer": layer})
            if summary:
                names = ("median", "ci95_low", "ci95_high", "n")
                unit = found["unit"].iloc[0]
                rows.append({"state": state, "layer": layer, "unit": unit} | {name: summary[name] for name in names})
    return rows


def lines(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    """One end point: a line per method, solid for the whole session, dashed for the activation alone."""
    for method in RESUME_METHODS:
        for state in STATES:
            rows = table[(table["metric"] == metric) & (table["method"] == method) & (table["state"] == state)]
            rows = rows[rows["layer"].notna()].sort_values("layer")
            if rows.empty or (state == BOUNDARY and metric != "ready_ms"):
                continue
            axes.errorbar(
                rows["layer"],
                rows["median"],
                yerr=(rows["median"] - rows["ci95_low"], rows["ci95_high"] - rows["median"]),
                color=style.colour(method),
                linestyle="-" if state == WHOLE else (0, (3, 1.5)),
                marker=MARKERS.get(method, "o"),
                markersize=3.2,
                markerfacecolor=style.colour(method) if state == WHOLE else "white",
                elinewidth=0.7,
                linewidth=1.6 if method == "djinn" else 1,
                zorder=4 if method == "djinn" else 2,
            )
    axes.set_xlabel("layers done before the pause")
    depths = sorted(set(table["layer"].dropna()))
    axes.set_xticks(depths, [f"{depth:g}" for depth in depths])


def bound(axes: Axes, table: pd.DataFrame, djinn: ResultFile, state: str, source: str) -> None:
    """The bytes of a state set over the rate of the link, in milliseconds."""
    rate = djinn.limit("h2d_gbps")
    rows = table[(table["metric"] == "state_bytes") & (table["method"] == source) & (table["state"] == state)]
    rows = rows[rows["layer"].notna()].sort_values("layer")
    if rate is None or rows.empty:
        return
    milliseconds = rows["median"] / (rate * 1e9) * 1e3
    axes.plot(rows["layer"], milliseconds, color=style.INK, linewidth=0.9, linestyle=BOUNDS[state], zorder=1)


def next_token(axes: Axes, table: pd.DataFrame, results: list[ResultFile]) -> None:
    """From a finished prefill: resume to the next token's logits, a bar per method."""
    axes.set_yticks(range(len(results)), [style.label(result.system) for result in results])
    axes.tick_params(axis="y", length=0, labelsize=6)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlabel("next token (ms)")
    rows = table[(table["metric"] == "next_token_ms") & (table["state"] == WHOLE)].set_index("method")
    for place, result in enumerate(results):
        if result.system not in rows.index:
            words = style.outcome(result) if not result.ok else "not measured"
            at = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 6, "style": "italic"}
            axes.text(0.01, place, words, color=style.PALE, **at)
            continue
        row = rows.loc[result.system]
        spread = [[row["median"] - row["ci95_low"]], [row["ci95_high"] - row["median"]]]
        hue = style.colour(result.system)
        axes.barh(place, row["median"], height=0.66, color=hue, xerr=spread, error_kw={"elinewidth": 0.7})
        beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
        axes.annotate(style.short(row["median"]), (row["ci95_high"], place), color=style.INK, **beside)
    if len(rows):
        axes.set_xlim(0, 1.35 * rows["ci95_high"].max())


def draw(results_dir: Path, out: Path, csv: Path) -> None:
    """Draw `{results_dir}/resume/*.json` into `out`, and the numbers into `csv`.

    Raises:
        ResultError: a file is missing, or the files may not be compared.
    """
    style.use_style()
    results = read_folder(results_dir / "resume", RESUME_METHODS)
    certificate = certificate_of(results_dir, "resume")
    table = collect(results)
    djinn = next(result for result in results if result.system == "djinn")
    fig, (ready, logits, token) = plt.subplots(1, 3, figsize=(style.PAGE_IN, 2.95), width_ratios=(1, 1, 0.9))
    fig.subplots_adjust(left=0.078, right=0.99, top=0.763, bottom=0.195, wspace=0.2)
    lines(ready, table, "ready_ms")
    ready.set_yscale("log", nonpositive="clip")
    ready.yaxis.set_major_formatter("{x:g}")
    ready.set_ylabel("time (ms)")
    bound(ready, table, djinn, WHOLE, "djinn")
    bound(ready, table, djinn, BOUNDARY, "manual_offload_pinned")
    lines(logits, table, "next_logits_ms")
    logits.set_ylim(bottom=0)
    bound(logits, table, djinn, WHOLE, "djinn")
    next_token(token, table, results)
    box = token.get_position()
    token.set_position([box.x0 + 0.12, box.y0, box.width - 0.12, box.height])
    style.panel(ready, "a", "the next layer may start")
    style.panel(logits, "b", "the next logits are there")
    token.set_title("(c) the next token", pad=5, x=-0.4)
    legend(fig, results, table)
    style.note(fig, f"rows {style.runs_line(shown_from(results))}")
    style.finish(fig, results, certificate, [*(result.path for result in results), certificate.path])
    style.write(fig, out, table, csv)


def legend(fig: plt.Figure, results: list[ResultFile], table: pd.DataFrame) -> None:
    """One legend for all panels; a method whose own run gave no numbers is named with its outcome."""
    handles = []
    drawn = set(table[table["median"].notna()]["method"])
    for result in results:
        alone = "its own run: " if result.system in drawn else ""
        words = style.label(result.system) + ("" if result.ok else f" ({alone}{style.outcome(result)})")
        marker = MARKERS.get(result.system, "o")
        handles.append(
            plt.Line2D([], [], color=style.colour(result.system), marker=marker, markersize=3.2, label=words)
        )
    dashed = {"color": style.PALE, "linestyle": (0, (3, 1.5)), "marker": "o", "markersize": 3.2}
    handles.append(plt.Line2D([], [], markerfacecolor="white", label="activation alone", **dashed))
    for state, words in ((WHOLE, "link bound, whole state"), (BOUNDARY, "link bound, activation")):
        handles.append(plt.Line2D([], [], color=style.INK, linewidth=0.9, linestyle=BOUNDS[state], label=words))
    fig.legend(
        handles=handles, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.0), columnspacing=1.1, handlelength=2.2
    )


if __name__ == "__main__":
    sys.exit(style.command("fig7", "Draw figure 7, resume latency, from a run's result files.", draw))
