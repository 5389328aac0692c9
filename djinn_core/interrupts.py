"""Ctrl-C where memory moves: it waits for the end of the step under way.

A model's own code may be interrupted anywhere. What claims, maps, copies and counts memory may not: half of such a step
leaves memory that nobody holds, or a lock that nobody gives back. So within `Uninterrupted` a SIGINT is noted, and
handled as ever when the block ends. `Interruptible` lets it through again inside, around a layer; long waits go through
`wait_for`, `acquire` and `taken`, which it ends; and a call that is about to count, or to hand out what it has made,
lets it `act` before, while all can still be undone. A second Ctrl-C is not held off: whoever insists gets out, whatever
stays behind.

Only the main thread is ever interrupted, so everything here does nothing on others. The handler is ours only within the
outermost block. One that C code has set behind Python's back (`faulthandler.register`) is not seen, and not put back.

Not taken: code that is whole after an exception between any two of its lines. We tried; of Ctrl-Cs at 150 places of a
session's life, one in eight still left something behind. Nor a handler that stays: others look whether theirs is there.
"""

from __future__ import annotations

import _signal  # `signal` without its enums, which take ten times as long; every resume would wait for them
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FrameType

SLICE_S = 0.05  # how long a wait goes on after Ctrl-C
SIGINT = int(signal.SIGINT)
Handler = Callable[[int, FrameType | None], object]


class _Main:
    """The main thread's state. One object: to set a class's attributes makes every later look at them slow.

    Attributes:
        ident: the thread's.
        handler: what handles SIGINT outside, while `_note` does so.
        held: SIGINT is held off.
        pressed: one came meanwhile.
    """

    __slots__ = ("handler", "held", "ident", "pressed")

    def __init__(self) -> None:
        self.ident = threading.main_thread().ident
        self.handler: Handler = signal.default_int_handler
        self.held = self.pressed = False


_main = _Main()


def _note(number: int, frame: FrameType | None) -> None:
    if _main.held and not _main.pressed:
        _main.pressed = True
        return
    earlier, _main.pressed = _main.pressed, False
    if earlier:
        _main.handler(number, frame)
    _main.handler(number, frame)


def _handle() -> None:
    """Handle a noted SIGINT, if there is one."""
    if _main.pressed:
        _main.pressed = False
        _main.handler(SIGINT, sys._getframe(1))


def _in_child() -> None:
    """After a fork: the thread that forked is the main one, and the blocks that another was in are not the child's."""
    if _signal.getsignal(SIGINT) is _note:
        _signal.signal(SIGINT, _main.handler)
    _main.ident = get_ident()
    _main.held = _main.pressed = False


os.register_at_fork(after_in_child=_in_child)


class Uninterrupted:
    """Ctrl-C waits for the end of this block. Blocks may lie within each other."""

    __slots__ = ("_handler", "_was")

    def __enter__(self) -> None:
        self._handler, self._was = None, True
        if get_ident() != _main.ident:
            return
        handler = _signal.getsignal(SIGINT)
        if handler is _note:
            self._was, _main.held = _main.held, True
        elif callable(handler):  # else it is ignored, or not Python's to handle
            self._hold_off(handler)

    def _hold_off(self, handler: Handler) -> None:
        _main.handler, _main.pressed, _main.held = handler, False, True
        try:
            _signal.signal(SIGINT, _note)
            self._handler = handler
        except ValueError:  # an interpreter beside the main one: nothing interrupts it
            _main.held = False

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            self._restore(self._handler)
        elif not self._was:
            _main.held = False
            _handle()

    def _restore(self, handler: Handler) -> None:
        try:
            meanwhile = _signal.signal(SIGINT, handler)
            if meanwhile is not _note:  # someone else has set one, for what comes
                _signal.signal(SIGINT, meanwhile)
        finally:
            pressed, _main.pressed, _main.held = _main.pressed, False, False
        if pressed:
            handler(SIGINT, sys._getframe(1))


class Interruptible:
    """Within `Uninterrupted`: here Ctrl-C acts at once. Its caller makes whole what is interrupted."""

    __slots__ = ("_was",)

    def __enter__(self) -> None:
        self._was = _main.held and get_ident() == _main.ident
        if not self._was:
            return
        held = True
        try:
            _main.held = False
            _handle()
            held = False
        finally:
            _main.held = held

    def __exit__(self, *_: object) -> None:
        if self._was:
            _main.held = True


def act() -> None:
    """Here a Ctrl-C that is held off acts: all that has been done can still be undone."""
    if _main.pressed and get_ident() == _main.ident:
        _handle()


def acquire(lock: threading.Lock) -> None:
    """`lock.acquire()`, which a Ctrl-C that is held off ends."""
    if not (_main.held and get_ident() == _main.ident):
        lock.acquire()
        return
    while not lock.acquire(timeout=SLICE_S):
        act()


@contextmanager
def taken(lock: threading.Lock) -> Iterator[None]:
    """`with lock`, and a Ctrl-C that is held off ends the wait for it."""
    acquire(lock)
    try:
        yield
    finally:
        lock.release()


def wait_for(condition: threading.Condition, predicate: Callable[[], object], timeout_s: float | None = None) -> bool:
    """`condition.wait_for`, which a Ctrl-C that is held off ends, with the lock held."""
    if not (_main.held and get_ident() == _main.ident):
        return bool(condition.wait_for(predicate, timeout_s))
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = SLICE_S if end_s is None else min(SLICE_S, end_s - time.monotonic())
        if condition.wait_for(predicate, max(0.0, left_s)):
            return True
        if end_s is not None and time.monotonic() >= end_s:
            return False
        act()
