"""One GPU job at a time on this machine, whichever checkout it belongs to.

The lock is an flock on a file named after the GPU's UUID in /tmp; the kernel drops it with the process, however that
ends. Not in `$TMPDIR`: batch systems give each job another one, and two jobs would not meet.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("djinn.gpulock")
WAIT_S = 0.5
FOLDER = Path("/tmp")


def lock_path(uuid: str) -> Path:
    """Where the lock of the GPU with this UUID lies: the same for every checkout and user of the machine."""
    return FOLDER / f"djinn-{uuid}.lock"


@contextmanager
def gpu_lock(uuid: str, *, path: Path | None = None) -> Iterator[float]:
    """Hold the GPU for the block; yields the seconds waited. Says who holds it while waiting."""
    began_s = time.monotonic()
    handle = _open(path or lock_path(uuid))
    try:
        told = False
        while not _try_lock(handle):
            if not told:
                log.warning("GPU %s is in use by %s: waiting", uuid, _holder(handle))
                told = True
            time.sleep(WAIT_S)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} in {os.getcwd()} ({' '.join(sys.argv)})".encode(), 0)
        yield time.monotonic() - began_s
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Opened without O_CREAT first: in a sticky folder the kernel refuses O_CREAT on another user's file."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(handle, 0o666)  # past the umask, for other users of the machine
        return handle


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _holder(handle: int) -> str:
    return os.pread(handle, 4096, 0).decode(errors="replace") or "an unnamed process"
