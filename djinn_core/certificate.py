"""A machine's certificate: measured rates, and a verdict per line with the threshold it was held to.

`fail` means that measurements on this machine cannot be trusted, `warn` that they can but the machine is not at its
best. On the emulated device nothing is held to a threshold of a GPU's link, and the first line says so.
"""

from __future__ import annotations

import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from djinn_core import certify, machine
from djinn_core.device import Device
from djinn_core.errors import ConfigError, DeviceError, PinningRefused
from djinn_core.memory.hosttier import HostTier

Verdict = Literal["pass", "warn", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "warn", "fail")
RATES = ("h2d_gbps", "d2h_gbps", "bidirectional_gbps", "peer_gbps")
# what one lane carries after its line code, by PCIe generation, in GB/s
PCIE_LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
DISK_BLOCK_BYTES = 16 << 20
THRESHOLDS = {
    "link_share_pass": 0.75,
    "link_share_warn": 0.60,
    "spread": 0.05,
    "bidirectional_ratio": 1.2,
    "pageable_ratio": 1.5,
    "chunk_share": 0.95,
    "pinning_gbps": 1.0,
    "disk_gbps": 1.0,
    "peer_ratio": 2.0,
}
HARD_THROTTLES = ("HwSlowdown", "HwThermalSlowdown", "SwThermalSlowdown", "HwPowerBrakeSlowdown")


@dataclass(frozen=True)
class Line:
    """One thing looked at: its value, the verdict, and what it takes to pass."""

    name: str
    value: float | int | str | bool | None
    unit: str
    verdict: Verdict
    threshold: str


@dataclass
class Certificate:
    """What was found. `limits` are the four rates; `samples` the copies behind the table by size."""

    device: str
    limits: dict[str, float | None]
    machine: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of the lines."""
        return max((line.verdict for line in self.lines), key=VERDICTS.index, default="fail")

    def median(self, metric: str, direction: str, memory: str, size_bytes: int) -> float | None:
        """The median of one way of copying one size; None where it was not measured."""
        return _median(self.samples, metric=metric, direction=direction, memory=memory, size_bytes=size_bytes)

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"verdict": self.verdict}


def no_gpu(facts: dict[str, Any]) -> Certificate:
    """The certificate of a machine that was to have a GPU and has none."""
    line = Line("gpu", None, "", "fail", "an NVIDIA GPU and its driver; use the cpu preset without one")
    return Certificate("cuda:0", dict.fromkeys(RATES), facts, [line])


def defaults(device_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings for `measure` where there is no preset: (certify, machine)."""
    small = device_name == "cpu"
    sizes = [1 << 16, 1 << 20, 1 << 24] if small else [1 << power for power in range(16, 31, 2)]
    certify_settings = {
        "sizes_bytes": sizes,
        "copies": 10,
        "pin_bytes": 64 << 20 if small else 8 << 30,
        "disk_bytes": 64 << 20 if small else 4 << 30,
        "disk_path": None,
        "thresholds": dict(THRESHOLDS),
    }
    limits = {"copies": 10 if small else 40, "copy_bytes": 1 << 24 if small else 1 << 30}
    return certify_settings, {"pinning": "optional" if small else "required", "limits": limits}


def measure(device_name: str, settings: dict[str, Any], machine_settings: dict[str, Any], folder: Path) -> Certificate:
    """Measure and judge. Takes minutes on a GPU, seconds on the emulated device.

    Args:
        settings: the preset's `certify` section; `machine_settings` its `machine` section.
        folder: where the disk is measured unless the settings name a place.
    """
    uuid = machine.gpu_uuid() if device_name != "cpu" else None
    kind = machine.kind(uuid)
    before = machine.state(uuid)
    facts = {"kind": kind, "id": machine.identity(kind, uuid), "state": {"before": before, "after": before}}
    if device_name != "cpu" and uuid is None:
        return no_gpu(facts)
    limit_bytes, copies = machine_settings["limits"]["copy_bytes"], settings["copies"]
    largest = max(*settings["sizes_bytes"], limit_bytes)
    samples: list[dict[str, Any]] = []
    with certify.opened(device_name, largest) as device:
        pinning = machine_settings["pinning"]
        with certify.LinkBench(device, largest, pinning=pinning) as bench:
            samples += certify.link_table(bench, settings["sizes_bytes"], copies)
            samples += certify.link_table(bench, [limit_bytes], machine_settings["limits"]["copies"], limits=True)
            link = machine.link(uuid)  # while it is awake: an idle link falls back to a lower generation
        certificate = Certificate(device_name, dict.fromkeys(RATES), facts, samples=samples)
        for direction in ("h2d", "d2h", "bidirectional"):
            certificate.limits[f"{direction}_gbps"] = _median(samples, metric="limit_gbps", direction=direction)
        if device.is_gpu:
            certificate.limits["peer_gbps"] = certify.peer_gbps(limit_bytes, copies)
        certificate.lines += _device_lines(device, kind)
        certificate.lines += _link_lines(certificate, settings["thresholds"], kind, link)
        certificate.lines += _host_lines(device, settings, machine_settings, uuid)
    certificate.lines += _disk_lines(Path(settings["disk_path"] or folder), settings)
    facts["state"]["after"] = machine.state(uuid)
    certificate.lines += _health_lines(uuid, facts["state"])
    return certificate


