"""Ctrl-C in tests: after some time, or at one line of Djinn's own code."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import djinn_core

OURS = str(Path(djinn_core.__file__).parent)


@contextlib.contextmanager
def python_handles_it() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in any program; a test runner may have another wish."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interrupted(after_s: float) -> Iterator[None]:
    """Someone presses Ctrl-C `after_s` seconds from now, unless the block has ended by then."""
    press = threading.Timer(after_s, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    with python_handles_it():
        press.start()
        try:
            yield
        finally:
            press.cancel()


class Lines:
    """Counts the lines of Djinn's code that this thread runs, and presses Ctrl-C before line `at` of them.

    Attributes:
        where: it was pressed.
        on_the_way_out: what the call has made is being handed to its caller there, and may be lost on the way.
    """

    def __init__(self, at: int = 0) -> None:
        self.count = 0
        self.where = ""
        self.on_the_way_out = False
        self._at = at

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        with python_handles_it():
            before = sys.gettrace()
            sys.settrace(self._call)
            try:
                yield
            finally:
                sys.settrace(before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self._at:
                path, line = frame.f_code.co_filename, frame.f_lineno
                self.where = f"{path}:{line}"
                leaves = linecache.getline(path, line).lstrip().startswith(("return", "with ", "undo.pop_all()"))
                self.on_the_way_out = leaves or frame.f_code.co_name in ("__exit__", "_restore")
                signal.raise_signal(signal.SIGINT)
        return self._line
