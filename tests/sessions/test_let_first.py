"""A pass whose layers are still on their way does not take its turn while others would use the time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from djinn_core import turn as turn_module
from djinn_core.errors import DeviceError
from djinn_core.memory.disktier import DiskTier
from djinn_core.sessions import Session, SessionState
from djinn_core.sessions import bringin as bringin_module
from djinn_core.sessions.ahead import Callers
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.link import Link
from djinn_core.sessions.staging import INBOUND_SLOTS
from djinn_core.turn import Turn, Way
from tests.ctrl_c import python_handles_it
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig, spill, wait_for

pytestmark = pytest.mark.timeout(60)


class Held:
    """Bring-ins stop behind their first layer until `go`; then `error`, if there is one, is what a step meets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.error, step = threading.Event(), None, BringIn.step
        self.first_too = False  # if a worker issues it
        monkeypatch.setattr(bringin_module, "STEP_BYTES", 1)
        monkeypatch.setattr(Link, "_serves_nobody", lambda link: False)  # or who resumes issues the second step himself

        def held(job: BringIn) -> tuple:
            if not (job.by_pass or (job.begins and not self.first_too)):
                self.go.wait(10)
                if self.error is not None:
                    raise self.error
            return step(job)

        monkeypatch.setattr(BringIn, "step", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


@pytest.fixture
def stopped(make_rig: MakeRig, held: Held) -> tuple[Rig, Session, Oracle, torch.Tensor]:
    """A session that stopped after layer 1 of a token and has left the device, and the logits it goes on to."""
    rig = make_rig()
    rig.sessions.pager.callers.see(2, time.monotonic())
    rig.open()
    oracle, session = Oracle(rig.stock), rig.open()
    logits = oracle.forward(prompt())
    session.forward(prompt())
    session.forward(likely(logits), stop_after=1)
    session.pause(release=True)
    session.wait_until("released", 10)
    wait_for(lambda: session.stopped.boundary.device is None)  # so that a resume takes a slot
    return rig, session, oracle, oracle.forward(likely(logits))


def turn_of(rig: Rig) -> Turn:
    return rig.served._djinn_boundary._turn


def resume(session: Session) -> tuple[threading.Thread, list]:
    """On a thread of its own: that, and what it will return."""
    out: list = []

    def run() -> None:
        try:
            out.append(session.resume())
        except DeviceError as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def resume_at_once(rig: Rig, session: Session) -> tuple[threading.Thread, list]:
    """The same, once it has run layer 2, and waits for the next one within its turn."""
    executed = rig.executed[1]
    thread, out = resume(session)
    wait_for(lambda: rig.executed[1] == executed + 1)
    return thread, out


def check_end(held: Held, thread: threading.Thread, out: list, wanted: torch.Tensor) -> None:
    """Once the other layers come, it ends as the stock model does."""
    held.go.set()
    thread.join(10)
    assert torch.equal(out[0], wanted)


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
    check_end(held, thread, out, wanted)


def test_alone_it_begins_at_once(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes each layer as soon as that one is there; so it does where others have paused a while ago."""
    rig, session, _, wanted = stopped
    time.sleep(2 * turn_module.LATELY_S)
    thread, out = resume_at_once(rig, session)
    assert thread.is_alive() and not held.go.is_set()
    check_end(held, thread, out, wanted)


def test_it_goes_on_when_nobody_wants_the_time_any_more(
    stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, session, _, wanted = stopped
    executed = rig.executed[1]
    with turn_of(rig):
        thread, out = resume(session)
        wait_for(lambda: session._holding.in_pass)
        wait_for(lambda: turn_of(rig).waiting == 1)
    wait_for(lambda: rig.executed[1] == executed + 1)
    assert not held.go.is_set()
    check_end(held, thread, out, wanted)


def test_a_bring_in_that_fails_meanwhile_is_told(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, session, _, wanted = stopped
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    held.error = DeviceError("the link is gone")
    with turn_of(rig):
        thread, out = resume(session)
        wait_for(lambda: session._holding.in_pass)
        held.go.set()
    thread.join(10)
    assert isinstance(out[0], DeviceError) and session.state is SessionState.PAUSED
    held.error = None
    assert torch.equal(session.resume(), wanted)


def test_only_the_layers_of_the_pass_are_waited_for(
    stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundary lies before layer 2, which is there; layer 1 comes last and is not wanted yet."""
    rig, session, _, _ = stopped
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    with turn_of(rig):
        thread = threading.Thread(target=lambda: session.resume(stop_after=2))
        thread.start()
        wait_for(lambda: turn_of(rig).waiting == 1)
    thread.join(10)
    assert session.stopped.layer == 2 and not held.go.is_set()


def test_one_caller_at_a_time_lets_nobody_go_first(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request on a thread of its own: the thread of the one before is gone, and will not use the time."""
    rig, session, _, wanted = stopped
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    monkeypatch.setattr(rig.sessions.pager, "callers", Callers())
    thread, out = resume_at_once(rig, session)
    check_end(held, thread, out, wanted)


def test_who_holds_the_last_slot_does_not_wait(stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next resume needs it, and may have all in place."""
    rig, session, _, wanted = stopped
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    staging = rig.sessions.pager.staging
    slots = [staging.take(Way()) for _ in range(INBOUND_SLOTS - 1)]
    thread, out = resume_at_once(rig, session)
    for slot in slots:
        staging.give_back(slot)
    check_end(held, thread, out, wanted)


def test_who_holds_the_last_slot_waits_for_his_first_layer(
    stopped: tuple, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may come from disk: he would keep the turn from all who have theirs."""
    rig, session, _, wanted = stopped
    prepare, staging = BringIn.prepare, rig.sessions.pager.staging
    monkeypatch.setattr(BringIn, "prepare", lambda job, *, wait, **how: wait and prepare(job, wait=True, **how))
    held.first_too = True
    slots = [staging.take(Way()) for _ in range(INBOUND_SLOTS - 1)]
    thread, out = resume(session)
    wait_for(lambda: turn_of(rig).waiting)
    time.sleep(10 * turn_module.LOOK_S)
    assert turn_of(rig).waiting == 1
    with turn_of(rig):
        assert not out
    for slot in slots:
        staging.give_back(slot)
    check_end(held, thread, out, wanted)


def test_ctrl_c_ends_the_wait(stopped: tuple, held: Held) -> None:
    rig, session, _, wanted = stopped
    inside, go_on = threading.Event(), threading.Event()

    def compute() -> None:
        with turn_of(rig):
            inside.set()
            go_on.wait(10)

    def press() -> None:
        wait_for(lambda: turn_of(rig).waiting)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: not turn_of(rig).waiting)
        held.go.set()
        go_on.set()

    threads = [threading.Thread(target=work) for work in (compute, press)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    begun_s = time.monotonic()
    with python_handles_it(), pytest.raises(KeyboardInterrupt):
        session.resume()
    assert time.monotonic() - begun_s < 5
    for thread in threads:
        thread.join(10)
    assert torch.equal(session.resume(), wanted)


class Waiter(threading.Thread):
    """Takes the turn once, when it is ready, and keeps it until it is let go."""

    def __init__(self, turn: Turn, *, ready: bool, begins: bool = True) -> None:
        super().__init__()
        self.turn, self.is_ready, self.has, self.go = turn, ready, threading.Event(), threading.Event()
        self.begins = begins
        before = turn.waiting
        self.start()
        wait_for(lambda: self.has.is_set() or turn.waiting > before)

    def run(self) -> None:
        with self.turn.when(lambda: self.is_ready, lambda: self.begins):
            self.has.set()
            self.go.wait(10)

    def end(self) -> None:
        self.go.set()
        self.join()


def test_who_is_not_ready_keeps_his_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    turn = Turn()
    with turn:
        first, second, third = (Waiter(turn, ready=ready) for ready in (False, True, True))
    assert second.has.wait(10) and not first.has.is_set()
    first.is_ready = True
    second.end()
    assert first.has.wait(10) and not third.has.is_set()
    first.end()
    assert third.has.wait(10)
    third.end()


def test_who_becomes_ready_takes_a_free_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    turn = Turn()
    with turn:
        waiter = Waiter(turn, ready=False)
    time.sleep(0.05)
    assert not waiter.has.is_set() and turn.waiting == 1
    with turn:  # whoever is ready has it at once, meanwhile
        pass
    waiter.is_ready = True
    assert waiter.has.wait(10)
    waiter.end()


def test_nobody_is_waited_for_who_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those who are not ready, the first one takes what nobody uses, and the next one when that one has had it."""
    turn = Turn()
    alone = Waiter(turn, ready=False)
    assert alone.has.is_set(), "nobody ever had it"
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    first, second = Waiter(turn, ready=False), Waiter(turn, ready=False)
    alone.end()
    time.sleep(0.05)
    assert not first.has.is_set(), "the one before may come back"
    monkeypatch.setattr(turn_module, "LATELY_S", 0.0)
    assert first.has.wait(10) and not second.has.is_set()
    first.end()
    assert second.has.wait(10)
    second.end()


def test_nobody_takes_what_he_could_not_even_begin_with() -> None:
    turn = Turn()
    first, second = Waiter(turn, ready=False, begins=False), Waiter(turn, ready=False)
    assert second.has.is_set() and not first.has.is_set(), "the next one could"
    second.end()
    time.sleep(0.05)
    assert not first.has.is_set()
    first.begins = True
    assert first.has.wait(10)
    first.end()


def test_a_read_from_disk_does_not_take_the_turn(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago others have used it."""
    rig = make_rig(disk_bytes=4 << 20)
    rig.sessions.pager.callers.see(2, time.monotonic())
    oracle, session, other = Oracle(rig.stock), rig.open(), rig.open()
    logits = oracle.forward(prompt())
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    spill(rig, session)
    read, inside, go_on = DiskTier.read, threading.Event(), threading.Event()

    def slow(*args: object) -> None:
        inside.set()
        go_on.wait(10)
        read(*args)

    monkeypatch.setattr(DiskTier, "read", slow)
    monkeypatch.setattr(turn_module, "LATELY_S", 0.0)
    out: list = []

    def go() -> None:
        session.resume()
        out.append(session.forward(likely(logits)))

    thread = threading.Thread(target=go)
    thread.start()
    assert inside.wait(10)
    time.sleep(0.05)
    begun_s = time.monotonic()
    other.forward(prompt(seed=5))
    assert time.monotonic() - begun_s < 5 and not out
    go_on.set()
    thread.join(10)
    assert torch.equal(out[0], oracle.forward(likely(logits)))


def test_who_waits_too_does_not_use_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    turn, waiters = Turn(), []

    def use_it_and_wait() -> None:
        with turn:
            waiters.append(Waiter(turn, ready=False))
        with turn.when(lambda: False):
            pass

    user = threading.Thread(target=use_it_and_wait)
    user.start()
    wait_for(lambda: waiters and waiters[0].has.is_set())
    monkeypatch.setattr(turn_module, "LATELY_S", 0.0)
    waiters[0].end()
    user.join()


def test_the_thread_itself_does_not_count_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "LATELY_S", 30.0)
    turn = Turn()
    with turn:
        pass
    with turn.when(lambda: False):
        assert turn.held
    Waiter(turn, ready=True).end()
    with turn:
        pass
    taken = threading.Event()
    ready = iter([False] * 20)
    with turn.when(lambda: next(ready, True)):  # the other one had it lately, though not as the last
        taken.set()
    assert taken.is_set() and next(ready, None) is None
