"""Callers of the pressure experiment: on one core where asked for, everyone gets a turn, and a failure is told."""

from __future__ import annotations

import os
import threading

import pytest

from workflow.scripts.pressure_systems.workload import TurnTimes, on_one_core, run_turns


class Guest:
    """A tenant that notes who gave it its turn, and where."""

    def __init__(self, number: int, together: threading.Barrier) -> None:
        self.number = number
        self.together = together
        self.seen: list[tuple[int, set[int]]] = []

    def turn(self) -> TurnTimes:
        self.together.wait(timeout=10)
        self.seen.append((threading.get_ident(), os.sched_getaffinity(0)))
        return TurnTimes(1.0, 2.0)


def test_callers_share_the_core_and_nobody_else_does() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    pairs = threading.Barrier(2)
    guests = [Guest(number, pairs) for number in range(4)]
    done: list[int] = []
    cpu_s = run_turns(guests, [2, 0, 3, 1], 2, core, lambda guest, times: done.append(guest.number))
    assert sorted(done) == [0, 1, 2, 3]
    assert {where for guest in guests for _, (where,) in guest.seen} == {core}
    assert len({who for guest in guests for who, _ in guest.seen}) == 2
    assert os.sched_getaffinity(0) == before
    assert 0 < cpu_s < 10


def test_without_a_core_callers_are_where_the_system_puts_them() -> None:
    seen: list[set[int]] = []
    on_one_core(2, None, lambda: seen.append(os.sched_getaffinity(0)))
    assert seen == [os.sched_getaffinity(0)] * 2


def test_a_callers_failure_is_the_experiments() -> None:
    def fail() -> None:
        raise RuntimeError("out of turn")

    with pytest.raises(RuntimeError, match="out of turn"):
        on_one_core(2, None, fail)