def at_least(name: str, value: float | None, unit: str, good: float, fair: float | None = None) -> Line:
    """A line for a value that should be large: pass from `good`, warn from `fair`, fail below; without `fair`, warn."""
    wanted = f"pass from {good:g}" + (f", warn from {fair:g}" if fair is not None else ", else warn")
    if value is not None and value >= good:
        return Line(name, value, unit, "pass", wanted)
    bad: Verdict = "warn" if fair is None or (value is not None and value >= fair) else "fail"
    return Line(name, value, unit, bad, wanted)


def _device_lines(device: Device, kind: dict[str, Any]) -> Iterator[Line]:
    if not device.is_gpu:
        yield Line("gpu", None, "", "warn", "an NVIDIA GPU; without one a device is emulated, and supports no claim")
    else:
        yield Line("gpu", kind["gpu"], "", "pass", "an NVIDIA GPU")


def _link_lines(
    certificate: Certificate, limits: dict[str, Any], kind: dict[str, Any], link: dict[str, Any]
) -> Iterator[Line]:
    rates, samples = certificate.limits, certificate.samples
    if kind["gpu"] is None:
        for name in RATES[:3]:
            yield Line(name, rates[name], "GB/s", "pass", "none: copies within host memory")
        yield Line("peer_gbps", None, "GB/s", "pass", "measured where there is a second GPU")
        return
    for name, most in (("pcie_generation", kind["pcie_generation"]), ("pcie_width", kind["pcie_width"])):
        now = link[name]
        verdict: Verdict = "warn" if now is None or most is None or now < most else "pass"
        yield Line(name, now, "", verdict, f"the card's best, {most}; read while copies ran")
    lane_gbps = PCIE_LANE_GBPS.get(link["pcie_generation"] or kind["pcie_generation"] or 0)
    for name in ("h2d_gbps", "d2h_gbps"):
        if lane_gbps is None:
            yield Line(name, rates[name], "GB/s", "warn", "the link's generation is unknown, so its best is too")
            continue
        best_gbps = lane_gbps * (link["pcie_width"] or kind["pcie_width"])
        good, fair = limits["link_share_pass"] * best_gbps, limits["link_share_warn"] * best_gbps
        yield at_least(name, rates[name], "GB/s", round(good, 2), round(fair, 2))
    good = round(limits["bidirectional_ratio"] * rates["h2d_gbps"], 2)
    yield at_least("bidirectional_gbps", rates["bidirectional_gbps"], "GB/s", good)
    if rates["peer_gbps"] is None:
        yield Line("peer_gbps", None, "GB/s", "pass", "measured where there is a second GPU with a direct path")
    else:
        yield at_least("peer_gbps", rates["peer_gbps"], "GB/s", round(limits["peer_ratio"] * rates["h2d_gbps"], 2))
    for direction in ("h2d", "d2h"):
        values = sorted(_values(samples, metric="limit_gbps", direction=direction))
        spread = (values[-1] - values[0]) / statistics.median(values)
        verdict = "pass" if spread <= limits["spread"] else "warn"
        yield Line(f"{direction}_spread", spread, "", verdict, f"at most {limits['spread']:g}, (most - least) / median")
    slow = [
        _median(samples, metric="copy_gbps", direction="h2d", memory="pinned", size_bytes=size)
        for size in sorted({row["size_bytes"] for row in samples if row["size_bytes"] >= DISK_BLOCK_BYTES})
    ]
    share = min((rate for rate in slow if rate is not None), default=0.0) / rates["h2d_gbps"]
    yield at_least("h2d_share_from_16mib", share, "of the limit", limits["chunk_share"])
    pageable = _median(samples, metric="copy_gbps", direction="h2d", memory="pageable", size_bytes=max(
        row["size_bytes"] for row in samples if row["metric"] == "copy_gbps"
    ))  # fmt: skip
    yield at_least("pinned_over_pageable", rates["h2d_gbps"] / pageable, "x", limits["pageable_ratio"])


def _host_lines(
    device: Device, settings: dict[str, Any], machine_settings: dict[str, Any], uuid: str | None
) -> Iterator[Line]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    wanted = settings["pin_bytes"]
    unlimited = soft == resource.RLIM_INFINITY
    allowed: int | str = "unlimited" if unlimited else soft
    verdict: Verdict = "pass" if unlimited or soft >= wanted else "warn"
    yield Line("memlock_bytes", allowed, "bytes", verdict, f"`ulimit -l` unlimited, or at least {wanted:,} bytes")
    yield pinning_line(device, wanted, settings["thresholds"]["pinning_gbps"], machine_settings["pinning"])
    node, nodes = machine.gpu_numa_node(uuid), machine.own_numa_nodes()
    near = node is None or node in nodes
    threshold = "this process may run on the GPU's node" + ("" if node is None else f", {node}")
    yield Line("numa_nodes", ",".join(map(str, nodes)), "", "pass" if near else "warn", threshold)


