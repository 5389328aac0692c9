"""Rates of the link: what a bench measures on a link whose rate is known."""

from __future__ import annotations

import pytest

from djinn_core.certificate import disk_rates
from djinn_core.certify import LinkBench, moved_by
from djinn_core.device import open_device
from djinn_core.errors import ConfigError, DeviceError


def test_bytes_between_two_marks_are_in_proportion() -> None:
    curve = [(1.0, 0), (2.0, 10), (4.0, 30)]
    assert [moved_by(curve, at) for at in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 9.0)] == [0, 0, 5, 10, 20, 30, 30]


def test_both_ways_counts_both_and_only_while_both_run() -> None:
    """Each way is held to 0.02 GB/s on the emulated device, so that both at once make 0.04."""
    device = open_device("cpu", capacity_bytes=8 << 20)
    device.link_gbps = 0.02
    try:
        with LinkBench(device, 1 << 20, pinning="optional") as bench:
            assert bench.h2d_gbps(1 << 20) == pytest.approx(0.02, rel=0.15)
            assert bench.bidirectional_gbps(1 << 20) == pytest.approx(0.04, rel=0.15)
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
