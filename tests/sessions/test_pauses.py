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

from djinn_core.errors import OutOfDeviceMemory, UsageError
from djinn_core.sessions import Candidate, ExpectedLast, Session, SessionState, ahead
from djinn_core.sessions.pauses import ASKED, KEPT, LEAST, ON_TIME_S, OVERTAKEN, Lengths, Pauses
from tests.sessions.lives import SESSION_BYTES
from tests.sessions.oracle import prompt
from tests.sessions.rigs import MakeRig


def left_of(lengths: list[float], idle_s: float) -> float:
    """Said again, simply."""
    longer = [length - idle_s for length in lengths[-KEPT:] if length > idle_s]
    return statistics.harmonic_mean(longer) if len(longer) >= LEAST else idle_s


def test_the_guess_is_the_harmonic_mean_of_what_was_left_of_longer_pauses() -> None:
    draw, pauses, lengths = random.Random(0), Lengths(), []
    for number in range(ASKED):
        lengths.append(draw.uniform(0, 4))
        pauses.add(lengths[-1])
        for idle_s in (0.0, 1.0, draw.uniform(0, 5)):
            assert pauses.left_s(idle_s) == pytest.approx(left_of(lengths, idle_s), rel=1e-2), number


def test_of_many_pauses_the_latest_count_and_a_part_is_asked() -> None:
    pauses = Lengths()
    for _ in range(KEPT):
        pauses.add(100.0)
    lengths = [1 + number % 16 / 4 for number in range(KEPT)]
    for length in lengths:
        pauses.add(length)
    for idle_s in (0.0, 0.5, 2.1):
        assert pauses.left_s(idle_s) == pytest.approx(left_of(lengths, idle_s), rel=0.05)


def test_without_ground_it_is_as_long_again() -> None:
    pauses = Lengths()
    assert pauses.left_s(3.0) == 3.0
    for _ in range(LEAST):
        pauses.add(1.0)
    assert pauses.left_s(0.25) == 0.75
    assert pauses.left_s(1.0) == 1.0 and pauses.left_s(3.0) == 3.0  # nobody was away for longer


def test_many_threads_may_tell_and_ask() -> None:
    pauses = Lengths()

    def work() -> None:
        for number in range(500):
            pauses.add(number % 10)
            assert pauses.left_s(4.5) >= 0

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pauses.left_s(8.5) == pytest.approx(0.5)  # each of them knows ten lengths, and nines are the longest


def test_a_pause_counts_for_those_like_it(make_rig: MakeRig) -> None:
    """Without a hint its length does, with one by how much it was late."""
    rig = make_rig()
    session, pauses = rig.open(), rig.sessions.pager.pauses
    unsaid, late = pauses.unsaid._lengths, pauses.late._lengths
    session.forward(prompt())
    for hint_s in (None, 5.0, None, 0.01):
        session.pause(expected_resume_s=hint_s)
        time.sleep(0.05)
        session.resume()
    assert len(unsaid) == 2 and all(0.05 <= length < 1 for length in unsaid)
    assert len(late) == 1 and 0.04 <= late[0] < 0.9
    fork = session.fork()
    fork.resume()  # it was never paused by anyone
    assert (len(unsaid), len(late)) == (2, 1)