def pinning_line(device: Device, size_bytes: int, good_gbps: float, pinning: certify.Pinning) -> Line:
    """How fast host memory is faulted in and page-locked, in one exact block as weights are."""
    refused: Verdict = "fail" if pinning == "required" else "warn"
    tier = HostTier(device, size_bytes + (1 << 20), pinning="required")
    began_s = time.perf_counter()
    try:
        block = tier.allocate_exact(size_bytes, "certify")
    except PinningRefused as error:
        return Line("pinning_gbps", None, "GB/s", refused, f"page-locking is allowed; it was refused: {error}")
    finally:
        took_s = time.perf_counter() - began_s
    block.free()
    tier.close()
    return at_least("pinning_gbps", size_bytes / took_s / 1e9, "GB/s", good_gbps)


def _disk_lines(folder: Path, settings: dict[str, Any]) -> Iterator[Line]:
    direct, write_gbps, read_gbps = disk_rates(folder, settings["disk_bytes"])
    verdict: Verdict = "pass" if direct else "warn"
    yield Line("disk_direct", direct, "", verdict, f"O_DIRECT works on the file system of {folder}")
    good = settings["thresholds"]["disk_gbps"]
    yield at_least("disk_write_gbps", write_gbps, "GB/s", good)
    yield at_least("disk_read_gbps", read_gbps, "GB/s", good)


def disk_rates(folder: Path, size_bytes: int) -> tuple[bool, float, float]:
    """(past the page cache, write GB/s, read GB/s) of one file of `size_bytes`, in blocks of 16 MiB.

    Raises:
        ConfigError: `folder` is none.
        DeviceError: the file system fails, or is full.
    """
    if not folder.is_dir():
        raise ConfigError(f"the disk cannot be measured at {folder}: no such folder; make it, or name another one")
    try:
        return _disk_rates(folder, size_bytes)
    except OSError as error:
        raise DeviceError(
            f"the disk could not be measured with a file of {size_bytes:,} bytes in {folder}: {error}; make room, or "
            "name another folder"
        ) from error


def _disk_rates(folder: Path, size_bytes: int) -> tuple[bool, float, float]:
    block_bytes = min(DISK_BLOCK_BYTES, size_bytes)
    count = size_bytes // block_bytes
    handle, path = tempfile.mkstemp(dir=folder, prefix=".certify-")
    os.close(handle)
    try:
        direct = True
        try:
            handle = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # the file system has no O_DIRECT: its page cache is measured, and the line says so
            direct, handle = False, os.open(path, os.O_RDWR)
        with mmap.mmap(-1, block_bytes) as block:  # a mapping is aligned as O_DIRECT asks
            block.write(os.urandom(4096) * (block_bytes // 4096))
            began_s = time.perf_counter()
            for index in range(count):
                os.pwrite(handle, block, index * block_bytes)
            os.fsync(handle)
            wrote_s = time.perf_counter() - began_s
            with suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            began_s = time.perf_counter()
            for index in range(count):
                os.preadv(handle, [block], index * block_bytes)
            read_s = time.perf_counter() - began_s
        os.close(handle)
    finally:
        os.unlink(path)
    moved = count * block_bytes / 1e9
    return direct, moved / wrote_s, moved / read_s


def _health_lines(uuid: str | None, states: dict[str, Any]) -> Iterator[Line]:
    if uuid is None:
        return
    mode, errors = machine.ecc(uuid)
    ecc_verdict: Verdict = "fail" if errors else ("pass" if mode else "warn")
    yield Line("ecc_uncorrected", errors, "errors", ecc_verdict, "ECC is on, and none since the driver was loaded")
    reasons = sorted({reason for state in states.values() for reason in state["throttle_reasons"]})
    hard = [reason for reason in reasons if reason in HARD_THROTTLES]
    throttle: Verdict = "fail" if hard else ("warn" if reasons else "pass")
    yield Line("throttling", ", ".join(reasons) or "none", "", throttle, "none; slowed by heat or hardware fails")
    foreign = sorted({one for state in states.values() for one in state["foreign_processes"]})
    yield Line("foreign_processes", ", ".join(foreign) or "none", "", "fail" if foreign else "pass", "none")


def _values(samples: Sequence[dict[str, Any]], **where: Any) -> list[float]:
    return [
        row["value"]
        for row in samples
        if not row["warmup"] and all(row.get(name) == value for name, value in where.items())
    ]


def _median(samples: Sequence[dict[str, Any]], **where: Any) -> float | None:
    values = _values(samples, **where)
    return statistics.median(values) if values else None
