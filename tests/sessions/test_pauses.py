"""The guess for when a session comes back, and what it is good for."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Sequence

import pytest

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.sessions import Candidate, Policy
from djinn_core.sessions.pauses import KEPT, LEAST, Pauses
from djinn_core.sessions.state import SessionState
from tests.sessions.lives import SESSION_BYTES
from tests.sessions.oracle import prompt
from tests.sessions.rigs import MakeRig


def left_of(lengths: list[float], idle_s: float) -> float:
    """Said again, simply."""
    longer = [length - idle_s for length in lengths[-KEPT:] if length > idle_s]
    return statistics.fmean(longer) if len(longer) >= LEAST else idle_s


def test_the_guess_is_the_mean_residual_life_of_the_latest_pauses() -> None:
    draw, pauses, lengths = random.Random(0), Pauses(), []
    for number in range(3 * KEPT):
        lengths.append(draw.choice([draw.uniform(0, 4), 1.0, 2.0]))
        pauses.ended(lengths[-1])
        if number % 7 == 0:
            for idle_s in (0.0, 1.0, draw.uniform(0, 5), lengths[-1]):
                assert pauses.left_s(idle_s) == pytest.approx(left_of(lengths, idle_s))


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
    assert pauses.left_s(8.5) == pytest.approx(0.5)


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


class LeastRecentlyUsed:
    def choose(self, candidates: Sequence[Candidate], needed_bytes: int, now_s: float) -> list[str]:
        return [candidate.session for candidate in sorted(candidates, key=lambda each: each.last_use_s)]


def missed_in_rounds(make_rig: MakeRig, policy: Policy | None) -> int:
    """Resumes that find their session gone, where eight take turns in twelve random orders and five have room."""
    rig = make_rig(device_bytes=6 * SESSION_BYTES, policy=policy)
    order, sessions, missed = random.Random(1), [], 0
    for _ in range(8):
        sessions.append(session := rig.open())
        session.forward(prompt())
        session.pause()
        session.wait_until("clean", 10)
    for _ in range(12):
        for session in order.sample(sessions, len(sessions)):
            missed += session.state is SessionState.SWAPPED
            session.resume()
            session.forward(prompt(tokens=1))
            session.pause()
            session.wait_until("clean", 10)
    return missed


def test_where_sessions_come_back_in_rounds_those_leave_that_have_had_their_turn(make_rig: MakeRig) -> None:
    assert missed_in_rounds(make_rig, None) <= 0.8 * missed_in_rounds(make_rig, LeastRecentlyUsed())
