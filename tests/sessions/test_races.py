"""What the long day found, each made certain: two at once at the same blocks, and nothing is lost."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import pytest
import torch

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.sessions import Session, SessionState, snapshot
from djinn_core.sessions.policy import ExpectedLast
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import MakeRig, Rig

SESSION_BYTES = 4 * (64 << 10)

pytestmark = pytest.mark.timeout(60)


def likely(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().argmax(-1)[:, None]


def begun(rig: Rig) -> tuple[Session, torch.Tensor, torch.Tensor]:
    """A session that holds a prompt; the next pass's ids and logits."""
    oracle = Oracle(rig.stock)
    session = rig.open()
    ids = likely(oracle.forward(prompt()))
    session.forward(prompt())
    return session, ids, oracle.forward(ids)


def test_two_that_share_blocks_and_leave_at_once(rig: Rig, monkeypatch) -> None:
    """Neither may rely on the other's keeping them on the device."""
    pager = rig.sessions.pager
    one, ids, wanted = begun(rig)
    two = one.fork()
    two.resume()
    two.wait_until("restored", 10)
    with monkeypatch.context() as patch:
        patch.setattr(pager, "_out", queue.SimpleQueue())  # nothing is written back at the pause
        one.pause()
        two.pause()
    blocks = list(one._holding.table)
    assert all(len(block.places) == 2 and not block.host_valid_bytes for block in blocks)
    with pager.leaving(one._holding):
        assert pager.evict(two._holding)
    assert all(block.host_valid_bytes >= block.end_bytes() for block in blocks)
    assert pager.evict(one._holding)
    for session in (one, two):
        session.resume()
        assert torch.equal(session.forward(ids), wanted)


