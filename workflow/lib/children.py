"""Child processes that cannot outlive the experiment, and an experiment that cannot outlive its pipeline.

A child has its own process group and asks the kernel for SIGKILL when its parent dies. An experiment started by
Snakemake watches that process and ends when it is gone: the shell between the two would otherwise keep it alive. The
Snakefile names the process in the environment, since by the time that a job has started its parents may be gone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PIPELINE = "DJINN_PIPELINE"  # process number and start time
PR_SET_PDEATHSIG = 1
GRACE_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run `command` beside the block; at the block's end it gets TERM, then KILL, with all of its own children.

    `options` go to `subprocess.Popen`. Start it from the main thread: the kernel ends it with the thread that made it.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent, **options)
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[Any], grace_s: float = GRACE_S) -> None:
    """End `process` and its group: TERM, then KILL after `grace_s`; returns when it is gone."""
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    _signal_group(process.pid, signal.SIGKILL)  # whatever of the group is left
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def ancestors(pid: int | None = None) -> list[int]:
    """The parents of `pid` (this process), nearest first, without init."""
    chain: list[int] = []
    current = os.getpid() if pid is None else pid
    while current > 1:
        try:
            status = Path(f"/proc/{current}/status").read_text()
        except OSError:
            break
        current = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
        if current > 1:
            chain.append(current)
    return chain


def descendants(pid: int | None = None) -> set[int]:
    """All processes below `pid` (this process)."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            below.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [os.getpid() if pid is None else pid]
    while waiting:
        for one in below.get(waiting.pop(), []):
            found.add(one)
            waiting.append(one)
    return found


def name_pipeline() -> None:
    """This process is the pipeline: what it starts from now on ends with it."""
    os.environ[PIPELINE] = f"{os.getpid()} {_started(os.getpid())}"


def follow_pipeline() -> None:
    """End this process (TERM, and KILL where that does not help) when the pipeline that started it has ended.

    Returns at once, also where no pipeline did.

    Raises:
        SystemExit: it has ended already.
    """
    if PIPELINE not in os.environ:
        return
    pid, started = os.environ[PIPELINE].split()
    try:
        handle = os.pidfd_open(int(pid))
        lives = _started(int(pid)) == started
    except (ProcessLookupError, FileNotFoundError):
        lives = False
    if not lives:
        raise SystemExit("the pipeline that started this has ended: nothing was done; start it again")

    def watch() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="pipeline-watch", daemon=True).start()


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: its number is used again."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def terminate_cleanly() -> None:
    """Turn SIGTERM into SystemExit, so that `finally` and context managers run and children are stopped."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
