"""Rates of the link: what a bench measures on a link whose rate is known; and how a certificate is shown."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from djinn_core import cli
from djinn_core.certificate import Certificate, Line, disk_rates
from djinn_core.certify import LinkBench, median_of, moved_by
from djinn_core.device import open_device
from djinn_core.errors import ConfigError, DeviceError


def test_bytes_between_two_marks_are_in_proportion() -> None:
    curve = [(1.0, 0), (2.0, 10), (4.0, 30)]
    assert [moved_by(curve, at) for at in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 9.0)] == [0, 0, 5, 10, 20, 30, 30]


def test_both_ways_counts_both_and_only_while_both_run() -> None:
    """Each way is held to 0.02 GB/s on the emulated device, so that both at once make 0.04; medians, as everywhere."""
    device = open_device("cpu", capacity_bytes=8 << 20)
    device.link_gbps = 0.02
    try:
        with LinkBench(device, 1 << 20, pinning="optional") as bench:
            assert median_of(bench.h2d_gbps, 5, 1 << 20) == pytest.approx(0.02, rel=0.15)
            assert median_of(bench.bidirectional_gbps, 5, 1 << 20) == pytest.approx(0.04, rel=0.15)
    finally:
        device.close()


def test_a_folder_that_is_not_there_is_not_made(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        disk_rates(tmp_path / "mistyped", 1 << 20)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_with_the_folder_and_the_size(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("djinn_core.certificate.os.pwrite", full)
    with pytest.raises(DeviceError, match=r"1,048,576 bytes in .*No space left"):
        disk_rates(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())


LINES = [
    Line("gpu", None, "", "warn", "an NVIDIA GPU; without one a device is emulated, and supports no claim"),
    Line("h2d_gbps", 5.5, "GB/s", "pass", "pass from 47.26, [warn] from 37.8"),
    Line("bidirectional_gbps", 102.0509, "GB/s", "pass", "pass from 66.55, else warn"),
    Line("memlock_bytes", 8388608, "bytes", "warn", "`ulimit -l` unlimited, or at least 8,589,934,592 bytes"),
    Line("memlock_bytes", "unlimited", "bytes", "pass", "`ulimit -l` unlimited, or at least 8,589,934,592 bytes"),
    Line("disk_direct", True, "", "pass", "O_DIRECT works on the file system of ."),
]


def certificate() -> Certificate:
    pinned = [(direction, "pinned") for direction in ("bidirectional", "d2h", "h2d")]
    samples = [
        {"metric": "copy_gbps", "direction": direction, "memory": memory, "size_bytes": 1 << power, "warmup": False}
        | {"value": power + 0.5}
        for direction, memory in [*pinned, ("d2h", "pageable"), ("h2d", "pageable")]
        for power in (16, 32)
    ]
    return Certificate("cpu", {}, {"kind": {"gpu": None, "cpu": "a [small] CPU"}}, LINES, samples)


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_columns_are_aligned_and_only_the_last_is_broken(columns: int) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, no_color=True, color_system=None)
    cli.show(certificate(), console)
    rows = console.file.getvalue().splitlines()
    assert max(map(len, rows)) <= columns
    head = next(row for row in rows if row.startswith("line"))
    verdict, threshold = head.index("verdict"), head.index("threshold")
    first, end = rows.index(head) + 2, rows.index("copies, median GB/s") - 1
    table = rows[first:end]
    assert [row[:threshold].split() for row in table if row[0] != " "] == [
        ["gpu", "-", "warn"],
        ["h2d_gbps", "5.500", "GB/s", "pass"],
        ["bidirectional_gbps", "102.051", "GB/s", "pass"],
        ["memlock_bytes", "8,388,608", "bytes", "warn"],
        ["memlock_bytes", "unlimited", "pass"],
        ["disk_direct", "yes", "pass"],
    ]
    assert all(row[verdict : verdict + 4].strip() in ("pass", "warn", "") for row in table)
    assert all(row[threshold - 2 : threshold] == "  " and row[threshold] != " " for row in table)
    assert rows[-3:-2] + [row.strip() for row in rows[-2:]] == [
        "─" * len(rows[-1]),
        "65,536   16.50     16.50   16.50     16.50          16.50",
        "4,294,967,296   32.50     32.50   32.50     32.50          32.50",
    ]
    assert rows[-5].split() == ["h2d", "h2d", "d2h", "d2h", "bidirectional"]
    assert rows[-4].split() == ["bytes", "pinned", "pageable", "pinned", "pageable", "pinned"]


def test_without_a_terminal_each_line_is_one_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "measure", lambda *_: certificate())
    assert cli.main(["certify", "--device", "cpu"]) == 0
    rows = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == "no GPU, a [small] CPU: warn"
    for row, line in zip(rows[4:], LINES, strict=False):
        assert row.startswith(line.name) and row.endswith(f"  {line.verdict}     {line.threshold}")
    assert not any("\x1b" in row for row in rows)


def test_the_command_says_its_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert (left.value.code, capsys.readouterr().out) == (0, f"djinn {project['version']}\n")
