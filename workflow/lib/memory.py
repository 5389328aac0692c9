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
import sys
import time
from pathlib import Path
from typing import Any

from workflow.lib import children


class MemorySampler:
    """Samples while its `with` block lasts; after it, `rows`, `peak_device_bytes` and `peak_host_bytes` are final.

    Each row: `t_s` (monotonic seconds since the block began), `host_bytes` (anonymous and shared memory of this
    process and its children), `device_bytes` (None without a GPU).
    """

    def __init__(self, *, hz: float = 20.0, gpu: str | None = None, baseline_bytes: int | None = None) -> None:
        self.hz = hz
        self.gpu = gpu
        self.baseline_bytes = baseline_bytes or 0
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> MemorySampler:
        raise NotImplementedError

    def __exit__(self, *exc: object) -> None:
        raise NotImplementedError

    @property
    def peak_device_bytes(self) -> int | None:
        """The highest `device_bytes`; None without a GPU."""
        seen = [row["device_bytes"] for row in self.rows if row["device_bytes"] is not None]
        return max(seen) if seen else None

    @property
    def peak_host_bytes(self) -> int:
        """The highest `host_bytes`."""
        return max(row["host_bytes"] for row in self.rows)
