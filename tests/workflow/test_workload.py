"""Callers of the pressure experiment: everyone gets a turn, and a failure is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

from workflow.scripts.pressure import record_times
from workflow.scripts.pressure_systems.workload import Callers, TurnTimes, run_turns


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
    with Callers(2) as callers:
        cpu_s = run_turns(callers, guests, [2, 0, 3, 1], lambda guest, times: done.append(guest.number))
    assert sorted(done) == [0, 1, 2, 3] and all(len(guest.seen) == 1 for guest in guests)
    assert len({who for guest in guests for who in guest.seen}) == 2
    assert 0 < cpu_s < 10


@pytest.mark.parametrize("cores", [None, 1])
def test_callers_keep_to_neighbouring_cores(cores: int | None) -> None:
    before, seen = os.sched_getaffinity(0), []
    with Callers(2, cores) as callers:
        callers.together(lambda: seen.append(os.sched_getaffinity(0)))
    assert seen == 2 * [before if cores is None else {max(before)}]
    assert os.sched_getaffinity(0) == before, "who starts them stays where he may be"
    with pytest.raises(ValueError, match=f"keep to 9999 cores, and this process may use {len(before)}"):
        Callers(2, 9999)


def test_callers_are_the_same_threads_all_along() -> None:
    """As a server's are: what a thread needs once is not part of what is timed."""
    seen: list[set[int]] = []
    with Callers(2) as callers:
        for _ in range(20):
            threads: set[int] = set()
            callers.together(lambda threads=threads: threads.add(threading.get_ident()))
            seen.append(threads)
    assert all(threads == seen[0] and len(threads) == 2 for threads in seen)


def test_callers_open_sessions_by_turns_and_in_order() -> None:
    """Each has worked lately when turns begin, and nobody arrives beside another."""
    arrived: list[tuple[int, int]] = []
    within = threading.Lock()

    def arrive(number: int) -> None:
        assert within.acquire(blocking=False)
        time.sleep(0.005)
        arrived.append((number, threading.get_ident()))
        within.release()

    with Callers(2) as callers:
        callers.share(range(40), arrive, alone=True)
    assert [number for number, _ in arrived] == list(range(40))
    who = [thread for _, thread in arrived][10:]  # the second one may wake later than the first
    assert len(set(who)) == 2 and all(before != after for before, after in pairwise(who))


def test_an_interrupt_while_sessions_arrive_lets_nobody_else_arrive() -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def arrive(number: int) -> None:
        time.sleep(0.05)
        arrived.append(number)

    try:
        with Callers(2) as callers, pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            callers.share(range(100), arrive, alone=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert 0 < len(arrived) < 50


def test_where_one_cannot_arrive_nobody_else_does() -> None:
    arrived: list[int] = []

    def arrive(number: int) -> None:
        time.sleep(0.005)
        if number == 3:
            raise RuntimeError("no room")
        arrived.append(number)

    with Callers(2) as callers, pytest.raises(RuntimeError, match="no room"):
        callers.share(range(10), arrive, alone=True)
    assert arrived == [0, 1, 2]


def test_where_a_turn_fails_only_those_under_way_are_taken() -> None:
    taken: list[int] = []

    def turn(number: int) -> TurnTimes:
        time.sleep(0.02)
        if number == 3:
            raise RuntimeError("out of turn")
        taken.append(number)
        return TurnTimes(1.0, 2.0)

    guests = [SimpleNamespace(turn=lambda number=number: turn(number)) for number in range(40)]
    with Callers(2) as callers, pytest.raises(RuntimeError, match="out of turn"):
        run_turns(callers, guests, list(range(40)), lambda *_: None)
    assert {0, 1, 2} <= set(taken) and len(taken) < 10


def test_who_is_due_gets_a_turn_and_then_is_due_again() -> None:
    taken: list[tuple[int, float]] = []
    begun_s = time.monotonic()

    def work(number: int) -> float | None:
        taken.append((number, time.monotonic() - begun_s))
        return 0.1 if [each for each, _ in taken].count(number) < 2 else None

    with Callers(2) as callers:
        callers.when_due([(begun_s + 0.05, 1), (begun_s, 0)], work)
    assert [number for number, _ in taken] == [0, 1, 0, 1]
    assert all(at_s >= due_s for (_, at_s), due_s in zip(taken, (0.0, 0.05, 0.1, 0.15), strict=True))


@pytest.mark.timeout(20)
def test_where_a_turn_that_was_due_fails_nobody_waits_for_it() -> None:
    taken: list[int] = []

    def work(number: int) -> float | None:
        if number == 1:
            raise RuntimeError("a turn fails")
        taken.append(number)
        time.sleep(0.05)
        return 0.0

    with Callers(2) as callers, pytest.raises(RuntimeError, match="a turn fails"):
        callers.when_due([(time.monotonic(), number) for number in range(4)], work)
    assert taken == [0]


def test_an_interrupt_ends_what_is_due() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with Callers(2) as callers, pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            callers.when_due([(time.monotonic() + 0.05 * n, n) for n in range(400)], taken.append)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert 0 < len(taken) < 50


def test_a_callers_failure_is_the_experiments() -> None:
    """Once the others have ended: they would go on in a runtime that closes."""
    ended: list[int] = []
    first = iter([True, False])

    def fail() -> None:
        if next(first):
            raise RuntimeError("out of turn")
        time.sleep(0.1)
        ended.append(1)

    with Callers(2) as callers:
        with pytest.raises(RuntimeError, match="out of turn"):
            callers.together(fail)
        assert ended


def test_what_a_turn_took_is_recorded_in_one_order() -> None:
    """A late resume is found again in every metric by its place."""
    kept = []
    exp = SimpleNamespace(result=SimpleNamespace(sample=lambda *sample, **dims: kept.append((*sample, dims))))
    record_times(exp, TurnTimes(2.0, 9.0, 1.5, {"boundary issued": 1.0, "bring-in begun": 0.5}, 6.0, 11.5), {"seed": 3})
    record_times(exp, TurnTimes(1.0, 2.0), {"seed": 3})
    assert kept == [
        ("ready_ms", 2.0, "ms", {"seed": 3}),
        ("next_token_ms", 9.0, "ms", {"seed": 3}),
        ("begun_ms", 1.5, "ms", {"seed": 3}),
        ("issue_ms", 6.0, "ms", {"seed": 3}),
        ("token_ms", 11.5, "ms", {"seed": 3}),
        ("span_ms", 1.0, "ms", {"seed": 3, "span": "boundary issued"}),
        ("span_ms", 0.5, "ms", {"seed": 3, "span": "bring-in begun"}),
        ("ready_ms", 1.0, "ms", {"seed": 3}),
        ("next_token_ms", 2.0, "ms", {"seed": 3}),
    ]
