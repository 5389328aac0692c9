"""dmon's text is read by its header, whatever the driver's columns are, and its absence is said in the file."""

from __future__ import annotations

import stat
import time

import pytest

from workflow.lib import trace

DRIVER_580 = """\
#Time        gpu    pwr  gtemp  mtemp   mclk   pclk  rxpci  txpci
#HH:MM:SS    Idx      W      C      C    MHz    MHz   MB/s   MB/s
 12:00:01      0    121     34     42   3201   1980  58123    210
 12:00:01      1     70     30      -   3201    345      1      0
#Time        gpu    pwr  gtemp  mtemp   mclk   pclk  rxpci  txpci
#HH:MM:SS    Idx      W      C      C    MHz    MHz   MB/s   MB/s
 12:00:02      0    125     35     42   3201   1980  58901    190
"""
OTHER_ORDER = """\
# gpu  txpci  rxpci
# Idx   MB/s   MB/s
    0    210  58123
"""


def test_rows_are_read_by_the_header() -> None:
    rows = trace.parse_dmon(DRIVER_580)
    assert [row["rxpci"] for row in rows] == [58123, 1, 58901]
    assert rows[0]["Time"] == "12:00:01" and rows[1]["mtemp"] is None


def test_another_order_of_columns_gives_the_same_meaning() -> None:
    assert trace.parse_dmon(OTHER_ORDER) == [{"gpu": 0, "txpci": 210, "rxpci": 58123}]


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(trace.TraceError, match="line 3: 2 fields under a header of 3"):
        trace.parse_dmon(OTHER_ORDER.replace("210", ""))


@pytest.mark.parametrize("cut", [1, 4, 12])
def test_a_last_line_that_was_being_written_is_left_out(cut: int) -> None:
    """dmon is ended at any moment; what is left of a number would be taken for one."""
    assert trace.parse_dmon(DRIVER_580[:-cut]) == trace.parse_dmon(DRIVER_580)[:2]


def test_something_that_is_no_number_is_refused() -> None:
    with pytest.raises(trace.TraceError, match="rxpci: 'ERR!' is not a number"):
        trace.parse_dmon(OTHER_ORDER.replace("58123", "ERR!"))


def test_without_nvidia_smi_the_file_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with trace.dmon(tmp_path / "a" / "dmon.csv") as taken:
        assert not taken.running
    text = (tmp_path / "a" / "dmon.csv").read_text()
    assert "nvidia-smi is not on this machine" in text
    assert trace.parse_dmon(text) == []


def until(true) -> None:
    deadline_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def fake_nvidia_smi(tmp_path, monkeypatch, body: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_the_text_is_kept_untouched_and_its_peak_is_of_one_gpu(tmp_path, monkeypatch) -> None:
    said = tmp_path / "said"
    said.write_text(DRIVER_580)
    ready = tmp_path / "ready"
    fake_nvidia_smi(tmp_path, monkeypatch, f"cat {said}\ntouch {ready}\nexec sleep 60\n")
    with trace.dmon(tmp_path / "dmon.csv") as taken:
        until(ready.exists)
    assert (tmp_path / "dmon.csv").read_text() == DRIVER_580
    assert taken.failure is None
    assert (taken.peak("rxpci", 0), taken.peak("rxpci", 1), taken.peak("rxpci", 7)) == (58901, 1, None)


def test_a_monitor_that_ends_early_is_a_failure_with_its_words(tmp_path, monkeypatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo Failed to find any metric to display\nexit 3\n")
    with trace.dmon(tmp_path / "dmon.csv") as taken:
        until(lambda: (tmp_path / "dmon.csv").read_text().endswith("display\n"))
        time.sleep(0.2)  # it has said its last word, and exits
    assert "status 3" in taken.failure and "Failed to find any metric" in taken.failure
    assert taken.peak("rxpci", 0) is None


def test_counters_end_without_begin_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(trace.pynvml, "nvmlGpmSampleAlloc", object)
    with pytest.raises(trace.TraceError, match="without begin"):
        trace.PcieCounters(object()).end()


def test_no_gpu_no_counters() -> None:
    assert trace.PcieCounters.open(None) is None
