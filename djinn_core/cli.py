"""The `djinn` command.

    djinn certify [--device auto|cpu|cuda:0] [--disk-path FOLDER] [--json]
    djinn --version

It exits 0 when what it did is done, 1 when the certificate's verdict is `fail`, 2 on a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from djinn_core.certificate import Certificate, defaults, measure
from djinn_core.errors import DjinnError
from djinn_core.machine import gpu_uuid

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
# no frame: columns two spaces apart, and a rule below their names
PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
WAYS = ("h2d", "d2h", "bidirectional")
# where no terminal says how wide it is, a row stays on one line, so that it can be searched for and cut
UNWRAPPED_COLUMNS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="djinn", description="GPU memory virtualization for inference.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
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
        if not console.is_terminal:
            console.width = UNWRAPPED_COLUMNS
        show(found, console)
    return 1 if found.verdict == "fail" else 0


def version() -> str:
    """The installed package's version; of a checkout that nobody installed, that."""
    try:
        return metadata.version("djinn-core")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def show(found: Certificate, console: Console) -> None:
    """The certificate as a title and two tables."""
    kind = found.machine["kind"]
    name = kind["gpu"] or f"no GPU, {kind['cpu']}"
    console.print(Text.assemble(f"{name}: ", (found.verdict, COLOURS[found.verdict]), "\n"))
    console.print(lines_table(found))
    if found.samples:
        console.print("\ncopies, median GB/s\n")
        console.print(sizes_table(found))


def lines_table(found: Certificate) -> Table:
    """One row per line: what was found, the verdict, and what it takes to pass."""
    table = Table(**PLAIN)
    table.add_column("line", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("unit", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("threshold")
    for line in found.lines:
        verdict = Text(line.verdict, COLOURS[line.verdict])
        unit = line.unit if isinstance(line.value, float | int) else ""
        table.add_row(line.name, in_words(line.value), unit, verdict, Text(line.threshold))
    return table


def in_words(value: float | int | str | bool | None) -> Text:
    """A line's value, numbers so that they can be compared down a column."""
    if isinstance(value, float):
        return Text(f"{value:.3f}")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    return Text(f"{value:,}" if isinstance(value, int) else "-" if value is None else value)


def sizes_table(found: Certificate) -> Table:
    """Median rate of each way of copying, by size."""
    copies = [row for row in found.samples if row["metric"] == "copy_gbps"]
    measured = {(row["direction"], row["memory"]) for row in copies}
    ways = [way for way in product(WAYS, ("pinned", "pageable")) if way in measured]
    table = Table(**PLAIN)
    table.add_column("bytes", justify="right", no_wrap=True)
    for direction, memory in ways:
        table.add_column(f"{direction}\n{memory}", justify="right", no_wrap=True)
    for size_bytes in sorted({row["size_bytes"] for row in copies}):
        medians = (found.median("copy_gbps", direction, memory, size_bytes) for direction, memory in ways)
        table.add_row(f"{size_bytes:,}", *("-" if rate is None else f"{rate:.2f}" for rate in medians))
    return table


if __name__ == "__main__":
    sys.exit(main())
