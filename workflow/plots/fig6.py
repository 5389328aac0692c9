"""Figure 6: device memory while more sessions are opened than the cap holds.

Against open sessions (the first rounds, while everyone arrives) and against time (the whole run), of the first seed in
each file. The demand is arithmetic on what the result states: the weights and every open session's KV cache. Memory is
NVML's reading on a GPU and the ledger's on the emulated device, never a mixture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workflow.lib.systems import PRESSURE_SYSTEMS
from workflow.plots import style
from workflow.plots.load import ResultFile, certificate_of, in_words, read_folder

METHODS = {
    "eager": ("eager",),
    "manual_offload": ("manual_offload_overlapped", "manual_offload_pinned"),
    "djinn": ("djinn",),
    "djinn_uncapped": ("djinn",),
}
LINES = {"manual_offload_pinned": "--", "djinn_uncapped": (0, (4, 1.5))}
ROUNDS = "rounds"
GB = 1e9


def memory_rows(result: ResultFile, method: str) -> pd.DataFrame:
    """Device memory of one method in its first seed: time_s, sessions, phase, value."""
    source = "nvml" if result.gpu else "ledger"
    rows = result.select("device_bytes", {"method": method, "source": source})
    for name, wanted in (("variant", ROUNDS), ("seed", rows["seed"].min() if "seed" in rows.columns else None)):
        if name in rows.columns:
            rows = rows[rows[name].isna() | (rows[name] == wanted)]
    return rows.sort_values("time_s") if len(rows) else rows


def collect(results: list[ResultFile]) -> pd.DataFrame:
    """The numbers drawn: every sample of every method; one without samples keeps a row with its status."""
    parts = []
    for result in results:
        for method in METHODS[result.system]:
            rows = memory_rows(result, method)
            head = {"system": result.system, "method": method, "status": result.status}
            if rows.empty:
                parts.append(pd.DataFrame([head]))
                continue
            columns = ["time_s", "sessions", "phase", "source", "seed", "value"]
            parts.append(rows.reindex(columns=columns).rename(columns={"value": "device_bytes"}).assign(**head))
    columns = ["system", "method", "status", "source", "seed", "phase", "sessions", "time_s", "device_bytes"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)


def name_of(system: str, method: str) -> str:
    """The colour and label key of a line: the method, but for the system that has no cap."""
    return system if system == "djinn_uncapped" else method


def lines_of(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(key, status, samples) for each line, in the order of the systems."""
    found = []
    for (system, method), rows in table.groupby(["system", "method"], sort=False):
        found.append((name_of(system, method), rows["status"].iloc[0], rows[rows["device_bytes"].notna()]))
    return found


def by_sessions(axes: Axes, table: pd.DataFrame, config: dict) -> None:
    """The highest sample seen while so many sessions were open, and the demand of so many."""
    for key, status, rows in lines_of(table):
        rows = rows[rows["phase"] == "spawn"]
        rows = rows[rows["sessions"] > 0]
        if rows.empty:
            continue
        peaks = rows.groupby("sessions")["device_bytes"].max() / GB
        axes.plot(peaks.index, peaks, color=style.colour(key), linestyle=LINES.get(key, "-"))
        if status == "out_of_memory":
            axes.plot(peaks.index[-1], peaks.iloc[-1], marker="x", color=style.colour(key), markersize=6, mew=1.5)
            beside = {"xytext": (0, 7), "textcoords": "offset points", "ha": "right", "fontsize": 6}
            words = f"{style.label(key)}: out of memory at session {peaks.index[-1]:g}"
            axes.annotate(words, (peaks.index[-1], peaks.iloc[-1]), color=style.INK, **beside)
    axes.set_xlabel("open sessions")
    axes.set_ylabel("device memory (GB)")
    each, weights = config.get("session_kv_bytes"), config.get("weights_bytes")
    if each and weights and config.get("sessions"):
        count = np.arange(config["sessions"] + 1)
        axes.plot(count, (weights + count * each) / GB, color=style.INK, linewidth=0.9, linestyle=":")


def by_time(axes: Axes, table: pd.DataFrame, config: dict) -> None:
    """Every sample of the run; the demand of all sessions as a line."""
    for key, _, rows in lines_of(table):
        if len(rows):
            hue = style.colour(key)
            axes.plot(
                rows["time_s"], rows["device_bytes"] / GB, color=hue, linestyle=LINES.get(key, "-"), linewidth=0.9
            )
    axes.set_xlabel("time (s)")
    if config.get("demand_bytes"):
        axes.axhline(config["demand_bytes"] / GB, color=style.INK, linewidth=0.9, linestyle=":")


def draw(results_dir: Path, out: Path, csv: Path) -> None:
    """Draw `{results_dir}/pressure/*.json` into `out`, and the numbers into `csv`.

    Raises:
        ResultError: a file is missing, or the files may not be compared.
    """
    style.use_style()
    results = read_folder(results_dir / "pressure", PRESSURE_SYSTEMS)
    certificate = certificate_of(results_dir, "pressure")
    table = collect(results)
    djinn = next(result for result in results if result.system == "djinn")
    fig, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE_IN, 2.9), sharey=True)
    fig.subplots_adjust(left=0.07, right=0.99, top=0.815, bottom=0.2, wspace=0.08)
    by_sessions(left, table, dict(djinn.config))
    by_time(right, table, dict(djinn.config))
    for axes in (left, right):
        if djinn.config.get("cap_bytes"):
            axes.axhline(djinn.config["cap_bytes"] / GB, color="0.1", linewidth=0.9)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    style.panel(left, "a", "while sessions arrive")
    style.panel(right, "b", "over the whole run")
    legend(fig, table)
    style.note(fig, not_drawn(table, emulated=djinn.gpu is None))
    style.finish(fig, results, certificate, [*(result.path for result in results), certificate.path])
    style.write(fig, out, table, csv)


def legend(fig: plt.Figure, table: pd.DataFrame) -> None:
    """One legend for both panels, of the lines that are there."""
    handles = []
    for key, status, rows in lines_of(table):
        if len(rows):
            words = style.label(key) + ("" if status == "ok" else f" ({in_words(status)})")
            handles.append(plt.Line2D([], [], color=style.colour(key), linestyle=LINES.get(key, "-"), label=words))
    handles.append(plt.Line2D([], [], color="0.1", linewidth=0.9, label="cap"))
    handles.append(plt.Line2D([], [], color=style.INK, linewidth=0.9, linestyle=":", label="demand"))
    fig.legend(
        handles=handles, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.0), columnspacing=1.4, handlelength=2.2
    )


def not_drawn(table: pd.DataFrame, *, emulated: bool) -> str:
    """Which methods have no line, and why; empty when all have one."""
    untold = "host memory is their device memory" if emulated else "no memory samples"
    reasons: dict[str, list[str]] = {}
    for key, status, rows in lines_of(table):
        if rows.empty:
            reasons.setdefault(untold if status == "ok" else in_words(status), []).append(style.label(key))
    return " · ".join(f"not drawn ({why}): {'; '.join(names)}" for why, names in reasons.items())


if __name__ == "__main__":
    sys.exit(style.command("fig6", "Draw figure 6, memory pressure, from a run's result files.", draw))
