"""Who resumes goes first: the pass under way waits for it between two layers, for a few milliseconds at most."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from djinn_core import turn as turn_module
from djinn_core.errors import BreakpointError, DjinnError
from djinn_core.sessions import SessionState
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.pager import Pager
from djinn_core.turn import Way
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, Rig, wait_for

pytestmark = pytest.mark.timeout(60)


def test_a_pass_gives_way_between_its_layers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "PATIENCE_S", 30.0)
    way, out, asked, give = rig.sessions.pager.way, [], threading.Event(), Way.give
    monkeypatch.setattr(Way, "give", lambda way: (asked.set(), give(way)))
    session = rig.open()
    before = sum(rig.executed)
    caller = threading.Thread(target=lambda: out.append(session.forward(prompt())))
    with way:
        caller.start()
        assert asked.wait(10)
        time.sleep(0.05)
        assert sum(rig.executed) == before, "a layer ran while someone was arriving"
    caller.join()
    assert sum(rig.executed) == before + LAYERS
    assert torch.equal(out[0], Oracle(rig.stock).forward(prompt()))


def test_nobody_is_waited_for_longer_than_that_from_when_he_came(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all passes together: who waits for one of them, or for long, would hold up everyone."""
    session = rig.open()
    session.forward(prompt())
    monkeypatch.setattr(turn_module, "PATIENCE_S", 0.5)
    with rig.sessions.pager.way:
        begun_s = time.perf_counter()
        for _ in range(3):
            session.forward(torch.tensor([[5]]))
        took_s = time.perf_counter() - begun_s
    assert 0.4 <= took_s < 1.0


def test_who_waits_for_a_slot_is_not_in_the_way(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    wait_for(lambda: session.stopped.boundary.device is None)
    pager = rig.sessions.pager
    slots = [pager.staging.take(Way()) for _ in range(2)]
    caller = threading.Thread(target=session.resume)
    caller.start()
    wait_for(lambda: session._holding.user.locked() and not pager.way.taken)
    time.sleep(0.05)
    assert caller.is_alive() and not pager.way.taken
    for slot in slots:
        pager.staging.give_back(slot)
    caller.join()
    assert session.state is SessionState.RUNNING


def test_who_waits_for_room_or_for_a_read_is_not_in_the_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pager, prepare, seen = rig.sessions.pager, BringIn.prepare, []
    session = rig.open()
    session.forward(prompt())
    session.pause()

    def prepared(job: BringIn, *, wait: bool) -> bool:
        seen.append((wait, pager.way.taken))
        return wait and prepare(job, wait=wait)  # someone else has to leave first

    monkeypatch.setattr(BringIn, "prepare", prepared)
    with pager.way:
        pager.claim(session._holding, 0, LAYERS, 40)
    assert seen == [(False, True), (True, False)]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_resume_has_the_way_until_its_bring_in_has_begun_and_not_while_it_waits_for_its_turn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    way, seen, begin = rig.sessions.pager.way, [], Pager.resume
    session = rig.open()
    session.forward(prompt(), stop_after=2 if stopped else None)
    session.pause(release=True)
    session.wait_until("released", 10)

    def resume(pager: Pager, *args: object) -> BringIn | None:
        seen.append(way.taken)
        return begin(pager, *args)

    monkeypatch.setattr(Pager, "resume", resume)
    turn = rig.served._djinn_boundary._turn
    with turn:
        caller = threading.Thread(target=session.resume)
        caller.start()
        wait_for(lambda: turn.waiting if stopped else not caller.is_alive())
        assert not way.taken
    caller.join()
    assert seen == [True]
    session.wait_until("restored", 10)
    assert session.state is SessionState.RUNNING


def test_a_resume_that_fails_is_not_in_the_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=3)
    session.pause()
    with pytest.raises(BreakpointError):
        session.resume(stop_after=2)
    assert not rig.sessions.pager.way.taken
    between = rig.open()
    between.forward(prompt())
    between.pause()

    def refuse(*_: object) -> None:
        raise DjinnError("refused")

    monkeypatch.setattr(Pager, "resume", refuse)
    for one in (session, between):
        with pytest.raises(DjinnError, match="refused"):
            one.resume()
        assert not rig.sessions.pager.way.taken
