"""Each map, copy and allocation fails once: the session stays resumable, and ends with the oracle's bits."""

from __future__ import annotations

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DjinnError
from djinn_core.sessions import SessionState
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import MakeRig

SEQUENCE = ("open", "forward", "stop", "pause", "resume", "decode", "back", "again", "fork")


class Play:
    """One fixed play over a session; every scene can be tried again until it succeeds."""

    def __init__(self, rig) -> None:
        self.rig = rig
        oracle = Oracle(rig.stock)
        self.first = oracle.forward(prompt())
        self.second, self.third = oracle.greedy(self.first, 2)

    def token(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().argmax(-1)[:, None]

    def back_to_running(self, session) -> None:
        if session.state in (SessionState.PAUSED, SessionState.SWAPPED) and session.stopped is None:
            session.resume()

    def open(self) -> None:
        self.session = self.rig.open()

    def forward(self) -> None:
        self.back_to_running(self.session)
        assert torch.equal(self.session.forward(prompt()), self.first)

    def stop(self) -> None:
        self.back_to_running(self.session)
        self.point = self.session.forward(self.token(self.first), stop_after=2)

    def pause(self) -> None:
        if self.session.state in (SessionState.RUNNING, SessionState.RESUMING):
            self.session.pause(release=True)
        self.rig.sessions.pager.evict(self.session._holding)
        assert self.session.state is SessionState.SWAPPED

    def resume(self) -> None:
        assert torch.equal(self.session.resume(), self.second)

    def decode(self) -> None:
        self.back_to_running(self.session)
        assert torch.equal(self.session.forward(self.token(self.second)), self.third)

    def back(self) -> None:
        self.session.wait_until("restored", 10)
        self.session.checkpoint()
        assert torch.equal(self.session.resume(self.point), self.second)

    def again(self) -> None:
        self.back_to_running(self.session)
        assert torch.equal(self.session.forward(self.token(self.second)), self.third)

    def fork(self) -> None:
        branch = self.session.fork()
        try:
            assert torch.equal(branch.resume(branch.checkpoints[0]), self.second)
        finally:
            branch.close()

    def run(self, plan: FaultPlan | None) -> int:
        """Play it through, trying a scene again after a failure; returns how many scenes failed once."""
        self.rig.device.faults = plan
        failures = 0
        for name in SEQUENCE:
            for attempt in range(4):
                try:
                    getattr(self, name)()
                    break
                except DjinnError:
                    failures += 1
                    assert attempt < 3, f"{name} does not recover"
        self.rig.device.faults = None
        self.session.close()
        return failures


def count_calls(make_rig: MakeRig) -> FaultPlan:
    rig, plan = make_rig(), FaultPlan()
    assert Play(rig).run(plan) == 0
    return plan


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("call", ["create", "map", "grant", "unmap", "copy"])
def test_each_call_fails_once(make_rig: MakeRig, call, asynchronous) -> None:
    if asynchronous and call != "copy":
        pytest.skip("only copies fail later than they are issued")
    total = count_calls(make_rig).counts[call]
    assert total > 3
    fired = failed = 0
    for nth in range(1, total + 1):
        rig = make_rig()
        plan = FaultPlan().fail(call, nth, asynchronous=asynchronous)
        failed += Play(rig).run(plan)
        fired += len(plan.fired)
        rig.close()
    assert fired >= total * 0.8, (fired, total)
    assert failed > 0
