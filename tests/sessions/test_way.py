"""Who resumes goes first: the pass under way waits for it between two layers, for a few milliseconds at most."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from djinn_core.errors import BreakpointError, DjinnError
from djinn_core.sessions import SessionState, passes
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.pager import Pager
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, Rig

pytestmark = pytest.mark.timeout(60)


def wait_for(reached) -> None:
    give_up_s = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def test_a_pass_gives_way_between_its_layers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PATIENCE_S", 30.0)
    way, out = rig.sessions.pager.way, []
    session = rig.open()
    before = sum(rig.executed)
    caller = threading.Thread(target=lambda: out.append(session.forward(prompt())))
    with way:
        caller.start()
        time.sleep(0.1)
        assert sum(rig.executed) == before, "a layer ran while someone was arriving"
    caller.join()
    assert sum(rig.executed) == before + LAYERS
    assert torch.equal(out[0], Oracle(rig.stock).forward(prompt()))


def test_its_patience_is_for_the_whole_pass(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session = rig.open()
    session.forward(prompt())
    monkeypatch.setattr(passes, "PATIENCE_S", 0.3)
    with rig.sessions.pager.way:  # somebody who waits for this pass would hold both up for ever
        begun_s = time.perf_counter()
        session.forward(torch.tensor([[5]]))
        took_s = time.perf_counter() - begun_s
    assert 0.3 <= took_s < 0.3 * (LAYERS - 1)


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
        seen.append(way.within)
        return begin(pager, *args)

    monkeypatch.setattr(Pager, "resume", resume)
    turn = rig.served._djinn_boundary._turn
    with turn:
        caller = threading.Thread(target=session.resume)
        caller.start()
        wait_for(lambda: turn.waiting if stopped else not caller.is_alive())
        assert way.within == 0
    caller.join()
    assert seen == [1]
    assert session.state is SessionState.RUNNING


def test_a_resume_that_fails_is_not_in_the_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=3)
    session.pause()
    with pytest.raises(BreakpointError):
        session.resume(stop_after=2)
    assert rig.sessions.pager.way.within == 0
    between = rig.open()
    between.forward(prompt())
    between.pause()

    def refuse(*_: object) -> None:
        raise DjinnError("refused")

    monkeypatch.setattr(Pager, "resume", refuse)
    for one in (session, between):
        with pytest.raises(DjinnError, match="refused"):
            one.resume()
        assert rig.sessions.pager.way.within == 0
