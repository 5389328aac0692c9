"""A pause that gives its memory up does so itself where that is little, and leaves the rest to the writer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from djinn_core.device.base import Event
from djinn_core.sessions import SessionState
from djinn_core.sessions import pager as pager_module
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import Rig

LINK_GBPS = 0.0002  # the tokens of a layer take 31 ms

pytestmark = pytest.mark.timeout(60)


class Held:
    """The writer's queue, in which nothing arrives meanwhile."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.items: list[object] = []
        self.put, self.get = self.items.append, rig.sessions.pager._out.get
        monkeypatch.setattr(rig.sessions.pager, "_out", self)


def test_a_pause_that_has_little_to_do_does_it_itself(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=3)
    rig.device.synchronize()
    held = Held(rig, monkeypatch)
    session.pause(release=True)
    assert session.state is SessionState.SWAPPED and session.device_bytes == 0
    assert not held.items
    monkeypatch.undo()
    assert torch.equal(session.resume(), Oracle(rig.stock).forward(prompt()))


class Asked:
    """The event behind a pass, which answers as it is told."""

    def __init__(self, event: Event, answer: Callable[[], bool]) -> None:
        self.query, self.event = answer, event

    def __getattr__(self, name: str) -> object:
        return getattr(self.event, name)


def broken() -> bool:
    raise RuntimeError("the driver says no")


@pytest.mark.parametrize(
    "why",
    [
        "copies are under way",
        "much to unmap",
        "no release",
        "not on the host",
        "a pass is under way",
        "a device that fails",
        "somebody borrows",
    ],
)
def test_a_pause_that_has_more_to_do_leaves_it_to_the_writer(rig: Rig, monkeypatch, why: str) -> None:
    session = rig.open()
    if why == "copies are under way":
        rig.device.link_gbps = LINK_GBPS
    session.forward(prompt(), stop_after=None if why == "not on the host" else 3)
    if why != "copies are under way":
        rig.device.synchronize()
    if why == "much to unmap":
        monkeypatch.setattr(pager_module, "AT_ONCE_BLOCKS", 2)
    holding = session._holding
    if why in ("a pass is under way", "a device that fails"):
        monkeypatch.setattr(holding, "pass_done", Asked(holding.pass_done, broken if "fails" in why else lambda: False))
    if why == "somebody borrows":
        monkeypatch.setattr(holding, "pins", 1)
    held = Held(rig, monkeypatch)
    session.pause(release=why != "no release")
    assert session.state is SessionState.PAUSED and session.device_bytes > 0
    monkeypatch.undo()
    rig.sessions.pager._out.put(*held.items)
    session.wait_until("clean" if why == "no release" else "released", 10)
    assert (session.device_bytes > 0) == (why == "no release")
