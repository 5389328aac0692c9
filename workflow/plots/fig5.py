"""Figure 5: streaming a model larger than its memory, against the rate of the link.

The two groups, nothing resident and cap filled, are drawn on axes of their own: a system that may keep layers on the
device is never put in one ratio with a system that may not. Each mark is the median with its bootstrap interval; each
dark tick is the host-to-device rate measured around that very result. The effective rate is over the parameter bytes
that a pass needs: where they cross the link losslessly coded, it may pass the tick, while the link's own rate may not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from workflow.lib.systems import STREAMING_GROUPS, STREAMING_SYSTEMS
from workflow.plots import style
from workflow.plots.load import ResultFile, certificate_of, read_folder

METRICS = (
    ("effective_gbps", "GB/s", "parameters a second (GB/s)", "effective rate"),
    ("pass_s", "s", "time of a pass (s)", "a forward pass"),
    ("ttft_s", "s", "time to first token (s)", "the first token"),
)
LETTERS = "abcd"


def chunk_bytes(result: ResultFile) -> int | None:
    value = result.config.get("chunk_bytes")
    if isinstance(value, Mapping):
        value = value.get(result.system)
    return int(value) if isinstance(value, int | float) else None


def collect(results: dict[str, ResultFile]) -> pd.DataFrame:
    """The numbers drawn: a row for each system and metric; a system without a number keeps its row and its status."""
    rows = []
    for group, systems in STREAMING_GROUPS.items():
        for system in systems:
            result = results[system]
            for metric, unit, _, _ in (*METRICS, ("link_gbps", "GB/s", "", "")):
                summary = result.summary(metric) if result.ok else None
                row = {"group": group, "system": system, "status": result.status, "metric": metric, "unit": unit}
                row["median"] = summary["median"] if summary else None
                for name in ("ci95_low", "ci95_high", "n"):
                    row[name] = summary[name] if summary else None
                row["h2d_gbps"] = result.limit("h2d_gbps")
                row["chunk_bytes"] = chunk_bytes(result) if system.startswith("djinn_chunk") else None
                rows.append(row)
    return pd.DataFrame(rows)


def bars(axes: Axes, rows: pd.DataFrame, axis_label: str, *, names: bool) -> None:
    """One metric of one group: a bar per system from the top down, its number beside it, or its outcome."""
    axes.set_xlabel(axis_label)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)))
    labels = [
        style.label(row.system, row.chunk_bytes if pd.notna(row.chunk_bytes) else None) for row in rows.itertuples()
    ]
    axes.set_yticklabels(labels if names else [])
    axes.tick_params(axis="y", length=0)
    for place, row in enumerate(rows.itertuples()):
        if pd.isna(row.median):
            words = row.status.replace("_", " ") if row.status != "ok" else "not measured"
            at = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left"}
            axes.text(0, place, f" {words}", color=style.PALE, fontsize=6, style="italic", **at)
            continue
        spread = [[row.median - row.ci95_low], [row.ci95_high - row.median]]
        hue = style.colour(row.system)
        reach = row.ci95_high
        if row.unit == "s":
            axes.errorbar(row.median, place, xerr=spread, fmt="o", markersize=4, color=hue, elinewidth=0.8)
            axes.axhline(place, color="0.92", linewidth=0.5, zorder=0)
        else:
            axes.barh(place, row.median, height=0.68, color=hue, xerr=spread, error_kw={"elinewidth": 0.7})
            if pd.notna(row.h2d_gbps):
                axes.plot([row.h2d_gbps] * 2, [place - 0.46, place + 0.46], color=style.INK, linewidth=1)
                reach = max(reach, row.h2d_gbps) if row.median > 0.7 * row.h2d_gbps else reach
        axes.annotate(
            style.short(row.median),
            (reach, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            fontsize=6,
            color=style.INK,
        )


def share_axis(pair: list[Axes], *, logarithmic: bool, values: pd.Series) -> None:
    """The same scale above and below: from zero for rates, decades for times, with room for the numbers."""
    for axes in pair:
        if logarithmic and len(values):
            axes.set_xscale("log")
            axes.set_xlim(0.7 * values.min(), 5 * values.max())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        elif len(values):
            axes.set_xlim(0, 1.45 * values.max())
        else:
            axes.set_xticks([])
    pair[0].tick_params(axis="x", labelbottom=False)


def sweep(axes: Axes, rows: pd.DataFrame) -> None:
    """Share of the link by the size of a chunk, of the systems that were measured.

    Sizes stand side by side, not to scale: those of a small model lie within a factor of four.
    """
    rows = rows[(rows["metric"] == "link_gbps") & rows["chunk_bytes"].notna() & rows["median"].notna()]
    axes.set_xlabel("size of a chunk")
    axes.set_ylabel("share of the measured H2D rate")
    axes.axhline(1, color=style.INK, linewidth=0.8, linestyle=(0, (4, 2)))
    if not len(rows):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=style.PALE, style="italic")
        return
    rows = rows.sort_values("chunk_bytes")
    share, low, high = (rows[name] / rows["h2d_gbps"] for name in ("median", "ci95_low", "ci95_high"))
    places = range(len(rows))
    axes.errorbar(
        places,
        share,
        yerr=(share - low, high - share),
        marker="o",
        markersize=3.5,
        color=style.colour("djinn"),
        elinewidth=0.7,
    )
    unit, step = style.common_unit(rows["chunk_bytes"].min())
    axes.set_xlabel(f"size of a chunk ({unit})")
    axes.set_xticks(places, [f"{size / step:.3g}" for size in rows["chunk_bytes"]])
    axes.set_ylim(min(0.9, 0.95 * low.min()), max(1.02, 1.02 * high.max()))
    axes.margins(x=0.12)


def draw(results_dir: Path, out: Path, csv: Path) -> None:
    """Draw `{results_dir}/streaming/*.json` into `out`, and the numbers into `csv`.

    Raises:
        ResultError: a file is missing, or the files may not be compared.
    """
    style.use_style()
    results = {result.system: result for result in read_folder(results_dir / "streaming", STREAMING_SYSTEMS)}
    certificate = certificate_of(results_dir, "streaming")
    drawn = collect(results)
    fig = plt.figure(figsize=(style.PAGE_IN, 2.75))
    grid = fig.add_gridspec(
        2,
        4,
        height_ratios=[len(group) for group in STREAMING_GROUPS.values()],
        width_ratios=(1, 1, 1, 1.2),
        left=0.185,
        right=0.99,
        top=0.92,
        bottom=0.21,
        wspace=0.12,
        hspace=0.5,
    )
    for column, (metric, unit, axis_label, title) in enumerate(METRICS):
        pair = []
        for line, group in enumerate(STREAMING_GROUPS):
            axes = fig.add_subplot(grid[line, column])
            rows = drawn[(drawn["group"] == group) & (drawn["metric"] == metric)]
            bars(axes, rows, axis_label if line else "", names=column == 0)
            pair.append(axes)
            if column == 0:
                above = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 6.5}
                axes.text(-0.03, 1.0, group, color=style.INK, fontweight="bold", **above)
        spread = drawn[drawn["metric"] == metric][["ci95_low", "ci95_high"]].stack().dropna()
        share_axis(pair, logarithmic=unit == "s", values=spread)
        style.panel(pair[0], LETTERS[column], title)
    axes = fig.add_subplot(grid[:, 3])
    box = axes.get_position()
    axes.set_position([box.x0 + 0.075, box.y0, box.width - 0.075, box.height])
    sweep(axes, drawn)
    style.panel(axes, LETTERS[3], "chunk sweep")
    fig.text(0.185, 0.04, "| the host-to-device rate measured around each result", fontsize=5, color=style.INK)
    inputs = [result.path for result in results.values()]
    style.finish(fig, list(results.values()), certificate, [*inputs, certificate.path])
    style.write(fig, out, drawn, csv)


if __name__ == "__main__":
    sys.exit(style.command("fig5", "Draw figure 5, streaming, from a run's result files.", draw))
