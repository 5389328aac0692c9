"""One GPU job at a time on this machine, whichever checkout it belongs to.

The lock is an flock on a file named after the GPU's UUID in /tmp; the kernel drops it with the process, however that
ends. Not in `$TMPDIR`: batch systems give each job another one, and two jobs would not meet.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("djinn.gpulock")
WAIT_S = 0.5
WANTED = "wanted a plain file that this user may write: remove what is there, if nobody measures"
FOLDER = Path("/tmp")
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class LockError(Exception):
    """What lies in the lock's place cannot be locked; the message has the path and what to do."""


def lock_path(uuid: str) -> Path:
    """Where the lock of the GPU with this UUID lies: the same for every checkout and user of the machine."""
    return FOLDER / f"djinn-{uuid}.lock"


@contextmanager
def gpu_lock(uuid: str, *, path: Path | None = None) -> Iterator[float]:
    """Hold the GPU for the block; yields the seconds waited. Says who holds it while waiting.

    Raises:
        LockError: the lock's place has something else than a file of its own, or a file that may not be opened.
    """
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
    """A plain file and no link to one: who locks it writes into it, and everybody may put a link into /tmp."""
    try:
        handle = _opened(path)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno)
        raise LockError(f"{path} cannot be the lock of the GPU: {why}; {WANTED}") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise LockError(f"{path} cannot be the lock of the GPU: it is no plain file with one name; {WANTED}")
    return handle


def _opened(path: Path) -> int:
    """Opened without O_CREAT first: in a sticky folder the kernel refuses O_CREAT on another user's file."""
    try:
        return os.open(path, FLAGS)
    except FileNotFoundError:
        handle = os.open(path, FLAGS | os.O_CREAT, 0o666)
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
