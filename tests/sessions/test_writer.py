"""The write-back of a pause lets a moment go by, for whoever resumes right then; whoever needs it does not wait."""

from __future__ import annotations

import time

import pytest

from djinn_core.sessions import Session, SessionState
from djinn_core.sessions import writer as writer_module
from tests.sessions.oracle import prompt
from tests.sessions.rigs import Rig, released, wait_for

FAR_S = 600.0

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment is over when the test is."""
    monkeypatch.setattr(writer_module, "LET_GO_S", FAR_S)


def paused(rig: Rig) -> Session:
    session = rig.open()
    session.forward(prompt())
    session.pause()
    return session


def test_a_resume_right_behind_a_pause_has_no_write_back_beside_it(rig: Rig, far: None) -> None:
    away = released(rig)
    begun = len(rig.sessions.pager.events)
    session = paused(rig)
    away.resume()
    away.wait_until("restored", 10)
    assert "swap_out" not in {event.event for event in list(rig.sessions.pager.events)[begun:]}
    assert not any(block.host for block in session._holding.mapped.values())


def test_then_it_is_done_though_nobody_asks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "LET_GO_S", 0.2)
    session = rig.open()
    session.forward(prompt())
    begun_s = time.monotonic()
    session.pause()
    wait_for(session._holding.is_clean)
    assert time.monotonic() - begun_s >= 0.2


@pytest.mark.parametrize("need", ["clean", "release", "evict", "close", "resume", "save"])
def test_whoever_needs_it_does_not_wait(rig: Rig, far: None, tmp_path, need: str) -> None:
    session = paused(rig)
    begun_s = time.monotonic()
    if need == "clean":
        session.wait_until("clean", 10)
        assert session._holding.is_clean()
    elif need == "release":
        session.pause(release=True)
        wait_for(lambda: session.state is SessionState.SWAPPED)
    elif need == "evict":
        assert rig.sessions.pager.evict(session._holding)
    elif need == "close":
        session.close()
    elif need == "resume":
        session.resume()
        assert session.state is SessionState.RUNNING
    else:
        session.save(tmp_path / "saved")
    rig.close()
    assert time.monotonic() - begun_s < FAR_S / 20


def test_the_end_does_what_is_left_without_waiting(rig: Rig, far: None) -> None:
    session = paused(rig)
    wait_for(lambda: rig.sessions.pager._later)
    rig.sessions.pager.end_writer()
    assert session._holding.is_clean()


def test_a_busy_writer_still_takes_it_up(rig: Rig) -> None:
    """Those that are always ready do not keep it waiting."""
    other = released(rig)._holding
    session = rig.open()
    session.forward(prompt())
    queue = rig.sessions.pager._out
    session.pause()
    for _ in range(300_000):
        queue.put(other)
    wait_for(session._holding.is_clean)
    assert not queue.empty()
