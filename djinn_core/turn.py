"""Turns on the device, in order of arrival.

One pass at a time computes on a device; who asked first goes first. `threading.Lock` promises no order, and under
many callers it starves some. Here each waiter owns a lock of its own, and a release hands the turn to the oldest.
The holder may take the turn again (a session holds it around a pass that takes it too); it passes on when the
outermost hold ends.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

from djinn_core.interrupts import Uninterrupted, acquire


class Turn:
    """A fair, re-entrant lock: first come, first served."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def held(self) -> bool:
        """True when the calling thread has the turn."""
        return self._owner == threading.get_ident()

    @property
    def waiting(self) -> int:
        """How many callers wait for the turn now."""
        with self._mutex:
            return len(self._waiting)

    def acquire(self) -> None:
        """Wait for the turn, behind all who asked before. Ctrl-C ends the wait."""
        with Uninterrupted():
            self._acquire()

    def _acquire(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        with self._mutex:
            if self._owner is None:
                self._owner, self._depth = me, 1
                return
            gate = threading.Lock()
            gate.acquire()
            ticket = (me, gate)
            self._waiting.append(ticket)
        try:
            acquire(gate)
        except BaseException:  # an interrupt while waiting: the turn must not be handed to one who left
            self._leave(ticket)
            raise

    def _leave(self, ticket: tuple[int, threading.Lock]) -> None:
        with self._mutex:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                return
        self.release()

    def release(self) -> None:
        """End one hold; the outermost one hands the turn to the oldest waiter.

        Raises:
            RuntimeError: the calling thread does not have the turn.
        """
        if self._owner != threading.get_ident():
            raise RuntimeError("the turn is released by a thread that does not have it")
        if self._depth > 1:
            self._depth -= 1
            return
        with self._mutex:
            if not self._waiting:
                self._owner, self._depth = None, 0
                return
            self._owner, gate = self._waiting.popleft()
            self._depth = 1
        gate.release()

    def __enter__(self) -> Turn:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
