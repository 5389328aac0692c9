"""What a bring-in mapped and could not unmap: nobody else gets it, and it goes when the session comes back or ends."""

from __future__ import annotations

import time

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError, DjinnError
from djinn_core.memory.regions import Region
from djinn_core.sessions.bringin import BringIn
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import Rig

pytestmark = pytest.mark.timeout(40)


def test_an_unmap_that_is_refused_when_a_bring_in_is_cancelled(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt())
    point = session.checkpoint()
    session.pause(release=True)
    session.wait_until("released", 10)
    for name in ("STEP_BYTES", "MAP_BYTES"):
        monkeypatch.setattr(f"djinn_core.sessions.bringin.{name}", 1)
    monkeypatch.setattr("djinn_core.sessions.link.QUEUED_BYTES", -1)
    rig.device.link_gbps = 0.00001
    session.resume()
    job, region = session._holding.jobs[0], session._holding.region
    give_up_s = time.monotonic() + 10
    while (sum(job.issued), len(region.mapped())) != (2, 3) and time.monotonic() < give_up_s:
        time.sleep(0.001)
    (ahead,) = set(region.mapped()) - set(session._holding.mapped)
    extent = region.mapped()[ahead]
    rig.device.faults = FaultPlan().fail("unmap", 1)  # one, once
    job.cancel()
    job.wait_issued()
    assert region.mapped().get(ahead) is extent and extent.held, "it is mapped still, and nobody else's"
    errors = []
    for _ in range(4):
        try:
            session.resume(point)
            session.wait_until("restored", 10)
            break
        except DjinnError as error:
            errors.append(str(error))
        rig.device.faults = rig.device.link_gbps = None
    rig.device.link_gbps = None
    assert len(errors) < 4, errors
    session.close()
    assert not extent.held


def test_what_a_fork_borrowed_and_could_not_unmap_stays_the_lenders(rig: Rig, monkeypatch) -> None:
    lender, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    lender.forward(prompt())
    fork, issue = lender.fork(), BringIn._issue

    def refuse(job, layers, stream):
        if job.holding is fork._holding:
            rig.device.faults = FaultPlan().fail("unmap", 1)
            raise DeviceError("refused")
        return issue(job, layers, stream)

    with monkeypatch.context() as patch, pytest.raises(DeviceError):
        patch.setattr(BringIn, "_issue", refuse)
        fork.resume()
        fork.wait_until("restored", 10)
        fork.forward(torch.tensor([[5]]))
    rig.device.faults = None
    assert fork._holding.region.mapped()
    fork.resume()
    fork.wait_until("restored", 10)
    assert all(block.device.held for block in lender._holding.mapped.values())
    other = rig.open()
    other.forward(prompt(seed=9))
    assert torch.equal(lender.forward(torch.tensor([[7]])), oracle.forward(torch.tensor([[7]])))


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_what_stays_mapped_is_nobody_elses(rig: Rig, monkeypatch, how) -> None:
    """A grant and the unmap that undoes its map are refused, or Ctrl-C comes as the grant returns."""
    session, other, plain = rig.open(), rig.open(), Region.map

    def interrupted(region, pieces):
        plain(region, pieces)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((DeviceError, KeyboardInterrupt)):
        if how == "interrupted":
            patch.setattr(Region, "map", interrupted)
        rig.device.faults = FaultPlan().fail("grant", 1).fail("unmap", 1) if how == "refused" else None
        session.forward(prompt())
    rig.device.faults = None
    other.forward(prompt(seed=4))
    handles = {extent.handle for extent in session._holding.region.mapped().values()}
    assert not handles & {block.device.handle for block in other._holding.mapped.values()}
    assert torch.equal(session.forward(prompt()), Oracle(rig.stock).forward(prompt()))
