"""Where the time of one resume goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from djinn_core.device.base import Device, Event

if TYPE_CHECKING:
    from djinn_core.sessions.bringin import BringIn


class Trace:
    """The marks of one resume.

    Attributes:
        begun_s: when `resume` was called, on the clock of `time.perf_counter`.
        start, ready: timing events around the boundary's copy; `ready` is when the next layer may start.
        job: the bring-in of the KV, None when all of it was there.
        marks: (what had been done, when) on the calling thread, in order.
    """

    def __init__(self, device: Device, begun_s: float) -> None:
        self.begun_s = begun_s
        self.start: Event | None = None
        self.ready = device.event(timing=True)
        self.job: BringIn | None = None
        self.marks: list[tuple[str, float]] = []

    def mark(self, what: str) -> None:
        self.marks.append((what, time.perf_counter()))

    @property
    def restored(self) -> Event:
        """The event after which all of the KV is on the device; recorded once the bring-in has issued everything."""
        return self.ready if self.job is None else self.job.restored

    @property
    def spans(self) -> tuple[tuple[str, float], ...]:
        """(what, milliseconds) on the calling thread; they add up to the whole call."""
        spans, before_s = [], self.begun_s
        for what, at_s in self.marks:
            spans.append((what, (at_s - before_s) * 1e3))
            before_s = at_s
        return tuple(spans)
