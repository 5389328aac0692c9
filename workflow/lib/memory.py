"""Memory of this process and of the device, sampled by a process of its own.

A sampler inside the measured process would stop whenever that process holds the interpreter's lock. The probe is a
child that reads /proc and NVML and ends with its parent. Device memory is the card's total in use minus what was in
use before this process began; on the emulated device it is not applicable, its ledger says what it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from workflow.lib import children

START_TIMEOUT_S = 60.0


class SamplerError(Exception):
    """The probe did not start or ended early; its message is in this one's."""


class MemorySampler:
    """Samples while its `with` block lasts; after it, `rows`, `peak_device_bytes` and `peak_host_bytes` are final.

    Each row: `t_s` (seconds on the monotonic clock, `time.monotonic()`, since the block began), `host_bytes`
    (anonymous and shared memory of this process and its children, the probe left out; pages shared between them are
    counted once, by proportion), `device_bytes` (None without a GPU).
    """

    def __init__(self, *, hz: float = 20.0, gpu: str | None = None, baseline_bytes: int | None = None) -> None:
        self.hz = hz
        self.gpu = gpu
        self.baseline_bytes = baseline_bytes or 0
        self.began_s = 0.0
        self.rows: list[dict[str, Any]] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> MemorySampler:
        command = [sys.executable, "-m", "workflow.lib.memory", "--pid", str(os.getpid()), "--hz", str(self.hz)]
        if self.gpu is not None:
            command += ["--gpu", self.gpu]
        root = Path(__file__).resolve().parents[2]
        self._process = self._cleanup.enter_context(
            children.child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        )
        # the probe's first line says that it has begun: what is measured never runs unwatched
        if not self._process.stdout.readline():
            self._cleanup.close()
            raise SamplerError(f"the memory probe ended before it began: {' '.join(command)}")
        self.began_s = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        text, _ = self._process.communicate(input="stop\n", timeout=START_TIMEOUT_S)
        self._cleanup.close()
        for line in text.splitlines():
            time_s, host_bytes, device_bytes = json.loads(line)
            device_bytes = None if device_bytes is None else device_bytes - self.baseline_bytes
            self.rows.append({"t_s": time_s - self.began_s, "host_bytes": host_bytes, "device_bytes": device_bytes})
        if not self.rows:
            raise SamplerError("the memory probe brought no sample back")

    @property
    def peak_device_bytes(self) -> int | None:
        """The highest `device_bytes`; None without a GPU."""
        seen = [row["device_bytes"] for row in self.rows if row["device_bytes"] is not None]
        return max(seen) if seen else None

    @property
    def peak_host_bytes(self) -> int:
        """The highest `host_bytes`."""
        return max(row["host_bytes"] for row in self.rows)


def host_bytes(pid: int | None = None) -> int:
    """Anonymous and shared memory of a process (this one), in RAM, from its smaps_rollup."""
    return _proportional(os.getpid() if pid is None else pid)


def torch_pinned_outside_bytes() -> int:
    """The peak of torch's own pinned host memory that `host_bytes` does not count, on a GPU machine.

    Whether the kernel counts it depends on the driver, so it is tried: 64 MiB are pinned and looked for.
    """
    import torch

    size_bytes = 64 << 20
    before = host_bytes()
    probe = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    probe.fill_(1)
    seen = host_bytes() - before
    del probe
    if seen > size_bytes // 2:
        return 0
    return int(torch.cuda.host_memory_stats()["allocated_bytes.peak"])


def _proportional(pid: int) -> int:
    """Pss_Anon + Pss_Shmem: shared pages are divided among those who map them, so that a sum counts them once."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
            total += int(line.split()[1]) * 1024
    return total


def _resident(pid: int) -> int:
    """RssAnon + RssShmem: cheap to read, and the same for a process without children."""
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def _host_total(pid: int) -> int:
    """The process and its children, the probe left out."""
    family = [pid, *(children.descendants(pid) - {os.getpid()})]
    total = 0
    for member in family:
        try:
            total += _resident(member) if len(family) == 1 else _proportional(member)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended
    return total


def main() -> None:
    """The probe: one line of JSON per sample on stdout until stdin says anything or closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--hz", type=float, required=True)
    parser.add_argument("--gpu")
    args = parser.parse_args()
    handle = None
    if args.gpu:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(args.gpu)
    rows: list[str] = []
    next_s = time.monotonic()
    print("ready", flush=True)
    while True:
        used = None if handle is None else int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        rows.append(json.dumps([time.monotonic(), _host_total(args.pid), used]))
        next_s += 1 / args.hz
        if select.select([sys.stdin], [], [], max(0.0, next_s - time.monotonic()))[0]:
            break
        next_s = max(next_s, time.monotonic())  # a slow reading is not made up for by a burst
    print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
