"""A pass whose layers are still on their way does not take its turn while others would use the time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from djinn_core import turn as turn_module
from djinn_core.errors import DeviceError
from djinn_core.sessions import Session, SessionState
from djinn_core.sessions import bringin as bringin_module
from djinn_core.sessions.bringin import BringIn
from djinn_core.turn import Turn
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, wait_for

pytestmark = pytest.mark.timeout(60)


class Held:
    """Bring-ins stop behind their first layer until `go`; then `error`, if there is one, is what a step meets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.error, step = threading.Event(), None, BringIn.step
        monkeypatch.setattr(bringin_module, "STEP_BYTES", 1)

        def held(job: BringIn) -> tuple:
            if not (job.begins or job.by_pass):
                self.go.wait(10)
                if self.error is not None:
                    raise self.error
            return step(job)

        monkeypatch.setattr(BringIn, "step", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@pytest.fixture
def stopped(make_rig: MakeRig, held: Held) -> tuple[Rig, Session, Oracle, torch.Tensor]:
    """A session that stopped after layer 1 of a token and has left the device, and the logits it goes on to."""
    rig = make_rig()
    oracle, session = Oracle(rig.stock), rig.open()
    logits = oracle.forward(prompt())
    session.forward(prompt())
    session.forward(likely(logits), stop_after=1)
    session.pause(release=True)
    session.wait_until("released", 10)
    return rig, session, oracle, oracle.forward(likely(logits))


def turn_of(rig: Rig) -> Turn:
    return rig.served._djinn_boundary._turn


def resume(session: Session) -> tuple[threading.Thread, list]:
    out: list = []

    def run() -> None:
        try:
            out.append(session.resume())
        except DeviceError as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def test_others_go_first_while_its_layers_come(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, session, _, wanted = stopped
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    oracle, other = Oracle(rig.stock), rig.open()
    oracle.forward(prompt(seed=5))
    other.forward(prompt(seed=5))
    thread, out = resume(session)
    wait_for(lambda: session._holding.in_pass)
    for token in range(3):
        ids = torch.tensor([[token]])
        assert torch.equal(other.forward(ids), oracle.forward(ids))
    assert thread.is_alive() and not out
    held.go.set()
    thread.join(10)
    assert torch.equal(out[0], wanted)


def test_alone_it_begins_at_once(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes each layer as soon as that one is there; so it does where others have paused a while ago."""
    rig, session, _, wanted = stopped
    executed = rig.executed[1]
    time.sleep(2 * turn_module.LATELY_S)
    thread, out = resume(session)
    wait_for(lambda: rig.executed[1] == executed + 1)
    assert thread.is_alive() and not held.go.is_set()
    held.go.set()
    thread.join(10)
    assert torch.equal(out[0], wanted)


def test_it_goes_on_when_nobody_wants_the_time_any_more(
    stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, session, _, wanted = stopped
    executed = rig.executed[1]
    with turn_of(rig):
        thread, out = resume(session)
        wait_for(lambda: session._holding.in_pass)
        time.sleep(0.05)
        assert turn_of(rig).waiting == 0, "it asked for its turn, to wait in it"
    wait_for(lambda: rig.executed[1] == executed + 1)
    assert not held.go.is_set()
    held.go.set()
    thread.join(10)
    assert torch.equal(out[0], wanted)


def test_a_bring_in_that_fails_meanwhile_is_told(stopped: tuple, held: Held) -> None:
    rig, session, _, wanted = stopped
    held.error = DeviceError("the link is gone")
    with turn_of(rig):
        thread, out = resume(session)
        wait_for(lambda: session._holding.in_pass)
        held.go.set()
        wait_for(lambda: turn_of(rig).waiting == 1)
    thread.join(10)
    assert isinstance(out[0], DeviceError) and session.state is SessionState.PAUSED
    held.error = None
    assert torch.equal(session.resume(), wanted)


def test_only_the_layers_of_the_pass_are_waited_for(stopped: tuple, held: Held) -> None:
    """The boundary lies before layer 2, which is there; layer 1 comes last and is not wanted yet."""
    rig, session, _, _ = stopped
    with turn_of(rig):
        thread = threading.Thread(target=lambda: session.resume(stop_after=2))
        thread.start()
        wait_for(lambda: turn_of(rig).waiting == 1)
    thread.join(10)
    assert session.stopped.layer == 2 and not held.go.is_set()
    held.go.set()


def test_who_used_the_turn_lately_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, seen = Turn(), []

    def other(work) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    def use() -> None:
        with turn:
            assert not turn.wanted, "by itself"

    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    assert not turn.wanted
    use()
    assert not turn.wanted, "it was this thread"
    other(lambda: seen.append(turn.wanted))
    assert seen == [True]
    other(use)
    use()
    assert turn.wanted, "another one had it, though not as the last"
    monkeypatch.setattr(turn_module, "LATELY_S", 0.0)
    assert not turn.wanted
    with turn:
        other(lambda: seen.append(turn.wanted))
    assert seen == [True, True]
