"""When a session will be resumed: as its owner said, else as others came back lately."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from numbers import Real
from typing import TYPE_CHECKING

from djinn_core.errors import UsageError

if TYPE_CHECKING:
    from djinn_core.sessions.holding import Holding

FURTHEST_S = 1e9  # thirty years: a clock in seconds still tells milliseconds apart
KEPT = 256  # the latest ones: what callers do changes
LEAST = 8  # fewer are no ground for a guess
ASKED = 64  # of the longer ones, evenly spread: a choice asks for every session
SOONEST_S = 0.001
ON_TIME_S = 0.5  # who is no later than this may come at any moment
OVERTAKEN = 8  # times, and a session may have been given up


def checked(expected_resume_s: float | None) -> float | None:
    """A hint: seconds from now, or None.

    Raises:
        UsageError: it is no number, or none that a clock can tell.
    """
    if expected_resume_s is None:
        return None
    return seconds("expected_resume_s", expected_resume_s, "give seconds from now, or None")


def seconds(name: str, value: float, remedy: str = "give seconds") -> float:
    """What a caller has given as `name`.

    Raises:
        UsageError: it is no number, or none that a clock can tell; the message ends with `remedy`.
    """
    known = isinstance(value, Real) and not isinstance(value, bool)
    if not (known and abs(value) < FURTHEST_S):
        raise UsageError(f"{name} is {value!r}; {remedy}")
    return float(value)


class Lengths:
    """How long the latest waits were that ended. Thread-safe.

    What has lasted for a while is expected to end after the harmonic mean of what was left of those that lasted longer:
    the mean of their urgencies, so that a good chance to be wanted at once counts for more than a small one to be
    wanted late. So sessions that come back in rounds leave once they have had their turn; where pauses have a long
    tail, as people's do, those leave that have been idle for long; and where most come back at once and the others
    late, those that did not. Where too few lasted longer, it is as long again as it has been, and the least recently
    used one leaves first.

    Not taken: the arithmetic mean, which keeps nobody who is most probably back at once if a few stay away for long. A
    guess for each session from its own pauses: most have had none or one.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._latest: deque[float] = deque()
        self._lengths: list[float] = []  # the same, sorted

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, length_s: float) -> None:
        """One more, of `length_s`."""
        with self._mutex:
            self._latest.append(length_s)
            insort(self._lengths, length_s)
            if len(self._latest) > KEPT:
                del self._lengths[bisect_left(self._lengths, self._latest.popleft())]

    def left_s(self, so_far_s: float) -> float:
        """Seconds until one is expected to end that has lasted for `so_far_s`."""
        with self._mutex:
            longer = self._lengths[bisect_right(self._lengths, so_far_s) :]
        if len(longer) < LEAST:
            return so_far_s
        some = longer[:: -(-len(longer) // ASKED)]
        return len(some) / sum([1 / max(length_s - so_far_s, SOONEST_S) for length_s in some])


class Pauses:
    """What the pauses that ended lately say about those that last. Thread-safe; times are of `time.monotonic`.

    Attributes:
        unsaid: of those without a hint, how long they were.
        late: of those with one, by how much it was exceeded.
    """

    def __init__(self) -> None:
        self.unsaid = Lengths()
        self.late = Lengths()
        self._mutex = threading.Lock()
        self._came: deque[tuple[float, float, str]] = deque(maxlen=KEPT)  # when, due when at the earliest, and who

    def ended(self, holding: Holding) -> None:
        """Its pause has ended: the first resume after it was called."""
        paused_s, holding.paused_s = holding.paused_s, None
        hint_s, now_s = holding.expected_resume_s, time.monotonic()
        if paused_s is None:
            return
        due_s = paused_s if hint_s is None else max(hint_s, paused_s)
        with self._mutex:
            self._came.append((now_s, due_s, holding.id))
        if hint_s is None:
            self.unsaid.add(now_s - paused_s)
        elif due_s < now_s:
            self.late.add(now_s - due_s)

    def expected_s(self, holding: Holding) -> float:
        """When it will be resumed: as its owner said, unless it may have been given up; else a guess."""
        hint_s, now_s = holding.expected_resume_s, time.monotonic()
        if hint_s is None:
            return now_s + self.unsaid.left_s(now_s - holding.last_use_s)
        if not self.given_up(holding):
            return hint_s
        return now_s + self.late.left_s(now_s - hint_s)

    def given_up(self, holding: Holding) -> bool:
        """Whether it is late, and others have overtaken it: they came back since it paused, and were due after it.

        Where many wait for their turn all are late, but who is due first comes first. One who comes back often is no
        more than half of those.
        """
        hint_s = holding.expected_resume_s
        if hint_s is None or time.monotonic() - hint_s <= ON_TIME_S:
            return False
        with self._mutex:
            came = [who for when_s, due_s, who in self._came if when_s > holding.last_use_s and due_s > hint_s]
        return sum(min(count, OVERTAKEN // 2) for count in Counter(came).values()) >= OVERTAKEN

    def anytime(self, holding: Holding) -> bool:
        """Whether there is nothing to go by: no hint, and too few pauses yet."""
        return holding.expected_resume_s is None and len(self.unsaid) < LEAST
