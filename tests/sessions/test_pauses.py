"""The guess for when a session comes back, and what it is good for."""

from __future__ import annotations

import heapq
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.sessions import Candidate, ExpectedLast
from djinn_core.sessions.pauses import ASKED, KEPT, LEAST, Pauses
from tests.sessions.oracle import prompt
from tests.sessions.rigs import MakeRig


def left_of(lengths: list[float], idle_s: float) -> float:
    """Said again, simply."""
    longer = [length - idle_s for length in lengths[-KEPT:] if length > idle_s]
    return statistics.harmonic_mean(longer) if len(longer) >= LEAST else idle_s


def test_the_guess_is_the_harmonic_mean_of_what_was_left_of_longer_pauses() -> None:
    draw, pauses, lengths = random.Random(0), Pauses(), []
    for number in range(ASKED):
        lengths.append(draw.uniform(0, 4))
        pauses.ended(lengths[-1])
        for idle_s in (0.0, 1.0, draw.uniform(0, 5)):
            assert pauses.left_s(idle_s) == pytest.approx(left_of(lengths, idle_s), rel=1e-2), number


def test_of_many_pauses_the_latest_count_and_a_part_is_asked() -> None:
    pauses = Pauses()
    for _ in range(KEPT):
        pauses.ended(100.0)
    lengths = [1 + number % 16 / 4 for number in range(KEPT)]
    for length in lengths:
        pauses.ended(length)
    for idle_s in (0.0, 0.5, 2.1):
        assert pauses.left_s(idle_s) == pytest.approx(left_of(lengths, idle_s), rel=0.05)


def test_without_ground_it_is_as_long_again() -> None:
    pauses = Pauses()
    assert pauses.left_s(3.0) == 3.0
    for _ in range(LEAST):
        pauses.ended(1.0)
    assert pauses.left_s(0.25) == 0.75
    assert pauses.left_s(1.0) == 1.0 and pauses.left_s(3.0) == 3.0  # nobody was away for longer


def test_many_threads_may_tell_and_ask() -> None:
    pauses = Pauses()

    def work() -> None:
        for number in range(500):
            pauses.ended(number % 10)
            assert pauses.left_s(4.5) >= 0

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pauses.left_s(8.5) == pytest.approx(0.5)  # each of them knows ten lengths, and nines are the longest


def test_only_pauses_without_a_hint_count(make_rig: MakeRig) -> None:
    rig = make_rig()
    session, told = rig.open(), []
    rig.sessions.pager.pauses.ended = told.append
    session.forward(prompt())
    for hint_s in (None, 5.0, None):
        session.pause(expected_resume_s=hint_s)
        session.resume()
    assert len(told) == 2 and all(0 <= length < 1 for length in told)
    fork = session.fork()
    fork.resume()  # it was never paused by anyone
    assert len(told) == 2


def test_a_resume_that_is_tried_again_ended_one_pause(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, told = make_rig(), []
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    monkeypatch.setattr(pager.pauses, "ended", told.append)
    with monkeypatch.context() as patch:
        patch.setattr(pager.pool, "acquire_all", raising_full)
        for _ in range(3):
            with pytest.raises(OutOfDeviceMemory):
                session.resume()
                session.forward(prompt(tokens=1))
    session.resume()
    session.forward(prompt(tokens=1))
    assert len(told) == 1


def raising_full(*_: object, **__: object) -> None:
    raise OutOfDeviceMemory("refused", needed_bytes=1, free_bytes=0)


def test_the_guess_is_of_this_session_and_a_hint_goes_before_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    pager, session = rig.sessions.pager, rig.open()
    for _ in range(LEAST):
        pager.pauses.ended(60.0)
    session.forward(prompt())
    session.pause()
    holding = session._holding
    holding.last_use_s = time.monotonic() - 20
    (candidate,) = pager._candidates(None, None, set())
    for guess_s in (candidate.guessed_resume_s, pager.expected_s(holding)):
        assert guess_s == pytest.approx(time.monotonic() + 40, abs=1)
    holding.expected_resume_s = 5.0
    assert pager.expected_s(holding) == 5.0


def missed(next_s: Callable[[int, float], float], learns: bool, sessions: int, room: int, turns: int) -> float:
    """The share of resumes that find their session gone, on a simulated clock; `next_s` says how long one pauses."""
    pauses, policy, here, last_s, late = Pauses(), ExpectedLast(), {}, {}, []
    due = [(number * 1e-3, number) for number in range(sessions)]
    for _ in range(turns):
        now_s, number = heapq.heappop(due)
        if number in last_s:
            pauses.ended(now_s - last_s[number])
            late.append(number not in here)
        if number not in here and len(here) == room:
            idle = {other: now_s - last_s[other] for other in here}
            guesses = {other: now_s + (pauses.left_s(idle_s) if learns else idle_s) for other, idle_s in idle.items()}
            several = [Candidate(str(n), 1, True, last_s[n], None, guess_s) for n, guess_s in guesses.items()]
            del here[int(policy.choose(several, 1, now_s)[0])]
        here[number] = True
        last_s[number] = now_s
        heapq.heappush(due, (now_s + next_s(number, now_s), number))
    return statistics.fmean(late[len(late) // 4 :])


class Rounds:
    """Everyone has a turn, in a random order, before anyone has another one; a turn takes a second."""

    def __init__(self, sessions: int) -> None:
        self._draw, self._sessions, self._round, self._orders = random.Random(3), sessions, Counter(), {}

    def __call__(self, number: int, now_s: float) -> float:
        self._round[number] += 1
        which = self._round[number]
        order = self._orders.setdefault(which, self._draw.sample(range(self._sessions), self._sessions))
        return which * self._sessions + order.index(number) - now_s


def test_who_comes_back_in_rounds_leaves_after_his_turn() -> None:
    """Of fifty, 26 have room: 24 have to be away in each round."""
    assert missed(Rounds(50), True, 50, 26, 1000) < 0.54
    assert missed(Rounds(50), False, 50, 26, 1000) > 0.8


def test_who_did_not_come_back_at_once_leaves_first() -> None:
    """Seven of ten pauses are short, the others long: the rule that last use alone gives is right there."""

    def pauses() -> Callable[[int, float], float]:
        draw = random.Random(4)
        return lambda *_: draw.uniform(0, 0.1) if draw.random() < 0.7 else draw.uniform(8, 8.2)

    assert missed(pauses(), True, 30, 6, 4000) < 1.05 * missed(pauses(), False, 30, 6, 4000)
