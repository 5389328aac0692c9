"""Callers of the pressure experiment: everyone gets a turn, and a failure is told."""

from __future__ import annotations

import threading

import pytest

from workflow.scripts.pressure_systems.workload import TurnTimes, call_together, run_turns


class Guest:
    """A tenant that notes who gave it its turn."""

    def __init__(self, number: int, together: threading.Barrier) -> None:
        self.number = number
        self.together = together
        self.seen: list[int] = []

    def turn(self) -> TurnTimes:
        self.together.wait(timeout=10)
        self.seen.append(threading.get_ident())
        return TurnTimes(1.0, 2.0)


def test_callers_give_everyone_a_turn_two_at_a_time() -> None:
    pairs = threading.Barrier(2)
    guests = [Guest(number, pairs) for number in range(4)]
    done: list[int] = []
    cpu_s = run_turns(guests, [2, 0, 3, 1], 2, lambda guest, times: done.append(guest.number))
    assert sorted(done) == [0, 1, 2, 3] and all(len(guest.seen) == 1 for guest in guests)
    assert len({who for guest in guests for who in guest.seen}) == 2
    assert 0 < cpu_s < 10


def test_a_callers_failure_is_the_experiments() -> None:
    def fail() -> None:
        raise RuntimeError("out of turn")

    with pytest.raises(RuntimeError, match="out of turn"):
        call_together(2, fail)
