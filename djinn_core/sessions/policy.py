"""Who leaves the device first. The policy chooses; the pager moves.

Kept apart so that a user can replace it: any object with this `choose` will do, as `Runtime(policy=…)`. A choice is a
guess about the future: a bad one costs time, never state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from djinn_core.errors import UsageError

LEAST_S = 0.001  # sooner is now


@dataclass(frozen=True)
class Candidate:
    """A paused session that could leave the device.

    Attributes:
        session: its id.
        device_bytes: what its leaving would free.
        clean: its write-back is complete, so leaving is an unmap.
        last_use_s: when it was last run, on the clock of `now_s`.
        expected_resume_s: when its owner said that it would go on, on the same clock; None when nothing was said.
        guessed_resume_s: when it will, on the same clock: as its owner said, or where it may have been given up or
            nothing was said, going by how late others came lately, or how long their pauses were.
    """

    session: str
    device_bytes: int
    clean: bool
    last_use_s: float
    expected_resume_s: float | None
    guessed_resume_s: float


class Policy(Protocol):
    """Decides the order in which paused sessions leave the device."""

    def choose(self, candidates: Sequence[Candidate], needed_bytes: int, now_s: float) -> Sequence[str]: ...


class ExpectedLast:
    """The session that is expected back last goes first (Belady's rule, with a guess for the future).

    Without a hint, or when it was not kept, the pager's guess counts. Of those expected about as late, within the
    same tenth, the largest goes first, so that fewer have to. Clean sessions go before dirty ones: an unmap costs
    microseconds, a write-back the link's time. Those that had a hint and are expected within `soon_s` go last of all,
    clean or not: they would have to come straight back.
    """

    def __init__(self, soon_s: float = 0.5) -> None:
        self.soon_s = soon_s

    def choose(self, candidates: Sequence[Candidate], needed_bytes: int, now_s: float) -> Sequence[str]:
        """The sessions to evict, in order: enough of them for `needed_bytes`, or all when that is not enough."""

        def rank(candidate: Candidate) -> tuple[bool, bool, float, int, float, str]:
            guess_s = candidate.guessed_resume_s
            soon = candidate.expected_resume_s is not None and guess_s - now_s < self.soon_s
            return (
                soon,
                not soon and not candidate.clean,
                -_about(guess_s - now_s),
                -candidate.device_bytes,
                -guess_s,
                candidate.session,
            )

        order = sorted(candidates, key=rank)
        chosen, freed_bytes = [], 0
        for candidate in order:
            if freed_bytes >= needed_bytes:
                break
            chosen.append(candidate.session)
            freed_bytes += candidate.device_bytes
        return chosen


def _about(lead_s: float) -> float:
    """Which step of a tenth each it falls into, from 1 on; what is due already stays as it is, and so does never."""
    if lead_s <= LEAST_S:
        return min(lead_s, 0.0)
    return lead_s if math.isinf(lead_s) else 1.0 + math.floor(math.log(lead_s / LEAST_S, 1.1))


def chosen_by(policy: Policy, candidates: Sequence[Candidate], needed_bytes: int) -> list[str]:
    """The policy's order, of those that could leave: ids of others, who may have left, are passed over.

    Raises:
        UsageError: the policy raised, or returned something else than ids; nothing was evicted. A user's own code must
            not end the thread that asks it.
    """
    name = type(policy).__name__
    try:
        chosen = policy.choose(candidates, needed_bytes, time.monotonic())
        ids = None if isinstance(chosen, str) else list(chosen)
    except Exception as error:
        raise UsageError(f"the policy {name} raised {type(error).__name__}: {error}; nothing was evicted") from error
    if ids is None or not all(isinstance(each, str) for each in ids):
        raise UsageError(
            f"the policy {name} chose {chosen!r:.200}; it returns the ids of sessions, in order; nothing was evicted"
        )
    able = {candidate.session for candidate in candidates}
    return [each for each in ids if each in able]
