"""Where the time of one resume goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from djinn_core.device.base import Device, Event, Stream

if TYPE_CHECKING:
    from djinn_core.sessions.bringin import BringIn


class Trace:
    """The marks of one resume.

    Attributes:
        begun_s: when `resume` was called, on the clock of `time.perf_counter`.
        ready: timing event behind the boundary's copy; where nothing had to be copied, set by `there`.
        job: the bring-in of the KV, None when all of it was there.
        found_resident: all of the KV was on the device when `resume` was called, and no copy of it was under way.
        marks: (what had been done, when) on the calling thread, in order.
    """

    def __init__(self, begun_s: float, ready: Event | None = None) -> None:
        self.begun_s = begun_s
        self.ready = ready
        self.job: BringIn | None = None
        self.found_resident = False
        self._first_layer: int | None = None
        self._jobs: tuple[BringIn, ...] = ()
        self.marks: list[tuple[str, float]] = []

    def there(self, device: Device, stream: Stream) -> None:
        """No boundary had to be copied; what `stream` has is all that there is to wait for."""
        self.ready = device.event(timing=True)
        self.ready.record(stream)

    def mark(self, what: str) -> None:
        self.marks.append((what, time.perf_counter()))

    def brought(self, job: BringIn | None, jobs: Sequence[BringIn], first_layer: int) -> None:
        """`resume` needed `job`, and the pass that begins at `first_layer` waits for all `jobs`."""
        self.job, self.found_resident = job, job is None
        self.marks += [] if job is None else job.marks
        self._jobs, self._first_layer = tuple(jobs), first_layer

    @property
    def gates(self) -> tuple[Event, ...]:
        """The timing events that the first layer to run waits for: the boundary, and its own KV if that was copied in.

        Whole once that layer has been issued, which it is when a resume in a stopped pass returns; between tokens, when
        the next pass has begun.
        """
        first = self._first_layer
        waited = [job.arrival[first] for job in self._jobs if first is not None and first < len(job.arrival)]
        return (self.ready, *(event for event in waited if event is not None))

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
