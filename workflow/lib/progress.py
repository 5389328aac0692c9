"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("djinn.progress")
QUIET_INTERVAL_S = 10.0
T = TypeVar("T")


class Progress:
    """Says how far the work is. On a terminal a bar on stderr; elsewhere a log line at the start, the end, and at most
    every ten seconds in between."""

    def __init__(self, title: str, *, terminal: bool | None = None) -> None:
        self.title = title
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.began_s = time.monotonic()
        self._shown: RichProgress | None = None

    @property
    def elapsed_s(self) -> float:
        """Since this object was made."""
        return time.monotonic() - self.began_s

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, one step each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.task(what, total) as advance:
            for item in items:
                yield item
                advance(1)

    @contextmanager
    def task(self, what: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """A task of `total` units; yields `advance(units, whole)`; `whole`, if given, is the total from then on."""
        began_s = time.monotonic()
        if self.terminal:
            with self._bars() as bars:
                task = bars.add_task(f"{self.title}: {what}", total=total)
                yield lambda units=1, whole=None: bars.update(task, advance=units, total=whole)
                bars.remove_task(task)
        else:
            log.info("%s: %s", self.title, what)
            done = 0.0
            spoke_s = began_s

            def advance(units: float = 1, whole: float | None = None) -> None:
                nonlocal done, spoke_s, total
                done += units
                total = total if whole is None else whole
                if time.monotonic() - spoke_s > QUIET_INTERVAL_S:
                    spoke_s = time.monotonic()
                    log.info("%s: %s: %g of %s", self.title, what, done, "unknown" if total is None else f"{total:g}")

            yield advance
        log.info("%s: %s: done in %.2f s", self.title, what, time.monotonic() - began_s)

    @contextmanager
    def loading(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A task in bytes; yields what `Runtime.load` takes as its `progress`."""
        with self.task(what) as advance:
            seen = 0

            def reached(done_bytes: int, total_bytes: int) -> None:
                nonlocal seen
                advance(done_bytes - seen, total_bytes)
                seen = done_bytes

            yield reached

    @contextmanager
    def _bars(self) -> Iterator[RichProgress]:
        """The one display of this object: a terminal has room for no second one."""
        if self._shown is not None:
            yield self._shown
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as self._shown:
            try:
                yield self._shown
            finally:
                self._shown = None
