"""A step that fails, and what would undo it fails too: nobody is told what is not so, and nothing stays for ever."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError, DjinnError, IntegrityError, SessionStateError, TransferError
from djinn_core.sessions import Session, SessionState
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.pager import Pager
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak
from tests.sessions.rigs import LAYERS, Rig

pytestmark = pytest.mark.timeout(60)


def spoken(rig: Rig) -> tuple[Session, list[torch.Tensor], list[torch.Tensor]]:
    """A session, what it said to its prompt, and what the stock model says after that."""
    session, oracle = rig.open(), Oracle(rig.stock)
    logits = oracle.forward(prompt())
    assert torch.equal(session.forward(prompt()), logits)
    return session, logits, oracle.greedy(logits, 3)


def unmap_in_vain(rig: Rig, session: Session) -> None:
    """Unmap two layers that are no neighbours: the second is refused, and so is the map that would undo the first."""
    blocks = list(session._holding.mapped.values())
    rig.device.faults = FaultPlan().fail("unmap", 2).fail("map")
    with pytest.raises(DeviceError, match="unmap number 2"):
        rig.sessions.pager._unmap(session._holding, [blocks[0], blocks[2]])
    assert rig.device.faults.fired == ["unmap", "map"]
    rig.device.faults = None


def test_what_could_not_be_mapped_again_is_brought_back(rig: Rig) -> None:
    session, logits, wanted = spoken(rig)
    session.pause()
    session.wait_until("clean", 10)
    unmap_in_vain(rig, session)
    assert len(session._holding.mapped) == LAYERS - 1
    session.resume()
    assert equal(speak(session, logits, 3), wanted)
    session.close()
    assert not rig.kv_bytes


def test_what_could_not_be_mapped_again_and_nobody_else_has_is_said_to_be_lost(rig: Rig) -> None:
    session, logits, _ = spoken(rig)
    unmap_in_vain(rig, session)
    assert session.state is SessionState.FAILED
    with pytest.raises(SessionStateError, match="a part of its state was lost") as told:
        session.forward(likely(logits))
    assert isinstance(told.value.__cause__, IntegrityError) and "only the device had" in str(told.value.__cause__)
    session.close()
    assert not rig.kv_bytes


@pytest.mark.parametrize("nth", range(1, LAYERS + 1))
def test_a_pass_whose_claim_could_not_be_undone_is_tried_again(rig: Rig, nth: int) -> None:
    """The fork has to copy its tails, and one copy fails; what was mapped for it stays mapped at first."""
    parent, logits, wanted = spoken(rig)
    session = parent.fork()
    parent.forward(likely(logits))
    session.resume()
    faults = rig.device.faults = FaultPlan().fail("copy", nth).fail("unmap", 2)
    with pytest.raises(DjinnError):
        session.forward(likely(logits))
    assert faults.fired == ["copy", "unmap"]
    rig.device.faults = None
    if session.state is not SessionState.RUNNING:
        session.resume()
    assert equal(speak(session, logits, 3), wanted)
    for each in (session, parent):
        each.close()
    assert not rig.kv_bytes


def test_a_bring_in_that_failed_is_told_of_once(rig: Rig) -> None:
    """Also where a later one has brought the same layer, so that nothing of it is missing."""
    session, logits, wanted = spoken(rig)
    holding = session._holding

    def fail() -> None:
        raise TransferError("planned")

    failed = BringIn(rig.sessions.pager, holding, range(LAYERS), list(holding.table.lengths))
    failed.finish(None)
    failed.arrival[0] = SimpleNamespace(query=fail, synchronize=fail)
    holding.jobs.append(failed)
    holding.table.writable_until = 0
    with pytest.raises(TransferError, match="planned"):
        session.forward(likely(logits))
    assert session.state is SessionState.PAUSED and not holding.jobs
    session.resume()
    assert equal(speak(session, logits, 3), wanted)


def test_a_boundary_goes_back_also_where_what_failed_cannot_be_undone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, logits, _ = spoken(rig)
    held_bytes, abandon = rig.host.held_bytes, Pager.abandon

    def fail(*_: object) -> None:
        raise DeviceError("planned")

    def abandoned(pager: Pager, *given: object) -> None:
        abandon(pager, *given)
        fail()

    monkeypatch.setattr(Pager, "abandon", abandoned)
    hook = rig.served.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(DeviceError, match="planned"):
        session.forward(likely(logits), stop_after=2)
    hook.remove()
    assert rig.host.held_bytes == held_bytes