def test_what_is_being_saved_stays_on_the_host(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    pager = rig.sessions.pager
    session, ids, wanted = begun(rig)
    write, tried = snapshot.write_tensors, []

    def others_want_room(*args):
        for block in session._holding.table:
            tried.append(pager.tiers._drop_repeated(block))
        return write(*args)

    monkeypatch.setattr(snapshot, "write_tensors", others_want_room)
    session.save(tmp_path / "saved")
    assert tried == [0] * 4
    freed = [pager.tiers._drop_repeated(block) for block in session._holding.table]
    assert all(freed), "nobody holds them any more"
    session.close()
    again = snapshot.load_session(tmp_path / "saved", rig.served, rig.sessions)
    again.resume()
    assert torch.equal(again.forward(ids), wanted)


def test_a_save_whose_copies_are_taken_away_makes_them_anew(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    pager = rig.sessions.pager
    session, ids, wanted = begun(rig)
    collect = snapshot._Collector

    def taken(saved: Session):
        for block in saved._holding.table:
            assert pager.tiers._drop_repeated(block)
        return collect(saved)

    monkeypatch.setattr(snapshot, "_Collector", taken)
    session.save(tmp_path / "saved")
    session.close()
    again = snapshot.load_session(tmp_path / "saved", rig.served, rig.sessions)
    again.resume()
    assert torch.equal(again.forward(ids), wanted)


def test_no_prefetch_begins_while_a_session_goes_back_or_closes(rig: Rig) -> None:
    session, ids, wanted = begun(rig)
    session.pause(release=True)
    session.wait_until("released", 10)
    holding, pager = session._holding, rig.sessions.pager
    with holding.changed(pager.lock):
        pager.prefetch(holding)
        assert not holding.jobs
    pager.prefetch(holding)
    assert holding.jobs
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def test_two_that_want_the_same_from_disk(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=8 * SESSION_BYTES)
    tiers = rig.sessions.pager.tiers
    session, ids, wanted = begun(rig)
    session.pause(release=True)
    session.wait_until("released", 10)
    block = next(iter(session._holding.table))
    assert tiers._spill(session._holding, block)
    read, errors = rig.disk.read, []

    def slow(*args):
        read(*args)
        time.sleep(0.1)

    def fetch() -> None:
        try:
            tiers.fetch(block, session.id)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    monkeypatch.setattr(rig.disk, "read", slow)
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and block.host_valid_bytes == block.end_bytes() and block.disk is None
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def test_checkpoints_of_a_running_session_make_room_on_the_host(make_rig: MakeRig) -> None:
    """Its past lies on the host and nowhere else, and nobody else is off the device: it can go to disk."""
    rig = make_rig(host_bytes=2 * SESSION_BYTES, disk_bytes=16 * SESSION_BYTES)
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    session = rig.open()
    session.checkpoint()
    points = []
    for _ in range(4):
        session.resume(session.checkpoints[0])
        assert torch.equal(session.forward(prompt()), first)
        points.append(session.checkpoint())
    for point in points:
        session.resume(point)
        assert session.state in (SessionState.RUNNING, SessionState.RESUMING)
    assert torch.equal(session.forward(likely(first)), oracle.forward(likely(first)))
    assert any(event.event == "disk_write" for event in rig.sessions.pager.events)


def test_a_prefetch_that_fails_under_a_resume_leaves_it_resumed(make_rig: MakeRig, monkeypatch) -> None:
    """The resume has taken over: a session that was paused by that failure could be evicted in the middle of a pass."""
    rig = make_rig()
    pager = rig.sessions.pager
    session, ids, wanted = begun(rig)
    session.pause(release=True)
    session.wait_until("released", 10)
    asked, go_on, acquire = threading.Event(), threading.Event(), pager.acquire

    def refuse_ahead(holding, sizes, limit_s=None):
        if threading.current_thread().name == "djinn-ahead":
            asked.set()
            assert go_on.wait(10)
            raise OutOfDeviceMemory("others are expected sooner", needed_bytes=1, free_bytes=0)
        return acquire(holding, sizes, limit_s)

    monkeypatch.setattr(pager, "acquire", refuse_ahead)
    monkeypatch.setattr(pager, "take_free", lambda owner, sizes: None)
    session.prefetch()
    assert asked.wait(10)
    monkeypatch.undo()
    resuming = threading.Thread(target=session.resume)
    resuming.start()
    with pager.lock:
        assert pager.lock.wait_for(lambda: session.state is SessionState.RESUMING, 10)
    go_on.set()
    resuming.join(10)
    session.wait_until("restored", 10)
    assert session.state is SessionState.RUNNING
    assert torch.equal(session.forward(ids), wanted)


def test_who_makes_room_does_not_wait_for_a_session_that_waits_for_him(make_rig: MakeRig, monkeypatch) -> None:
    """The one chosen to leave is resumed and paused before it is evicted: its bring-in waits for the same thread."""
    chosen, go_on = threading.Event(), threading.Event()

    class Asking(ExpectedLast):
        def choose(self, candidates, needed_bytes, now_s):
            names = super().choose(candidates, needed_bytes, now_s)
            if threading.current_thread().name == "djinn-ahead" and victim.id in names and not chosen.is_set():
                chosen.set()
                assert go_on.wait(10)
            return names

    rig = make_rig(policy=Asking(), device_bytes=2 * SESSION_BYTES)  # staging takes a part: two sessions do not fit
    pager, take_free = rig.sessions.pager, rig.sessions.pager.take_free
    victim, ids, wanted = begun(rig)
    start = victim.checkpoint()
    victim.forward(ids)
    point = victim.checkpoint()
    victim.resume(start)
    victim.forward(ids + 1)  # in blocks of its own: what `point` has is off the device
    victim.pause(release=True)
    victim.wait_until("released", 10)
    other, _, _ = begun(rig)
    other.pause(release=True)
    other.wait_until("released", 10)
    victim.prefetch()
    victim.wait_until("restored", 10)
    monkeypatch.setattr(
        pager,
        "take_free",
        lambda owner, sizes: None if threading.current_thread().name == "djinn-link" else take_free(owner, sizes),
    )
    other.resume()  # the thread that makes room chooses the victim
    assert chosen.wait(10)
    victim.resume(point)
    victim.pause()
    assert victim._holding.being_brought
    go_on.set()
    other.wait_until("restored", 10)
    monkeypatch.undo()
    other.pause()
    victim.resume()
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    assert torch.equal(oracle.forward(ids), wanted)
    token = likely(wanted)
    assert torch.equal(victim.forward(token), oracle.forward(token))
