"""Giving memory up: layers are unmapped while later ones are being copied, and nothing is lost when that stops."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import UsageError
from djinn_core.sessions import SessionState, bringin, writeback
from tests.sessions.oracle import Oracle, equal, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, released, wait_for

LINK_GBPS = 0.0002  # 15 tokens of a layer take 38 ms
LAYER_BYTES = 64 << 10


def test_memory_comes_back_layer_by_layer(make_rig: MakeRig, monkeypatch) -> None:
    monkeypatch.setattr(writeback, "GROUP_BYTES", 1)
    rig = make_rig()
    session = rig.open()
    first = session.forward(prompt())
    rig.device.link_gbps = LINK_GBPS
    left, give_back = [], rig.pool.give_back

    def watched(extent) -> None:
        give_back(extent)
        left.append((not rig.sessions.pager.d2h.query(), rig.kv_bytes // LAYER_BYTES))

    monkeypatch.setattr(rig.pool, "give_back", watched)
    begun_s = time.perf_counter()
    session.pause(release=True)
    pause_s = time.perf_counter() - begun_s
    session.wait_until("released", 10)
    assert pause_s < 0.03
    assert [busy for busy, _ in left][:2] == [True, True], "layers left while later ones were still being copied"
    assert [layers for _, layers in left] == [3, 2, 1, 0]
    rig.device.link_gbps = None
    session.resume()
    oracle = Oracle(rig.stock)
    wanted = oracle.greedy(oracle.forward(prompt()), 1)[0]
    assert torch.equal(session.forward(first.float().argmax(-1)[:, None]), wanted)


def test_a_resume_ends_the_release_where_it_is(make_rig: MakeRig, monkeypatch) -> None:
    monkeypatch.setattr(writeback, "GROUP_BYTES", 1)
    rig = make_rig()
    session = rig.open()
    first = session.forward(prompt())
    rig.device.link_gbps = LINK_GBPS
    session.pause(release=True)
    while rig.kv_bytes > 2 * LAYER_BYTES:
        time.sleep(0.001)
    copied = rig.device.copied
    session.resume()
    oracle = Oracle(rig.stock)
    wanted = oracle.greedy(oracle.forward(prompt()), 1)[0]
    assert torch.equal(session.forward(first.float().argmax(-1)[:, None]), wanted)
    assert 0 < (rig.device.copied - copied).h2d_bytes < LAYERS * LAYER_BYTES
    time.sleep(0.2)
    assert session.state is SessionState.RUNNING and rig.kv_bytes == LAYERS * LAYER_BYTES
    assert any(event.event == "evict" and 0 < event.bytes < LAYERS * LAYER_BYTES for event in rig.sessions.pager.events)


def test_a_pause_never_pins(make_rig: MakeRig) -> None:
    """What the open sessions may need is pinned in the background, before any of them pauses."""
    rig = make_rig(host_bytes=64 * LAYERS * LAYER_BYTES)
    pinning: list[str] = []
    pin = rig.device.pin

    def watched(address: int, size_bytes: int) -> None:
        pinning.append(threading.current_thread().name)
        pin(address, size_bytes)

    rig.device.pin = watched
    sessions = [rig.open() for _ in range(9)]
    deadline = time.monotonic() + 10
    while rig.host.pinned_bytes < 9 * LAYERS * LAYER_BYTES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rig.host.pinned_bytes >= 9 * LAYERS * LAYER_BYTES
    for seed, session in enumerate(sessions):
        session.forward(prompt(seed=seed))
        session.pause()
    for session in sessions:
        session.wait_until("clean", 10)
    assert set(pinning) == {"djinn-pin-ahead"}


def test_a_session_that_lends_to_another_leaves_when_that_has_what_it_needs(make_rig: MakeRig) -> None:
    rig = make_rig()
    session = rig.open()
    session.forward(prompt())
    pager, holding = rig.sessions.pager, session._holding
    with pager.lock:
        holding.pins += 1  # a bring-in of a branch maps what this session has
    session.pause(release=True)
    assert not pager.evict(holding, wait=False), "who makes room may be the one whom the branch waits for"
    time.sleep(0.05)
    assert session.state is SessionState.PAUSED
    with pager.lock:
        holding.pins -= 1
        pager.lock.notify_all()
    session.wait_until("released", 10)


def test_what_is_remembered_of_a_session_follows_what_leaves_the_device(make_rig: MakeRig) -> None:
    rig = make_rig()
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    holding = session._holding
    assert holding.seems_to_free() == LAYERS * LAYER_BYTES
    pager.displace(holding, [next(iter(holding.mapped.values()))])
    assert holding.seems_to_free() == (LAYERS - 1) * LAYER_BYTES


def test_what_is_remembered_of_a_session_follows_its_lineage(make_rig: MakeRig) -> None:
    rig = make_rig()
    session, pager = rig.open(max_length=250), rig.sessions.pager
    short = session.forward(prompt(), stop_after=LAYERS // 2)
    session.resume()
    session.forward(prompt(tokens=200))
    session.pause(release=True)
    session.wait_until("released", 10)
    holding = session._holding
    assert holding.seems_to_miss() == 2 * LAYERS * LAYER_BYTES
    pager.adopt(holding, short)
    assert holding.seems_to_miss() == LAYERS * LAYER_BYTES


@pytest.mark.parametrize("away", [True, False])
def test_who_is_paused_can_say_anew_when_it_will_be_wanted(rig: Rig, away: bool) -> None:
    """And stays where it is until then: whether it has left meanwhile, its owner does not know."""
    session = rig.open()
    logits = session.forward(prompt())
    session.pause(expected_resume_s=600.0, release=away)
    if away:
        session.wait_until("released", 10)
    before = session._holding.paused_s, session._holding.last_use_s
    session.pause(expected_resume_s=500.0)
    assert session.state is (SessionState.SWAPPED if away else SessionState.PAUSED)
    assert (session._holding.paused_s, session._holding.last_use_s) == before, "one pause, from when it began"
    if away:
        session.wait_until("released", 1)
        session.pause(expected_resume_s=0.2)
        wait_for(lambda: session.device_bytes)
        assert session.state is SessionState.PAUSED
    else:
        session.pause(release=True)
        session.wait_until("released", 10)
        assert session._holding.expected_resume_s is None and not session.device_bytes
    session.prefetch()
    session.wait_until("restored", 10)
    session.resume()
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    assert equal(speak(session, logits, 2), oracle.greedy(logits, 2))


def test_who_fell_back_after_a_failed_copy_may_be_paused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner takes it to run; his hint is not lost."""
    monkeypatch.setattr(bringin, "STEP_BYTES", 1)
    session = released(rig)
    rig.device.faults = FaultPlan().fail("copy", LAYERS)
    session.resume()
    wait_for(lambda: session.state is not SessionState.RESUMING)
    session.pause(expected_resume_s=300.0)
    assert session.state in (SessionState.PAUSED, SessionState.SWAPPED)
    assert session._holding.expected_resume_s is not None


@pytest.mark.parametrize("hint", [2, np.int64(2), np.float32(2), 2.0])
def test_a_hint_is_a_number_of_seconds(rig: Rig, hint: float) -> None:
    session = rig.open()
    session.pause(expected_resume_s=hint)
    assert session._holding.expected_resume_s == pytest.approx(time.monotonic() + 2, abs=1)
    for wrong in (True, "2", float("nan"), np.float32("inf"), 1e9):
        with pytest.raises(UsageError, match="give seconds from now"):
            session.pause(expected_resume_s=wrong)
    assert session._holding.expected_resume_s == pytest.approx(time.monotonic() + 2, abs=1)
