"""How long pauses have been: a guess for when a session comes back whose owner has said nothing."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import deque

KEPT = 256  # the latest ones: what callers do changes
LEAST = 8  # fewer are no ground for a guess
ASKED = 64  # of the longer ones, evenly spread: a choice asks for every session
SOONEST_S = 0.001


class Pauses:
    """The lengths of the latest pauses that ended without a hint, of all sessions. Thread-safe.

    Who has been idle for a while is expected after the harmonic mean of what was left of those that lasted longer: the
    mean of their urgencies, so that a good chance to be wanted at once counts for more than a small one to be wanted
    late. So sessions that come back in rounds leave once they have had their turn; where pauses have a long tail, as
    people's do, those leave that have been idle for long; and where most come back at once and the others late, those
    that did not. Where too few lasted longer, it is as long again as it has been idle, and the least recently used one
    leaves first.

    Not taken: the arithmetic mean, which keeps nobody who is most probably back at once if a few stay away for long. A
    guess for each session from its own pauses: most have had none or one.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._latest: deque[float] = deque()
        self._lengths: list[float] = []  # the same, sorted

    def ended(self, length_s: float) -> None:
        """One more pause, of `length_s`."""
        with self._mutex:
            self._latest.append(length_s)
            insort(self._lengths, length_s)
            if len(self._latest) > KEPT:
                del self._lengths[bisect_left(self._lengths, self._latest.popleft())]

    def left_s(self, idle_s: float) -> float:
        """Seconds until a session is expected that has been idle for `idle_s`."""
        with self._mutex:
            longer = self._lengths[bisect_right(self._lengths, idle_s) :]
        if len(longer) < LEAST:
            return idle_s
        some = longer[:: -(-len(longer) // ASKED)]
        return len(some) / sum([1 / max(length_s - idle_s, SOONEST_S) for length_s in some])
