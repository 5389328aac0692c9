"""How every figure looks and is written: one palette, one set of names, one footer, the same bytes for the same input.

Invariant: a figure says on its face which machine and which input files it shows, and carries a watermark when the
machine is not certified or the device is emulated. Not taken: stamping the time of drawing, since a figure drawn again
from the same files must be the same file.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflow.lib.results import ResultError, write_bytes, write_text
from workflow.plots.load import Certificate, ResultFile, digest, gpu_name, in_words

LABELS = {
    "accelerate_cpu_offload": "Accelerate cpu_offload",
    "accelerate_device_map": "Accelerate device_map",
    "deepspeed_cpu": "DeepSpeed ZeRO-3",
    "deepspeed_cpu_tuned": "DeepSpeed ZeRO-3, tuned",
    "deepspeed_nvme": "DeepSpeed ZeRO-3, NVMe",
    "djinn_ans": "Djinn, losslessly coded",
    "djinn_resident": "Djinn, cap filled",
    "eager": "eager",
    "recompute": "recompute",
    "manual_offload": "manual offload",
    "manual_offload_pageable": "manual offload, pageable",
    "manual_offload_pinned": "manual offload, pinned",
    "manual_offload_overlapped": "manual offload, overlapped",
    "djinn": "Djinn",
    "djinn_uncapped": "Djinn, no cap",
    "djinn_service": "Djinn, service",
}
HUES = (
    ("djinn", "djinn_resident", "djinn_ans"),
    ("eager", "deepspeed_nvme"),
    ("manual_offload_pinned", "manual_offload", "deepspeed_cpu_tuned"),
    ("recompute", "accelerate_cpu_offload", "accelerate_device_map"),
    ("djinn_uncapped", "djinn_service"),
    ("manual_offload_pageable", "deepspeed_cpu"),
    ("manual_offload_overlapped",),
)
INK = "0.25"
PALE = "0.55"
PAGE_IN = 7.0


def use_style() -> None:
    """Type for two columns of print, embedded TrueType fonts, and the colour-blind palette."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "pdf.fonttype": 42,
            "ps.fonttype": 42,
            "font.family": "DejaVu Sans",
            "font.size": 7,
            "axes.labelsize": 7,
            "axes.titlesize": 7.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.labelsize": 6.5,
            "ytick.labelsize": 6.5,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "legend.fontsize": 6.5,
            "legend.frameon": False,
            "lines.linewidth": 1.2,
        }
    )


def label(system: str, chunk_bytes: int | None = None) -> str:
    """The name a reader sees; of a chunked Djinn the size that was used, where the result says it."""
    if system.startswith("djinn_chunk"):
        named = system.removeprefix("djinn_chunk").replace("mib", " MiB")
        return f"Djinn, {size_label(chunk_bytes) if chunk_bytes else named} chunks"
    return LABELS.get(system, in_words(system))


def common_unit(size_bytes: float) -> tuple[str, int]:
    """The largest binary unit that leaves at least one of it, and its bytes."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 2**power:
            return unit, 2**power
    return "B", 1


def size_label(size_bytes: float) -> str:
    unit, step = common_unit(size_bytes)
    return f"{size_bytes / step:.4g} {unit}"


def colour(system: str):
    """The same colour for the same system in every figure."""
    palette = sns.color_palette("colorblind")
    if system.startswith("djinn_chunk"):
        return palette[0]
    for position, names in enumerate(HUES):
        if system in names:
            return palette[position]
    return PALE


def panel(axes: Axes, letter: str, title: str) -> None:
    axes.set_title(f"({letter}) {title}", pad=5)


def outcome(result: ResultFile) -> str:
    """What stands where a number would: the status, in words."""
    return in_words(result.status)


def runs_line(shown: Mapping[str, ResultFile]) -> str:
    """Which of the methods shown ran interleaved with each other and which alone (see `load.shown_from`)."""
    together = [method for method, file in shown.items() if file.ok and file.system != method]
    alone = [label(method) for method, file in shown.items() if file.ok and file.system == method != "djinn"]
    if not together:
        return "of each method's own run"
    return "interleaved in one run" + (f", but in runs of their own: {'; '.join(alone)}" if alone else "")


def machine_line(results: Sequence[ResultFile]) -> str:
    """The machine, the code and the input in a line of the footer."""
    first = results[0]
    kind = first.machine_kind
    name = gpu_name(kind)
    device = name if name else f"emulated device on {kind.get('cpu', 'a CPU')}"
    commit = str(first.data["source"].get("commit") or "unknown")[:10]
    dirty = "+changes" if first.data["source"].get("dirty") else ""
    model = first.config.get("model", "")
    if isinstance(model, dict):
        model = model["path"] or model["name"]
    words = [str(device), str(model), f"run {first.data.get('run', '?')}", f"code {commit}{dirty}"]
    return " · ".join(word for word in words if word)


def note(fig: Figure, words: str) -> None:
    """A remark of its own line, above the footer; leave 0.4 inch below the axes for it and the axis labels."""
    fig.text(0.005, 0.115 / fig.get_figheight(), words, fontsize=5, color=INK, ha="left", va="bottom")


def short(value: float) -> str:
    """Three digits, and no powers of ten where whole numbers say it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def finish(fig: Figure, results: Sequence[ResultFile], certificate: Certificate, inputs: Sequence[Path]) -> None:
    """Footer and watermark. Leave room for both: the layout ends above the lowest 0.2 inch."""
    footer = f"{machine_line(results)} · input {digest(inputs)}"
    fig.text(0.005, 0.004, footer, fontsize=4.5, color=PALE, ha="left", va="bottom")
    marks = []
    if not all(certificate.covers(result) for result in results):
        marks.append("uncertified")
    if any(result.gpu is None for result in results):
        marks.append("emulated device")
    if marks:
        words = " · ".join(marks)
        fig.text(0.5, 0.5, words, fontsize=26, color="0.5", alpha=0.16, ha="center", va="center", rotation=18)


def write(fig: Figure, out: Path, drawn: pd.DataFrame, csv: Path) -> None:
    """The figure and the numbers drawn, each written aside and moved into place.

    The PDF holds no time and no path, so the same input gives the same bytes.
    """
    drawing = io.BytesIO()
    fig.savefig(drawing, format="pdf", metadata={"CreationDate": None, "ModDate": None})
    plt.close(fig)
    write_bytes(out, drawing.getvalue())
    write_text(csv, drawn.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def command(name: str, what: str, draw: Callable[[Path, Path, Path], None]) -> int:
    """The command line that every figure shares: `--results`, `--out`, `--csv`.

    `--out` may be a folder: the figure is then `{name}.pdf` in it, which is how a published set is drawn again.
    """
    parser = argparse.ArgumentParser(prog=f"python -m workflow.plots.{name}", description=what)
    parser.add_argument("--results", type=Path, required=True, help="a run's folder, such as results/cpu")
    parser.add_argument("--out", type=Path, required=True, help="the PDF, or the folder to put it in")
    parser.add_argument("--csv", type=Path, help="the numbers drawn (default: beside the PDF)")
    args = parser.parse_args()
    out = args.out if args.out.suffix else args.out / f"{name}.pdf"
    try:
        draw(args.results, out, args.csv or out.with_suffix(".csv"))
    except ResultError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0
