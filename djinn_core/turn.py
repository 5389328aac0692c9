"""Turns on the device, in order of arrival.

One pass at a time computes on a device; who asked first goes first. `threading.Lock` promises no order, and under
many callers it starves some. Here each waiter owns a lock of its own, and a release hands the turn to the oldest.
The holder may take the turn again (a session holds it around a pass that takes it too); it passes on when the
outermost hold ends.

Who would hold the turn only to wait for copies is not ready for it: he keeps his place, and others go first meanwhile.

Who resumes a session has a little to issue before it asks for its turn, and what it issues first is the copies that it
will wait for. `Way` lets it: passes and workers give way between two of their steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from djinn_core.interrupts import Uninterrupted, acquire, act

LATELY_S = 0.02  # who generates comes back within a token's time
LOOK_S = 0.002  # how often who is not ready for the turn looks whether it is free
PATIENCE_S = 0.005  # a resume begins within one or two milliseconds


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A place in the queue. `gate` is opened by who hands the turn on; without `ready`, its thread always is."""

    thread: int
    gate: threading.Lock
    ready: Callable[[], bool] | None
    begins: Callable[[], bool] | None

    @property
    def is_ready(self) -> bool:
        return self.ready is None or self.ready()

    @property
    def could_begin(self) -> bool:
        return self.begins is None or self.begins()


class Turn:
    """A fair, re-entrant lock: first come, first served, of those who are ready."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[_Ticket] = deque()  # while nobody has the turn, none of them is ready
        self._owner: int | None = None
        self._depth = 0
        self._last = self._other = (0, -math.inf)  # the last thread that had it, and the last other one: until when

    @property
    def held(self) -> bool:
        """True when the calling thread has the turn."""
        return self._owner == threading.get_ident()

    @property
    def waiting(self) -> int:
        """How many callers wait for the turn now."""
        with self._mutex:
            return len(self._waiting)

    def acquire(self, ready: Callable[[], bool] | None = None, begins: Callable[[], bool] | None = None) -> None:
        """Wait for the turn, behind all who asked before and are ready. Ctrl-C ends the wait.

        Args:
            ready: asked now and then, and quick to answer. Who is not ready gets the turn all the same when nobody else
                uses it: no other thread had it for `LATELY_S`, but for those who wait behind.
            begins: not before this says that he would at least begin, if it is given.
        """
        with Uninterrupted():
            self._acquire(ready, begins)

    @contextmanager
    def when(self, ready: Callable[[], bool] | None = None, begins: Callable[[], bool] | None = None) -> Iterator[None]:
        """`with turn.when(ready)` is `with turn`, as soon as it is `ready`."""
        self.acquire(ready, begins)
        try:
            yield
        finally:
            self.release()

    def _acquire(self, ready: Callable[[], bool] | None, begins: Callable[[], bool] | None) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        with self._mutex:
            ticket = _Ticket(me, threading.Lock(), ready, begins)
            self._waiting.append(ticket)
            if self._owner is None and self._may_take(ticket):
                self._hand_to(ticket)
                return
            ticket.gate.acquire()
        try:
            self._wait(ticket)
        except BaseException:  # an interrupt while waiting: the turn must not be handed to one who left
            self._leave(ticket)
            raise

    def _wait(self, ticket: _Ticket) -> None:
        if ticket.ready is None:
            acquire(ticket.gate)
            return
        while not ticket.gate.acquire(timeout=LOOK_S):
            act()
            with self._mutex:
                if self._owner is None and self._may_take(ticket):
                    self._hand_to(ticket)
                    return

    def _may_take(self, ticket: _Ticket) -> bool:
        """Nobody has the turn. The mutex is held."""
        if ticket.is_ready:
            return True
        first = next((each for each in self._waiting if each.could_begin), None)
        return ticket is first and not self._used_lately(ticket.thread)

    def _used_lately(self, me: int) -> bool:
        """By a thread that does not wait itself, and will come back."""
        thread, until_s = self._last if self._last[0] != me else self._other
        recent = time.perf_counter() - until_s < LATELY_S
        return recent and all(ticket.thread != thread for ticket in self._waiting)

    def _hand_to(self, ticket: _Ticket) -> None:
        self._waiting.remove(ticket)
        self._owner, self._depth = ticket.thread, 1

    def _leave(self, ticket: _Ticket) -> None:
        with self._mutex:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                return
        self.release()

    def release(self) -> None:
        """End one hold; the outermost one hands the turn to the oldest waiter that is ready.

        Raises:
            RuntimeError: the calling thread does not have the turn.
        """
        me = threading.get_ident()
        if self._owner != me:
            raise RuntimeError("the turn is released by a thread that does not have it")
        if self._depth > 1:
            self._depth -= 1
            return
        with self._mutex:
            if self._last[0] != me:
                self._other = self._last
            self._last = (me, time.perf_counter())
            self._owner, self._depth = None, 0
            ticket = next((each for each in self._waiting if each.is_ready), None)
            if ticket is None:
                return
            self._hand_to(ticket)
        ticket.gate.release()

    def __enter__(self) -> Turn:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Way:
    """Who is within goes first; passes ask between layers whether somebody is, and workers between steps, and wait.

    All issue from Python, which runs one thread at a time: without it, what takes a millisecond alone takes the rest
    of a time slice for each time that the interpreter, or the core, goes to the other one. Nobody is waited for longer
    than `PATIENCE_S` from when he came, and who has to wait himself had better `leave`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._since_s: dict[int, float] = {}  # by thread

    @property
    def taken(self) -> bool:
        """Somebody is within."""
        return bool(self._since_s)

    @property
    def shared(self) -> bool:
        """Somebody else than the calling thread is within."""
        return len(self._since_s) > (threading.get_ident() in self._since_s)

    def __enter__(self) -> None:
        with self._changed:
            self._since_s[threading.get_ident()] = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """The calling thread is within no longer; nothing if it was not."""
        with self._changed:
            if self._since_s.pop(threading.get_ident(), None) is not None:
                self._changed.notify_all()

    @staticmethod
    def until_s() -> float:
        """Until when who begins to work now gives way, on the clock of `time.perf_counter`."""
        return time.perf_counter() + PATIENCE_S

    def give(self, until_s: float | None = None) -> None:
        """Return when nobody is within who came less than `PATIENCE_S` ago, after that long, or at `until_s`, at most.

        The limit is for workers: where many resume one after the other, somebody may always be within. Who is within
        himself goes on at once.
        """
        if not self._since_s or threading.get_ident() in self._since_s:
            return
        until_s = self.until_s() if until_s is None else until_s
        with self._changed:
            while (left_s := min(self._latest_s() + PATIENCE_S, until_s) - time.perf_counter()) > 0:
                self._changed.wait(left_s)

    def _latest_s(self) -> float:
        return max(self._since_s.values(), default=-math.inf)
