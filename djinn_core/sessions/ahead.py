"""Looking ahead: sessions that are wanted soon come back, and room is kept for the one that comes next.

While some session is off the device, as much is kept free as the largest of them needs, so that a resume finds extents
instead of waiting for evictions. It is made only by unmapping clean sessions that are not expected before those that
are off, and not by the time a prefetch of them would be due again. Nothing is evicted while everyone fits, and since
whole sessions leave, and come back only when someone wants them, nobody goes back and forth.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from djinn_core.sessions.holding import Holding
from djinn_core.sessions.state import SessionState

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager

PREFETCH_LEAD_S = 0.1  # how long before an expected resume its bring-in begins, besides the copy itself
PREFETCH_BYTES_PER_S = 20e9


def look_ahead(pager: Pager) -> None:
    """One look: begin prefetches that are due, and make room when there is too little."""
    for holding in _due(pager):
        pager.prefetch(holding)
    if pager.link.idle:  # room is made between resumes, not beside one
        keep_room(pager)


def _lead_s(holding: Holding) -> float:
    return PREFETCH_LEAD_S + holding.layout.total_bytes / PREFETCH_BYTES_PER_S


def _due(pager: Pager) -> list[Holding]:
    """Sessions whose owners said that they come back soon, the first one first."""
    now_s = time.monotonic()
    with pager.lock:
        due = [
            h
            for h in pager.holdings.values()
            if h.state is SessionState.SWAPPED
            and h.expected_resume_s is not None
            and not h.prefetch_tried
            and h.expected_resume_s - now_s < _lead_s(h)
        ]
    return sorted(due, key=lambda h: h.expected_resume_s)


def keep_room(pager: Pager) -> None:
    """Keep one session's worth of extents free while some session is off the device."""
    with pager.lock:
        away = [h for h in pager.holdings.values() if h.state is SessionState.SWAPPED]
        wanted_bytes = max((_missing_bytes(h) for h in away), default=0)
        if pager.pool.free_bytes >= wanted_bytes:
            return
        soonest_s = min((h.expected_resume_s for h in away if h.expected_resume_s is not None), default=0.0)
        lead_s = max(_lead_s(h) for h in away)
    pager.make_room_clean(wanted_bytes, max(soonest_s, time.monotonic() + 2 * lead_s))


def _missing_bytes(holding: Holding) -> int:
    """What its coming back would take. The pager's lock is held."""
    return sum(block.size_bytes for block in holding.table if block.device is None)
