"""A caller that goes away, and host memory that cannot be had: nobody else notices, and no state is lost."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import PinningRefused
from djinn_core.sessions import Session, SessionState
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import MakeRig, Rig


def run_in_thread(work) -> None:
    """`work` in a thread of its own, which has ended on return, whatever ended it."""

    def quietly() -> None:
        with contextlib.suppress(SystemExit):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "deadlock"


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_thread_that_ends_with_its_session_open(rig: Rig, stop_after) -> None:
    """The session stays whole and RUNNING; whoever has a reference goes on with it."""
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    following = oracle.greedy(first, 1)[0]
    left: list[Session] = []

    def work() -> None:
        left.append(rig.open())
        left[0].forward(prompt(), stop_after=stop_after)

    run_in_thread(work)
    other = rig.open()
    assert torch.equal(other.forward(prompt()), first)
    session = left[0]
    assert session.state is SessionState.RUNNING
    session.pause(release=True)
    session.wait_until("released", 10)
    logits = session.resume()
    assert torch.equal(session.logits if stop_after is None else logits, first)
    assert torch.equal(session.forward(likely(first)), following)


@pytest.mark.parametrize("resuming", [False, True])
def test_a_thread_that_dies_in_the_middle_of_a_pass(rig: Rig, resuming) -> None:
    """The turn on the device is given back, and the session stands where it stood before the pass."""
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    session = rig.open()
    if resuming:
        session.forward(prompt(), stop_after=1)
        session.pause(release=True)
        session.wait_until("released", 10)

    def die(*args) -> None:
        raise SystemExit  # what ends a thread without a word

    handle = rig.served.model.layers[2].register_forward_hook(die)
    run_in_thread(session.resume if resuming else lambda: session.forward(prompt()))
    handle.remove()
    other = rig.open()
    assert torch.equal(other.forward(prompt()), first)
    assert torch.equal(session.resume() if resuming else session.forward(prompt()), first)


def test_refused_pinning_leaves_a_pause_dirty_and_whole(make_rig: MakeRig) -> None:
    """A write-back that gets no pinned memory says so, and the session stays on the device until it can be tried."""
    rig = make_rig()
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    rig.device.faults = plan = refusing()  # before anything is pinned ahead
    session = rig.open()
    session.forward(prompt())
    session.pause(release=True)
    with pytest.raises(PinningRefused):
        session.wait_until("released", 10)
    rig.device.faults = None
    assert "pin" in plan.fired and rig.host.held_bytes == 0
    assert session.state is SessionState.PAUSED and session.device_bytes > 0
    assert session.resume() is None
    assert torch.equal(session.forward(likely(first)), oracle.greedy(first, 1)[0])
    session.pause(release=True)
    session.wait_until("released", 10)


def refusing() -> FaultPlan:
    """Every pin of the next hundred is refused."""
    plan = FaultPlan()
    for nth in range(1, 101):
        plan.fail("pin", nth)
    return plan
