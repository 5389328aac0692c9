"""Work on long byte ranges in fixed pieces, on threads.

The pieces depend on the length alone, never on the number of threads, so whatever is computed per piece comes out the
same on every machine. The work releases the interpreter lock (preadv, NumPy loops), which is why threads suffice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None


def host_threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _pool() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(host_threads(), thread_name_prefix="djinn-weights")
        return _executor


def each_piece(length: int, piece: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for every piece of `range(length)`, and return when all are done.

    One piece runs on the calling thread. After a failure no further piece is begun, and the first error is raised once
    the pieces under way have ended, so that nothing still writes when the caller sees it.
    """
    begins = range(0, length, piece)
    if len(begins) <= 1:
        if length:
            work(0, length)
        return
    failed = threading.Event()

    def guarded(begin: int) -> None:
        if failed.is_set():
            return
        try:
            work(begin, min(begin + piece, length))
        except BaseException:
            failed.set()
            raise

    futures = [_pool().submit(guarded, begin) for begin in begins]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
