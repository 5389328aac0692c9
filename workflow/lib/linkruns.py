"""Runs of one result, each between two looks at the link of its own.

A result that takes minutes meets a link that other work on the host moves for a while. So each run is held against the
link just before and just behind it. Where a rate that decides moved by more than is allowed, what the run timed is
flagged `drifted`: figures, summaries and claims leave it out, and the file keeps it, as it does warm-ups. What it
counted stays.

Invariant: whether a run counts depends on the looks alone, never on what it measured.
Not taken: to repeat a run until the link stands still, which may be never; to correct times for the link's rate, which
they follow in no known way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from workflow.lib import limits
from workflow.lib.harness import Experiment
from workflow.lib.results import COUNTED, DRIFTED

Rates = dict[str, float | None]


class LinkRuns:
    """Looks at the link at the beginning, and behind each run.

    Args:
        needed: with fewer runs whose link stood still the result is inconclusive; 0 leaves it to the claims.
    """

    def __init__(self, exp: Experiment, needed: int) -> None:
        self._exp = exp
        self._needed = needed
        self._link = exp.result.limits.setdefault("runs", [])
        self._calm = self._all = 0

    def __enter__(self) -> LinkRuns:
        self._before = self._exp.link_rates()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None and self._calm < self._needed:
            allowed = self._exp.config["machine"]["limits"]["drift_allowed"]
            reason = f"{DRIFTED}: of {self._all} runs {self._calm} moved by no more than {allowed:.0%}"
            self._exp.result.fail("inconclusive", f"{reason}; {self._needed} are needed")

    @contextmanager
    def run(self, **dims: Any) -> Iterator[Callable[[], Rates]]:
        """One run; `dims` name it. The body may call what it gets, once it has done its work, for the rates around it.

        A run that raises is not looked at: the result says what happened.
        """
        exp, result, found = self._exp, self._exp.result, {}
        first = len(result.samples)

        def around() -> Rates:
            if not found:
                after = exp.link_rates()
                machine = exp.config["machine"]
                found.update(limits.bracket(result.experiment, result.system, self._before, after, machine))
                self._before = after
            return {name: found[name] for name in limits.RATES}

        yield around
        around()
        moved = limits.moved(found) if found["drift_decides"] else {}
        if moved:
            for sample in result.samples[first:]:
                if sample["unit"] not in COUNTED:
                    sample["drifted"] = True
            by = ", ".join(f"{name} by {share:.2%}" for name, share in moved.items())
            exp.log.warning("%s: the link drifted around it (%s); what it timed does not count", dims, by)
        self._all += 1
        self._calm += not moved
        looks = {name: found[name] for name in ("before", "after", "drift")}
        self._link.append({**dims, **looks, "drifted": bool(moved)})
