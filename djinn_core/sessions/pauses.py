"""How long pauses have been: a guess for when a session comes back whose owner has said nothing."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate

KEPT = 256  # the latest ones: what callers do changes
LEAST = 8  # fewer are no ground for a guess


class Pauses:
    """The lengths of the latest pauses that ended without a hint, of all sessions. Thread-safe.

    Who has been idle for a while is expected after the mean of what was left of those that lasted longer: its mean
    residual life. So sessions that come back in rounds leave once they have had their turn, and where pauses have a
    long tail, as people's do, those leave that have been idle for long. Where too few lasted longer, it is as long
    again as it has been idle, and the least recently used one leaves first.

    Not taken: a guess for each session from its own pauses. Most have had none or one.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._latest: deque[float] = deque()
        self._lengths: list[float] = []  # the same, sorted
        self._sums: list[float] | None = None  # of each and all shorter ones, when someone has asked since

    def ended(self, length_s: float) -> None:
        """One more pause, of `length_s`."""
        with self._mutex:
            self._latest.append(length_s)
            insort(self._lengths, length_s)
            if len(self._latest) > KEPT:
                del self._lengths[bisect_left(self._lengths, self._latest.popleft())]
            self._sums = None

    def left_s(self, idle_s: float) -> float:
        """Seconds until a session is expected that has been idle for `idle_s`."""
        with self._mutex:
            shorter = bisect_right(self._lengths, idle_s)
            longer = len(self._lengths) - shorter
            if longer < LEAST:
                return idle_s
            if self._sums is None:
                self._sums = list(accumulate(self._lengths, initial=0.0))
            return (self._sums[-1] - self._sums[shorter]) / longer - idle_s
