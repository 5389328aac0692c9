"""A door: threads go through it until it is shut, and who shuts it waits for those within."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from djinn_core.errors import DjinnError, SessionStateError
from djinn_core.interrupts import wait_for

_thread = threading.local()  # `doors`: how many this thread is within, of whatever model or runtime


class Door:
    """Entered around what must not be closed meanwhile; a thread may be within several times, also once it is shut.

    Args:
        refusal: makes the error for who comes when it is shut.
    """

    def __init__(self, refusal: Callable[[], DjinnError]) -> None:
        self._refusal = refusal
        self._changed = threading.Condition()
        self._within: Counter[int] = Counter()  # by thread
        self._shut = 0  # by how many

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._shut and me not in self._within:
                raise self._refusal()
            self._within[me] += 1
            _thread.doors = getattr(_thread, "doors", 0) + 1

    def __exit__(self, *exception: object) -> None:
        me = threading.get_ident()
        with self._changed:
            _thread.doors -= 1
            self._within[me] -= 1
            if not self._within[me]:
                del self._within[me]
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and return when all are out. Ctrl-C ends the wait, and the door is open again.

        Raises:
            SessionStateError: the calling thread is within one.
        """
        refuse_inside()
        with self._changed:
            self._shut += 1
            try:
                wait_for(self._changed, lambda: not self._within)
            except BaseException:
                self._shut -= 1
                raise

    def open(self) -> None:
        """Take one `shut` back."""
        with self._changed:
            self._shut -= 1


def refuse_inside() -> None:
    """Who is within a door, of whatever model or runtime, shuts none: who is within that one may wait for him.

    Raises:
        SessionStateError: the calling thread is within one.
    """
    if getattr(_thread, "doors", 0):
        raise SessionStateError(
            "a pass or a load is under way on this thread, which would close something meanwhile (from a hook, a "
            "callback?); close it after that"
        )
