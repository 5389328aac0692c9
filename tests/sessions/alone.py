"""Code that runs in a process of its own: what is wrong in it ends that process, not the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def alone(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run `code`, with `folder` as its argument; a crash is its return code."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