def test_a_resume_that_is_tried_again_ended_one_pause(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    with monkeypatch.context() as patch:
        patch.setattr(pager.pool, "acquire_all", raising_full)
        for _ in range(3):
            with pytest.raises(OutOfDeviceMemory):
                session.resume()
                session.forward(prompt(tokens=1))
    session.resume()
    session.forward(prompt(tokens=1))
    assert len(pager.pauses.unsaid) == 1


def raising_full(*_: object, **__: object) -> None:
    raise OutOfDeviceMemory("refused", needed_bytes=1, free_bytes=0)


def test_the_guess_is_of_this_session_and_a_hint_goes_before_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    pager, session = rig.sessions.pager, rig.open()
    for _ in range(LEAST):
        pager.pauses.unsaid.add(60.0)
    session.forward(prompt())
    session.pause()
    holding = session._holding
    holding.last_use_s = time.monotonic() - 20
    (candidate,) = pager._candidates(None, None, set())
    for guess_s in (candidate.guessed_resume_s, pager.pauses.expected_s(holding)):
        assert guess_s == pytest.approx(time.monotonic() + 40, abs=1)
    for hint_s in (time.monotonic() + 5, time.monotonic() - 50):
        holding.expected_resume_s = hint_s
        assert pager.pauses.expected_s(holding) == hint_s
    (candidate,) = pager._candidates(None, None, set())
    assert candidate.expected_resume_s == candidate.guessed_resume_s == hint_s


def overtake(pauses: Pauses, session: Session) -> None:
    """So many have come back that were due after it."""
    later_s = session._holding.expected_resume_s + 1
    pauses._came.extend((time.monotonic(), later_s, f"another {number}") for number in range(OVERTAKEN))


def test_who_was_overtaken_is_expected_as_late_ones_came(make_rig: MakeRig) -> None:
    """Where too few came so late: as late again as it is."""
    rig = make_rig()
    pauses, session = rig.sessions.pager.pauses, rig.open()
    session.forward(prompt())
    session.pause(expected_resume_s=0.0)
    holding = session._holding
    holding.expected_resume_s = time.monotonic() - 20
    assert pauses.expected_s(holding) == holding.expected_resume_s, "others wait for their turn, too"
    overtake(pauses, session)
    assert pauses.expected_s(holding) == pytest.approx(time.monotonic() + 20, abs=1)
    for _ in range(LEAST):
        pauses.late.add(25.0)
    assert pauses.expected_s(holding) == pytest.approx(time.monotonic() + 5, abs=1)
    holding.expected_resume_s -= 20
    assert pauses.expected_s(holding) == pytest.approx(time.monotonic() + 40, abs=1)


@pytest.mark.parametrize("hint_s", [None, 600.0, 0.0])
def test_who_takes_turns_is_not_sent_away_for_those_who_stay_away(make_rig: MakeRig, hint_s: float | None) -> None:
    """Four have no hint and room enough. Beside them are four who have said nothing, much later, or too early."""
    rig = make_rig(device_bytes=6 * SESSION_BYTES)
    for _ in range(4):
        idle = rig.open()
        idle.forward(prompt())
        idle.pause(expected_resume_s=hint_s)
        idle.wait_until("clean", 10)
    gone, several = 0, [rig.open() for _ in range(4)]
    for turn in range(32 + 40):
        session = several[turn % 4]
        gone += turn >= 32 and session.state is SessionState.SWAPPED
        if turn < 4:
            session.forward(prompt())
        else:
            session.resume()
        session.pause()
        session.wait_until("clean", 10)
        time.sleep(0.02)
    assert gone <= 2, "of forty"


def test_who_is_away_for_long_leaves_for_who_is_due(make_rig: MakeRig) -> None:
    """A prefetch sends those away who are expected later, with a hint or without, and no others."""
    rig = make_rig(device_bytes=3 * SESSION_BYTES)
    pager, away = rig.sessions.pager, rig.open()
    away.forward(prompt())
    away.pause(release=True)
    away.wait_until("released", 10)
    here = rig.open()
    here.forward(prompt())
    here.pause()
    here.wait_until("clean", 10)
    needed_bytes = pager.pool.free_bytes + 1
    limit_s = time.monotonic() + 10
    assert pager.could_free(needed_bytes, limit_s), "nothing is known: who has said nothing leaves for who has"
    for _ in range(LEAST):
        pager.pauses.unsaid.add(5.0)
    assert not pager.could_free(needed_bytes, limit_s)
    assert pager.could_free(needed_bytes, time.monotonic() + 1)


def test_room_is_kept_at_the_cost_of_no_one_who_is_due(make_rig: MakeRig) -> None:
    """Whom a prefetch would bring straight back; without a hint none would."""
    rig = make_rig()
    pager = rig.sessions.pager
    for _ in range(LEAST):
        pager.pauses.unsaid.add(5.0)
    told, unsaid = rig.open(), rig.open()
    for session, hint_s in ((told, 5.0), (unsaid, None)):
        session.forward(prompt())
        session.pause(expected_resume_s=hint_s)
        session.wait_until("clean", 10)
    now_s, wanted_bytes = time.monotonic(), 1 << 40

    def leave(limit_s: float, due_s: float) -> list[SessionState]:
        pager.make_room_clean(wanted_bytes, now_s + limit_s, now_s + due_s)
        return [told.state, unsaid.state]

    assert leave(10, 10) == [SessionState.PAUSED, SessionState.PAUSED]
    assert leave(1, 10) == [SessionState.PAUSED, SessionState.SWAPPED]
    assert leave(10, 1) == [SessionState.SWAPPED, SessionState.SWAPPED]


@pytest.mark.parametrize("hint_s", [None, 600.0])
def test_for_who_said_nothing_room_is_kept_at_the_cost_of_who_is_not_due(make_rig: MakeRig, hint_s: float) -> None:
    """It may come back at any time, and would wait for an eviction. Who said that he comes later takes none away."""
    rig = make_rig(device_bytes=6 * SESSION_BYTES)
    pager, sessions = rig.sessions.pager, []
    for _ in range(LEAST):
        pager.pauses.unsaid.add(5.0)
    while not any(s.state is SessionState.SWAPPED for s in sessions):
        sessions.append(rig.open())
        sessions[-1].forward(prompt())
        sessions[-1].pause(expected_resume_s=hint_s if len(sessions) == 1 else None)
        sessions[-1].wait_until("clean", 10)
        sessions[0]._holding.last_use_s -= 60  # the guess is that it is away for long
    deadline = time.monotonic() + (0.3 if hint_s else 5)
    while rig.pool.free_bytes < SESSION_BYTES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (rig.pool.free_bytes >= SESSION_BYTES) == (hint_s is None)


def test_while_nothing_is_known_room_is_kept_for_who_is_away(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the cost of whoever was used last, however lately."""
    monkeypatch.setattr(ahead, "PREFETCH_LEAD_S", 60.0)
    rig = make_rig(device_bytes=6 * SESSION_BYTES)
    sessions = []
    while not any(s.state is SessionState.SWAPPED for s in sessions):
        sessions.append(rig.open())
        sessions[-1].forward(prompt())
        sessions[-1].pause()
        sessions[-1].wait_until("clean", 10)
    deadline = time.monotonic() + 5
    while rig.pool.free_bytes < SESSION_BYTES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rig.pool.free_bytes >= SESSION_BYTES and len(sessions) > 2


@pytest.mark.parametrize("overtaken", [True, False])
def test_who_was_overtaken_is_not_brought_back(make_rig: MakeRig, overtaken: bool) -> None:
    rig = make_rig()
    session = rig.open()
    session.forward(prompt())
    session.pause(expected_resume_s=60.0, release=True)
    session.wait_until("released", 10)
    with rig.sessions.pager.lock:
        session._holding.expected_resume_s -= 120
        if overtaken:
            overtake(rig.sessions.pager.pauses, session)
    deadline = time.monotonic() + (0.3 if overtaken else 5)  # some looks ahead
    while session.state is SessionState.SWAPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert session.state is (SessionState.SWAPPED if overtaken else SessionState.PAUSED)


def test_who_overtakes_whom(make_rig: MakeRig) -> None:
    """Those that came back since it was paused, and were due later: by their hint, or from their pause on."""
    rig = make_rig()
    pauses = rig.sessions.pager.pauses
    waits, *others = [rig.open() for _ in range(4)]
    for session in (waits, *others):
        session.forward(prompt())

    def come_back(session: Session, hint_s: float | None, times: int = OVERTAKEN) -> bool:
        for _ in range(times):
            session.pause(expected_resume_s=hint_s)
            session.resume()
        return pauses.given_up(waits._holding)

    def wait(hint_s: float) -> None:
        waits.pause(expected_resume_s=hint_s)
        waits._holding.expected_resume_s -= 2 * ON_TIME_S
        waits._holding.last_use_s -= 3 * ON_TIME_S

    assert not come_back(others[0], 600.0)
    wait(0.0)
    waits._holding.last_use_s = time.monotonic()
    assert not pauses.given_up(waits._holding), "they came back before it was paused"
    assert not come_back(others[1], None), "one alone, however often"
    assert not come_back(others[2], -60.0, OVERTAKEN // 2 - 1)
    assert come_back(others[2], None, 1)
    waits._holding.expected_resume_s = time.monotonic() - ON_TIME_S / 2
    assert not pauses.given_up(waits._holding), "it is hardly late"
    assert not pauses.given_up(others[0]._holding)
    waits.resume()
    pauses._came.clear()
    wait(1.5 * ON_TIME_S)
    came = [(time.monotonic(), waits._holding.expected_resume_s - 1, f"{number}") for number in range(OVERTAKEN)]
    pauses._came.extend(came)
    time.sleep(1.1 * ON_TIME_S)
    assert not pauses.given_up(waits._holding), "they were due before it"


def test_a_hint_of_the_past_says_nothing_of_lateness(make_rig: MakeRig) -> None:
    rig = make_rig()
    session = rig.open()
    session.forward(prompt())
    session.pause(expected_resume_s=-600.0)
    session.resume()
    assert all(late_s < 60 for late_s in rig.sessions.pager.pauses.late._lengths)


def test_a_prefetch_that_its_owner_asks_for_makes_room(make_rig: MakeRig) -> None:
    """Without a hint, and whatever the guess."""
    rig = make_rig(device_bytes=3 * SESSION_BYTES)
    pager, sessions = rig.sessions.pager, []
    while not sessions or sessions[0].state is not SessionState.SWAPPED:
        sessions.append(rig.open())
        sessions[-1].forward(prompt())
        sessions[-1].pause()
        sessions[-1].wait_until("clean", 10)
    for _ in range(LEAST):
        pager.pauses.unsaid.add(10.0)
    away = sessions[0]
    away._holding.last_use_s -= 300
    away.prefetch()
    away.wait_until("restored", 10)
    assert away.state is SessionState.PAUSED and away.device_bytes == SESSION_BYTES


def test_who_is_expected_last_is_spilled_first(make_rig: MakeRig) -> None:
    """Of those off the device; then the others, parts of which may be off it."""
    rig = make_rig()
    pager = rig.sessions.pager
    off = [rig.open() for _ in range(3)]
    for session, hint_s in zip(off, (60.0, 600.0, None), strict=True):
        session.forward(prompt())
        session.pause(expected_resume_s=hint_s, release=True)
        session.wait_until("released", 10)
    runs, paused = rig.open(), rig.open()
    for session in (paused, runs):
        session.forward(prompt())
    paused.pause(expected_resume_s=6000.0)
    for _ in range(LEAST):
        pager.pauses.unsaid.add(300.0)
    soon, late, unsaid = off
    order = [late, unsaid, soon, paused, runs]
    assert pager.tiers._away() == [session._holding for session in order]


def missed(next_s: Callable[[int, float], float], learns: bool, sessions: int, room: int, turns: int) -> float:
    """The share of resumes that find their session gone, on a simulated clock; `next_s` says how long one pauses."""
    pauses, policy, here, last_s, late = Lengths(), ExpectedLast(), {}, {}, []
    due = [(number * 1e-3, number) for number in range(sessions)]
    for _ in range(turns):
        now_s, number = heapq.heappop(due)
        if number in last_s:
            pauses.add(now_s - last_s[number])
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


@pytest.mark.parametrize("timeout_s", ["5", None, True, float("nan"), float("inf"), 1e9])
def test_a_wait_takes_seconds(make_rig: MakeRig, timeout_s: object) -> None:
    """Nothing is done for who asks with something else, and the session is as it was."""
    session = make_rig().open()
    session.forward(prompt())
    session.pause()
    with pytest.raises(UsageError, match=r"timeout_s is .*; give seconds"):
        session.wait_until("released", timeout_s)
    session.wait_until("clean", 10)
