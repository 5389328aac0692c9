"""Looking ahead: sessions that are wanted soon come back, and room is kept for those that come next.

While some session is off the device, as much is kept free as one of them needs for each caller that is within a
session's call now, since who pauses one session is about to resume another, and for two where there were several
callers lately, who may come back at once. So a resume finds extents instead of waiting for evictions. How many sessions
are RUNNING says less: one that was just opened is, too. Room is made only by unmapping clean sessions, and none that a
prefetch would bring straight back, or that is expected before the first of those that are off, where all of those have
hints. Nothing is evicted while everyone fits, and since whole sessions leave, and come back only when someone wants
them, nobody goes back and forth.
"""

from __future__ import annotations

import math
import threading
import time
from heapq import nlargest
from operator import itemgetter
from typing import TYPE_CHECKING

from djinn_core.sessions.holding import Holding
from djinn_core.sessions.state import SessionState

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager

PREFETCH_LEAD_S = 0.1  # how long before an expected resume its bring-in begins, besides the copies themselves
HOST_BYTES_PER_S = 20e9  # careful guesses: to be early costs a little memory, to be late a wait
DISK_BYTES_PER_S = 1e9
CALLERS_S = 30.0  # how long a caller who has paused is expected back


class Callers:
    """How many are within a session's call at once. Thread-safe; times are of `time.monotonic`.

    Attributes:
        now: as it was last seen.
    """

    def __init__(self) -> None:
        self.now = 0
        self._spans = (0, 0)  # the most of the span before this one, and of this one; each takes `CALLERS_S`
        self._until_s = -math.inf
        self._mutex = threading.Lock()

    def see(self, count: int, now_s: float) -> None:
        """Take note of `count`."""
        with self._mutex:
            before, most = self._spans
            if now_s > self._until_s:
                before, most = most if now_s <= self._until_s + CALLERS_S else 0, 0
                self._until_s = now_s + CALLERS_S
            self._spans, self.now = (before, max(most, count)), count

    def most(self, now_s: float) -> int:
        """The most that were seen in the last `CALLERS_S`, or in twice as long."""
        with self._mutex:
            return max(self._spans) if now_s <= self._until_s + CALLERS_S else 0


def look_ahead(pager: Pager) -> None:
    """One look: begin prefetches that are due, and make room when there is too little."""
    pager.way.give()
    due, wanted_bytes = _due(pager)
    for holding in due:
        wanted_bytes += holding.missing_bytes
        if not pager.could_free(wanted_bytes, holding.expected_resume_s):
            break  # everyone on the device is expected sooner; a later look tries again
        pager.prefetch(holding)
    if pager.link.quiet:  # room is made between resumes, not beside one
        keep_room(pager)


def _due(pager: Pager) -> tuple[list[Holding], int]:
    """Sessions whose owners said that they come back soon, the first one first; and what others on their way take.

    Each is due so early that those before it have been copied by then. Who may have been given up is not.
    """
    now_s = time.monotonic()
    lead_s, due = PREFETCH_LEAD_S, []
    with pager.lock:
        away = [h for h in pager.holdings.values() if h.state is SessionState.SWAPPED]
        coming_bytes = sum(h.missing_bytes for h in away if h.being_brought)
        told = [
            (h.expected_resume_s, h, _copy_s(h))
            for h in away
            if h.expected_resume_s is not None and not (h.prefetch_failed or h.being_brought)
        ]
    for hint_s, holding, copy_s in sorted(told, key=itemgetter(0)):
        if not pager.pauses.given_up(holding):
            lead_s += copy_s
            if hint_s - now_s < lead_s:
                due.append(holding)
    return due, coming_bytes


def _copy_s(holding: Holding) -> float:
    """How long bringing it in takes, with room to spare. The pager's lock is held."""
    disk_bytes = sum(
        block.disk_valid_bytes
        for block in holding.table
        if block.device is None and block.host_valid_bytes < block.disk_valid_bytes
    )
    return holding.seems_to_miss() / HOST_BYTES_PER_S + disk_bytes / DISK_BYTES_PER_S


def keep_room(pager: Pager) -> None:
    """Keep extents free for the sessions off the device that may be wanted next: one for each caller."""
    callers = max(pager.callers.now, 2 if pager.shared else 1)
    with pager.lock:
        away = [h for h in pager.holdings.values() if h.state is SessionState.SWAPPED]
        if not away:
            return
        largest = nlargest(callers, away, key=Holding.seems_to_miss)
        wanted_bytes = sum(h.seems_to_miss() for h in largest)
        if pager.pool.free_bytes >= wanted_bytes:
            return
        lead_s = PREFETCH_LEAD_S + max(_copy_s(h) for h in away)
    pauses, due_s = pager.pauses, time.monotonic() + 2 * lead_s
    soonest_s = min(0.0 if pauses.anytime(h) else pauses.expected_s(h) for h in away)
    if all(h.expected_resume_s is not None for h in away):
        due_s = max(due_s, soonest_s)
    pager.make_room_clean(wanted_bytes, soonest_s, due_s)
