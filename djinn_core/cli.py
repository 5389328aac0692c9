"""The `djinn` command.

    djinn certify [--device auto|cpu|cuda:0] [--disk-path FOLDER] [--json]

It exits 0 when what it did is done, 1 when the certificate's verdict is `fail`, 2 on a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from djinn_core.certificate import Certificate, defaults, measure
from djinn_core.errors import DjinnError
from djinn_core.machine import gpu_uuid

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="djinn", description="GPU memory virtualization for inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    certify = commands.add_parser("certify", help="measure this machine's links and say whether to trust them")
    certify.add_argument("--device", choices=("auto", "cpu", "cuda:0"), default="auto")
    certify.add_argument("--disk-path", type=Path, default=Path(), help="the folder whose disk is measured (.)")
    certify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    try:
        return _certify(args)
    except DjinnError as error:
        print(f"djinn {args.command}: {error}", file=sys.stderr)
        return 1


def _certify(args: argparse.Namespace) -> int:
    device = args.device
    if device == "auto":
        device = "cuda:0" if gpu_uuid() is not None else "cpu"
    with Console(stderr=True).status(f"measuring {device}: seconds without a GPU, a few minutes with one"):
        found = measure(device, *defaults(device), args.disk_path)
    if args.json:
        print(json.dumps(found.document(), indent=1))
    else:
        console = Console()
        console.print(lines_table(found))
        console.print(sizes_table(found))
    return 1 if found.verdict == "fail" else 0


def lines_table(found: Certificate) -> Table:
    """One row per line: what was found, the verdict, and what it takes to pass."""
    kind = found.machine["kind"]
    name = kind["gpu"] or f"no GPU, {kind['cpu']}"
    table = Table(title=f"{name}: [{COLOURS[found.verdict]}]{found.verdict}[/]", title_justify="left")
    for column in ("line", "value", "verdict", "threshold"):
        table.add_column(column)
    for line in found.lines:
        value = f"{line.value:.4g}" if isinstance(line.value, float) else "-" if line.value is None else str(line.value)
        verdict = f"[{COLOURS[line.verdict]}]{line.verdict}[/]"
        table.add_row(line.name, f"{value} {line.unit}".strip(), verdict, line.threshold)
    return table


def sizes_table(found: Certificate) -> Table:
    """Median rate of each way of copying, by size."""
    ways = sorted({(row["direction"], row["memory"]) for row in found.samples if row["metric"] == "copy_gbps"})
    table = Table(title="copies, median GB/s", title_justify="left")
    table.add_column("bytes", justify="right")
    for direction, memory in ways:
        table.add_column(f"{direction} {memory}", justify="right")
    for size_bytes in sorted({row["size_bytes"] for row in found.samples if row["metric"] == "copy_gbps"}):
        medians = (found.median("copy_gbps", direction, memory, size_bytes) for direction, memory in ways)
        table.add_row(f"{size_bytes:,}", *("-" if rate is None else f"{rate:.2f}" for rate in medians))
    return table


if __name__ == "__main__":
    sys.exit(main())
