"""Orphans: what going back leaves without a holder is given up when the pass has been issued, and never lost."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from djinn_core.errors import DeviceError
from djinn_core.sessions import Session
from djinn_core.sessions.staging import INBOUND_SLOTS
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig

UNIT = 64 << 10  # a layer of a short session


def gone_on_and_away(rig: Rig) -> tuple[Session, torch.Tensor]:
    """A session that stopped after layer 1, went on, and left the device: the host has all four layers."""
    session = rig.open()
    session.forward(prompt(), stop_after=1)
    logits = session.resume()
    session.pause(release=True)
    session.wait_until("released", 10)
    return session, logits


def fail_to_go_back(rig: Rig, session: Session, monkeypatch) -> None:
    """A resume of its first checkpoint that fails before the pass begins."""

    def fail(*_: object, **__: object) -> None:
        raise DeviceError("no extents today")

    with monkeypatch.context() as patch, pytest.raises(DeviceError):
        patch.setattr(rig.sessions.pager, "take_free", fail)
        session.resume(session.checkpoints[0])


def test_what_going_back_leaves_behind_is_given_up_when_the_pass_has_been_issued(rig: Rig) -> None:
    session, logits = gone_on_and_away(rig)
    (point,) = session.checkpoints
    held, seen = rig.host.held_bytes, []
    hook = rig.served.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(rig.host.held_bytes))
    assert torch.equal(session.resume(point), logits)
    hook.remove()
    assert seen == [held] and rig.host.held_bytes == held - 3 * UNIT
    session.pause(release=True)
    session.wait_until("released", 10)
    start = session.checkpoint()
    session.resume(start)
    session.forward(logits.float().argmax(-1)[:, None])
    session.resume(point)
    assert not session._holding.orphans


def test_between_tokens_it_is_given_up_at_once(rig: Rig) -> None:
    session = rig.open()
    start = session.checkpoint()
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume(start)
    assert rig.host.held_bytes == 0 and not session._holding.orphans


def test_a_full_host_takes_it_before_anything_else(make_rig: MakeRig) -> None:
    rig = make_rig(host_bytes=5 * UNIT)  # four layers and one boundary
    session, logits = gone_on_and_away(rig)
    (point,) = session.checkpoints
    assert rig.host.free_bytes == 0
    stop = session.resume(point, stop_after=2)
    assert stop.layer == 2
    assert torch.equal(session.resume(), logits)
    rig.close()


def test_a_resume_that_fails_before_its_pass_leaves_it_to_the_next(rig: Rig, monkeypatch) -> None:
    session, logits = gone_on_and_away(rig)
    (point,) = session.checkpoints

    fail_to_go_back(rig, session, monkeypatch)
    assert len(session._holding.orphans) == 3
    assert torch.equal(session.resume(point), logits)
    assert not session._holding.orphans


def test_a_session_that_could_not_go_back_closes_with_nothing_left(rig: Rig, monkeypatch) -> None:
    session, _ = gone_on_and_away(rig)

    fail_to_go_back(rig, session, monkeypatch)
    assert session._holding.orphans
    session.close()
    assert rig.host.held_bytes == 0


def test_what_a_later_checkpoint_refers_to_is_not_given_up(rig: Rig) -> None:
    session, logits = gone_on_and_away(rig)
    (point,) = session.checkpoints
    later = session.checkpoint()
    session.resume(point)
    assert not session._holding.orphans
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume(later)
    oracle = Oracle(rig.stock)
    (wanted,) = oracle.greedy(oracle.forward(prompt()), 1)
    assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), wanted)


def test_ctrl_c_while_orphans_are_given_up(rig: Rig, monkeypatch) -> None:
    session, logits = gone_on_and_away(rig)
    (point,) = session.checkpoints
    discard, calls = rig.sessions.pager.tiers.discard, []

    def fail(stored) -> None:
        calls.append(stored)
        if len(calls) == 2:
            raise KeyboardInterrupt
        discard(stored)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rig.sessions.pager.tiers, "discard", fail)
        session.resume(point)
    assert torch.equal(session.resume(point), logits)
    session.close()
    assert rig.host.held_bytes == 0


def test_admission_counts_orphans_as_the_sessions_own(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(device_bytes=(LAYERS + INBOUND_SLOTS + 1) * UNIT, host_bytes=2 * LAYERS * UNIT)
    session, _ = gone_on_and_away(rig)

    fail_to_go_back(rig, session, monkeypatch)
    assert session._holding.orphans
    rig.open()
    rig.close()


def test_two_who_give_up_the_same_while_one_of_them_is_read_lose_none(rig: Rig) -> None:
    session, _ = gone_on_and_away(rig)
    pager, holding = rig.sessions.pager, session._holding
    session.drop(session.checkpoints[0])
    blank = rig.open()._holding.table
    with pager.lock:
        holding.orphans += holding.table.assign(blank.lengths, blank.blocks)
        read = holding.orphans[-1]
        read.readers += 1  # on its way to disk
    orphans = list(holding.orphans)
    with ThreadPoolExecutor(2) as pool:
        givers = [pool.submit(pager.tiers.discard_orphans, holding) for _ in range(2)]
        time.sleep(0.1)
        with pager.lock:
            assert read.host is not None
            read.readers -= 1
            pager.lock.notify_all()
        assert True in [giver.result(10) for giver in givers]
    assert len(orphans) == LAYERS and all(block.host is None for block in orphans)
