"""Ctrl-C: what is held off, what acts at once, and what a call that was interrupted has not done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from djinn_core import runtime as runtime_module
from djinn_core.device import open_device
from djinn_core.device.cpu import CpuDevice
from djinn_core.interrupts import Interruptible, Uninterrupted, wait_for
from djinn_core.models.seeded import SeededSource
from djinn_core.runtime import Runtime
from djinn_core.sessions.snapshot import load_session
from djinn_core.sessions.staging import INBOUND_SLOTS
from djinn_core.sessions.tensorfile import TensorFile
from djinn_core.turn import Way
from tests.ctrl_c import interrupted, python_handles_it
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import Rig, make_rig
from tests.test_runtime import LLAMA

HELD_UP_S = 6.0
MEMORY = {"budget_bytes": 4 << 20, "host_bytes": 32 << 20}

pytestmark = pytest.mark.timeout(120)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handled():
    """Whatever a test does, Ctrl-C is handled as before at its end."""
    with python_handles_it():
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = make_rig(tmp_path)
    yield made
    made.close()


def test_it_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        press()
        done.append("the step")
    assert done == ["the step"]


def test_blocks_within_each_other_end_with_the_outermost() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        with Uninterrupted():
            press()
        done.append("the inner one")
    assert done == ["the inner one"]


def test_an_error_of_the_block_is_the_context_of_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Uninterrupted():
        press()
        raise ValueError("of the step")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_second_one_is_not_held_off() -> None:
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        press()
        press()
        pytest.fail("it was held off twice")


def test_inside_it_may_act_at_once_again() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        try:
            with Interruptible():
                press()
                done.append("too late")
        finally:
            with Uninterrupted():
                done.append("made whole")
    assert done == ["made whole"]


def test_what_came_before_acts_where_it_may() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        press()
        with Interruptible():
            done.append("too late")
    assert not done


def test_a_step_within_what_may_be_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted(), Interruptible():
        with Uninterrupted():
            press()
            done.append("the step")
        done.append("too late")
    assert done == ["the step"]


def test_it_ends_a_long_wait_with_the_lock_held() -> None:
    changed, whole = threading.Condition(), []
    with interrupted(0.1), pytest.raises(KeyboardInterrupt), Uninterrupted(), changed:
        try:
            wait_for(changed, lambda: False)
        finally:
            whole.append(changed._is_owned())
    assert whole == [True]


@pytest.mark.parametrize("held", [True, False])
def test_a_wait_says_whether_it_was_worth_it(held: bool) -> None:
    changed, there = threading.Condition(), []

    def come() -> None:
        with changed:
            there.append(True)
            changed.notify_all()

    def look() -> list[bool]:
        threading.Timer(0.3, come).start()
        with changed:
            return [wait_for(changed, lambda: there, timeout_s) for timeout_s in (0.06, 0.0, None, 0.0)]

    if held:
        with Uninterrupted():
            assert look() == [False, False, True, True]
    else:
        assert look() == [False, False, True, True]


def test_other_threads_hold_nothing_off() -> None:
    def elsewhere() -> None:
        with Uninterrupted():
            inside.set()
            go_on.wait(10)

    inside, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(KeyboardInterrupt):
        press()
    go_on.set()
    thread.join()


def test_who_ignores_it_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Uninterrupted():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    def own(*_: object) -> None: ...

    with Uninterrupted(), Interruptible():
        signal.signal(signal.SIGINT, own)
        with Uninterrupted():
            pass
        assert signal.getsignal(signal.SIGINT) is own
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_that_counts_is_told_of_each() -> None:
    told = []
    signal.signal(signal.SIGINT, lambda *_: told.append(1))
    with Uninterrupted():
        press()
        press()
        press()
    assert len(told) == 3
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_child_that_another_thread_forks_meanwhile_can_be_interrupted() -> None:
    status: list[int] = []

    def fork() -> None:
        child = os.fork()
        if not child:
            try:
                with Uninterrupted():
                    press()
                os._exit(7)
            except KeyboardInterrupt:
                os._exit(0)
        status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with Uninterrupted():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join(30)
    assert status == [0]


# what a call would have handed out, or counted


def pressing(call: Callable[..., object]) -> Callable[..., object]:
    """`call`, during which someone presses Ctrl-C."""

    def pressed(*args: object, **options: object) -> object:
        press()
        return call(*args, **options)

    return pressed


def test_a_session_that_nobody_was_given_is_closed(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.save(tmp_path / "saved")
    pager = rig.sessions.pager
    calls = (
        (pager.tiers, "expect_sessions", rig.open),
        (pager.tiers, "expect_sessions", session.fork),
        (pager, "add_checkpoint", lambda: load_session(tmp_path / "saved", rig.served, rig.sessions)),
    )
    for owner, name, call in calls:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, pressing(getattr(owner, name)))
            call()
        assert [info.id for info in rig.sessions.infos()] == [session.id]


def test_a_runtime_that_nobody_was_given_is_closed(monkeypatch) -> None:
    opened: list[CpuDevice] = []

    def open_and_keep(*args: object, **options: object) -> CpuDevice:
        opened.append(open_device(*args, **options))
        return opened[-1]

    monkeypatch.setattr(runtime_module, "open_device", open_and_keep)
    monkeypatch.setattr(runtime_module, "Ledger", pressing(runtime_module.Ledger))
    with pytest.raises(KeyboardInterrupt):
        Runtime("cpu", **MEMORY)
    assert [device._closed for device in opened] == [True]


def test_a_model_that_nobody_was_given_holds_nothing() -> None:
    with Runtime("cpu", **MEMORY) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.load(LLAMA, prove=False, progress=lambda done, total: press() if done == total else None)
        assert not runtime.models and runtime.pool.held_bytes == runtime.host.held_bytes == 0


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_pass_that_raises_it_has_not_been(rig: Rig, monkeypatch, stop_after: int | None) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    session.forward(prompt())
    oracle.forward(prompt())
    pager = rig.sessions.pager
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pager, "settle", pressing(pager.settle))
        session.forward(prompt(seed=2), stop_after=stop_after)
    assert session.length == 12 and torch.equal(session.ids, prompt()) and session.stopped is None
    assert torch.equal(session.forward(prompt(seed=2)), oracle.forward(prompt(seed=2)))


# it acts at once


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """Ctrl-C after a moment, which ends a block that others hold up for `HELD_UP_S`."""
    begun_s = time.monotonic()
    with interrupted(0.1), pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - begun_s < HELD_UP_S / 2, "it was held off"


@contextlib.contextmanager
def held(lock) -> Iterator[None]:
    """Another thread has `lock`."""
    taken, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            go_on.wait(HELD_UP_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(10)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def test_in_a_models_layer(rig: Rig) -> None:
    session = rig.open()
    hook = rig.served.model.layers[1].register_forward_pre_hook(lambda *_: time.sleep(HELD_UP_S))
    with soon():
        session.forward(prompt())
    hook.remove()
    assert torch.equal(session.forward(prompt()), Oracle(rig.stock).forward(prompt()))


def test_where_another_has_the_turn(rig: Rig) -> None:
    session = rig.open()
    with held(rig.served._djinn_boundary._turn), soon():
        session.forward(prompt())
    assert torch.equal(session.forward(prompt()), Oracle(rig.stock).forward(prompt()))


def test_where_another_uses_a_session_that_is_to_be_closed(rig: Rig) -> None:
    session = rig.open()
    with held(session._holding.user), soon():
        rig.sessions.close()
    session.forward(prompt())


def test_where_another_saves(rig: Rig, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt())
    with held(rig.sessions.pager.saving), soon():
        session.save(tmp_path / "saved")
    session.save(tmp_path / "saved")


def test_where_others_have_the_slots(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    with rig.sessions.pager.lock:
        assert rig.sessions.pager.lock.wait_for(lambda: session.stopped.boundary.settled, 10)
    staging = rig.sessions.pager.staging
    slots = [staging.take(Way()) for _ in range(INBOUND_SLOTS)]
    with soon():
        session.resume()
    for slot in slots:
        staging.give_back(slot)
    assert torch.equal(session.resume(), Oracle(rig.stock).forward(prompt()))


def test_where_a_session_is_waited_for(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    asked, go_on, acquire = threading.Event(), threading.Event(), rig.sessions.pager.acquire

    def slow(*args: object, **options: object) -> object:
        asked.set()
        go_on.wait(HELD_UP_S)
        return acquire(*args, **options)

    monkeypatch.setattr(rig.sessions.pager, "acquire", slow)
    session.prefetch()
    assert asked.wait(10)
    with soon():
        session.wait_until("restored", HELD_UP_S)
    go_on.set()


def test_while_weights_are_read(monkeypatch) -> None:
    read = SeededSource.read_into

    def slow(*args: object) -> None:
        time.sleep(0.2)  # some 90 tensors, three at once
        read(*args)

    monkeypatch.setattr(SeededSource, "read_into", slow)
    with Runtime("cpu", **MEMORY) as runtime:
        with soon():
            runtime.load(LLAMA, prove=False)
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0


def test_while_a_saved_session_is_checked(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.save(tmp_path / "saved")
    monkeypatch.setattr(TensorFile, "_check", lambda *_: time.sleep(HELD_UP_S))
    with soon():
        load_session(tmp_path / "saved", rig.served, rig.sessions)
    assert len(rig.sessions.infos()) == 1
