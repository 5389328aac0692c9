"""The lock of the GPU: one for all checkouts, a second job waits, and nothing else in its place is written to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from djinn_core import machine
from workflow.lib import children, harness
from workflow.lib.gpulock import LockError, gpu_lock

ROOT = Path(__file__).resolve().parents[2]


def test_two_checkouts_meet_at_one_lock_wherever_their_temporary_files_go(tmp_path: Path) -> None:
    code = "from workflow.lib.gpulock import lock_path; print(lock_path('GPU-1'))"
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(home)}, capture_output=True
        ).stdout
        for home in homes
    }
    assert said == {b"/tmp/djinn-GPU-1.lock\n"}


def test_a_second_job_waits_for_the_gpu_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "gpu.lock"
    code = (
        "import sys, pathlib; from workflow.lib.gpulock import gpu_lock\n"
        "with gpu_lock('GPU-1', path=pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with children.child(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with children.child(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
            time.sleep(1.0)
            os.set_blocking(second.stdout.fileno(), False)
            assert not second.stdout.readline()  # it waits
            os.kill(first.pid, signal.SIGKILL)  # a holder that dies lets go
            os.set_blocking(second.stdout.fileno(), True)
            assert second.stdout.readline() == "held\n"
            holder = os.getpid()
            started_s = time.monotonic()
            os.kill(second.pid, signal.SIGSTOP)
            timer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -KILL {second.pid}"])
            with gpu_lock("GPU-1", path=path) as waited_s:
                assert 0.3 < waited_s <= time.monotonic() - started_s
            timer.wait()
    assert f"process {second.pid}" in caplog.text
    assert f"process {holder}" in path.read_text()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "pipe"])
def test_what_is_planted_in_the_locks_place_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "lock", tmp_path / "other"
    if kind != "dangling link":
        other.write_text("precious")
    {
        "link": lambda: path.symlink_to(other),
        "dangling link": lambda: path.symlink_to(other),
        "hard link": lambda: path.hardlink_to(other),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    said = f"{path} cannot be the lock of the GPU: .*; wanted a plain file"
    with pytest.raises(LockError, match=said), gpu_lock("GPU-1", path=path):
        pytest.fail("nothing is held")
    assert not other.exists() if kind == "dangling link" else other.read_text() == "precious"


def test_a_lock_that_cannot_be_taken_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "djinn-GPU-1.lock").symlink_to(tmp_path / "other")
    monkeypatch.setattr("workflow.lib.gpulock.FOLDER", tmp_path)
    monkeypatch.setattr(machine, "gpu_uuid", lambda: "GPU-1")
    with pytest.raises(SystemExit) as end, harness.lock_of("cuda:0"):
        pytest.fail("nothing is held")
    assert end.value.code == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "it is a symbolic link" in caplog.text
