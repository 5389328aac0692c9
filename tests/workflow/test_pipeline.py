"""The pipeline killed in the middle: nothing left behind, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from workflow.lib.children import child
from workflow.lib.stalelock import remove_stale_locks

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = f"""
import sys
from pathlib import Path

sys.path.insert(0, "{ROOT}")
from workflow.lib.stalelock import remove_stale_locks

remove_stale_locks(Path.cwd())

rule slow:
    output: "done"
    shell: "test -e second || {{{{ echo running; touch second; sleep 100; }}}}; touch {{output}}"
"""


def snakemake(folder: Path) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete", "--directory", str(folder)]


def test_a_killed_pipeline_is_taken_up_again(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = snakemake(tmp_path)
    with child(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout.readline() == "running\n"
        assert list((tmp_path / ".snakemake" / "locks").iterdir())
        refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "cannot be locked" in refused.stderr  # its owner lives: the lock holds
        os.kill(first.pid, signal.SIGKILL)
    assert list((tmp_path / ".snakemake" / "locks").iterdir())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "done").exists()


def test_without_a_lock_nothing_is_removed(tmp_path: Path) -> None:
    assert remove_stale_locks(tmp_path) == []
