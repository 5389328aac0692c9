"""What the long day found, each made certain: two at once at the same blocks, and nothing is lost."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import pytest
import torch

from djinn_core.errors import OutOfDeviceMemory, TransferError
from djinn_core.memory import Region
from djinn_core.sessions import Session, SessionState, blocks, snapshot, writeback
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.policy import ExpectedLast
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, wait_for

SESSION_BYTES = 4 * (64 << 10)

pytestmark = pytest.mark.timeout(60)


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

    def refuse_ahead(holding, sizes, limit_s=None, **options):
        if threading.current_thread().name == "djinn-ahead":
            asked.set()
            assert go_on.wait(10)
            raise OutOfDeviceMemory("others are expected sooner", needed_bytes=1, free_bytes=0)
        return acquire(holding, sizes, limit_s)

    monkeypatch.setattr(pager, "acquire", refuse_ahead)
    monkeypatch.setattr(pager, "take_free", lambda owner, sizes, **options: None)
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


def two_that_do_not_fit(rig: Rig) -> tuple[Session, Session, object, torch.Tensor, torch.Tensor]:
    """Two sessions off the device, and a checkpoint of the first with blocks of its own; its pass's ids and logits."""
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
    return victim, other, point, ids, wanted


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
    victim, other, point, ids, wanted = two_that_do_not_fit(rig)
    victim.prefetch()
    victim.wait_until("restored", 10)
    monkeypatch.setattr(
        pager,
        "take_free",
        lambda *args, **options: (
            take_free(*args, **options) if threading.current_thread().name == "djinn-ahead" else None
        ),
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


def small_blocks(make_rig: MakeRig, monkeypatch) -> Rig:
    """Several blocks to a layer: 128 tokens in each."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", 64 << 10)
    return make_rig()


def some(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def test_what_a_failed_pass_appended_is_not_taken_for_there(make_rig: MakeRig, monkeypatch) -> None:
    """Its blocks stay in the rows; a resume does not bring them, and the next pass must not write to nowhere."""
    rig = small_blocks(make_rig, monkeypatch)
    session, oracle = rig.open(max_length=250), Oracle(rig.stock)
    session.forward(some(100, 1))
    oracle.forward(some(100, 1))

    def fail(*_: object) -> None:
        raise RuntimeError("no memory for the logits")

    hook = rig.served.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        session.forward(some(40, 2))
    hook.remove()
    assert any(len(row) == 2 for row in session._holding.table.blocks)
    session.pause(release=True)
    session.wait_until("released", 10)
    rig.device.link_gbps = 0.0005
    session.resume()
    assert torch.equal(session.forward(some(40, 2)), oracle.forward(some(40, 2)))
    rig.device.link_gbps = None
    for seed in (3, 4):
        assert torch.equal(session.forward(some(30, seed)), oracle.forward(some(30, seed)))


def resuming_in_vain(
    rig: Rig, patch: pytest.MonkeyPatch
) -> tuple[Session, torch.Tensor, torch.Tensor, threading.Event]:
    """A session off the device whose next bring-in fails at its last layer once the event is set; ids and logits."""
    session, ids, wanted = begun(rig)
    session.pause(release=True)
    session.wait_until("released", 10)
    rig.device.link_gbps = 0.0002
    region, mapped, go_on, map_in = session._holding.region, [], threading.Event(), Region.map

    def refuse_the_last(self, items):
        if self is region:
            mapped.append(items)
            if len(mapped) == LAYERS - 1:  # the first two are mapped together
                assert go_on.wait(10)
                raise TransferError("the map of the last layer was refused")
        return map_in(self, items)

    patch.setattr(Region, "map", refuse_the_last)
    patch.setattr("djinn_core.sessions.bringin.STEP_BYTES", 1)
    patch.setattr("djinn_core.sessions.bringin.BringIn.map_ahead", lambda job: False)
    return session, ids, wanted, go_on


def test_a_session_is_not_evicted_in_a_pass_whose_resume_fails(rig: Rig, monkeypatch) -> None:
    pager, seen = rig.sessions.pager, []

    def in_the_pass(*_: object) -> None:
        if not seen:
            go_on.set()
            job.wait_issued()
            seen.append((session.state, pager._candidates(None, None, set()), pager.evict(session._holding)))

    with monkeypatch.context() as patch:
        session, ids, wanted, go_on = resuming_in_vain(rig, patch)
        session.resume()
        job = session.trace.job
        hook = rig.served.model.layers[1].register_forward_pre_hook(in_the_pass)
        with pytest.raises(TransferError, match="the last layer was refused"):
            session.forward(ids)
        hook.remove()
    assert seen == [(SessionState.RESUMING, [], False)]
    assert session.state in (SessionState.PAUSED, SessionState.SWAPPED)
    rig.device.link_gbps = None
    session.resume()
    assert torch.equal(session.forward(ids), wanted)


def check_goes_on(rig: Rig, session: Session, ids: torch.Tensor, wanted: torch.Tensor) -> None:
    """The stopped pass, and the token after it, whose KV depends on every token before."""
    rig.device.link_gbps = None
    assert torch.equal(session.resume(), wanted)
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    oracle.forward(ids)
    assert torch.equal(session.forward(likely(wanted)), oracle.forward(likely(wanted)))


def test_a_pass_ends_and_counts_its_tokens_at_once(rig: Rig, monkeypatch) -> None:
    """Its resume has failed in a layer that it did not need; who is evicted then has the new tokens saved."""
    pager = rig.sessions.pager
    leave, evicted = pager._leave_pass, []

    def leave_and_be_evicted(holding, *done):
        go_on.set()
        holding.jobs[0].wait_issued()
        leave(holding, *done)
        thread = threading.Thread(target=lambda: evicted.append(pager.evict(holding, wait=False)))
        thread.start()
        thread.join(10)

    with monkeypatch.context() as patch:
        session, ids, wanted, go_on = resuming_in_vain(rig, patch)
        patch.setattr(pager, "_leave_pass", leave_and_be_evicted)
        session.resume()
        session.forward(ids, stop_after=1)
    assert evicted == [True] and session.state is SessionState.SWAPPED
    check_goes_on(rig, session, ids, wanted)


def test_a_pass_that_ends_while_its_resume_fails_can_be_resumed(rig: Rig, monkeypatch) -> None:
    """Between the two, each left the state to the other."""
    pager = rig.sessions.pager
    ended, leave, failed, left = pager.ended, pager._leave_pass, threading.Event(), threading.Event()

    def ended_and_wait(job):
        ended(job)
        if job.error is not None:
            failed.set()
            assert left.wait(10)

    def leave_late(holding, *done):
        go_on.set()
        assert failed.wait(10)
        try:
            leave(holding, *done)
        finally:
            left.set()

    with monkeypatch.context() as patch:
        session, ids, wanted, go_on = resuming_in_vain(rig, patch)
        patch.setattr(pager, "ended", ended_and_wait)
        patch.setattr(pager, "_leave_pass", leave_late)
        session.resume()
        session.forward(ids, stop_after=1)
        session._holding.jobs[0].wait_issued()
    assert session.state is SessionState.PAUSED
    check_goes_on(rig, session, ids, wanted)


def test_memory_stays_under_an_earlier_copy_when_a_later_one_is_done(make_rig: MakeRig, monkeypatch) -> None:
    """Two bring-ins at one layer, on two streams: the last one's event says nothing of the first one's copy."""
    rig = small_blocks(make_rig, monkeypatch)
    session = rig.open(max_length=250)
    session.forward(some(100, 1))
    start = session.checkpoint()
    session.forward(some(38, 2))
    point = session.checkpoint()
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume(start)
    session.pause(release=True)
    session.wait_until("released", 10)
    step, layers = BringIn.step, len(session._holding.table.lengths)

    def one_layer(self):
        while len(self._left) == layers - 1 and not self.cancelled:
            time.sleep(0.001)
        return (None, 0) if self.cancelled else step(self)

    monkeypatch.setattr(BringIn, "step", one_layer)
    rig.device.link_gbps = 0.0001  # 0.6 s for a full block
    session.prefetch()
    first = session._holding.jobs[0]
    wait_for(lambda: any(first.issued))
    session.resume(point)
    second = session._holding.jobs[-1]
    wait_for(lambda: any(second.issued))
    unmap, early = Region.unmap, []
    copied_to = {offset for offset, block in session._holding.mapped.items() if block.layer == 0}

    def watched(self, offsets):
        if self is session._holding.region and copied_to & set(offsets):
            early.append(not first.arrival[0].query())
        return unmap(self, offsets)

    monkeypatch.setattr(Region, "unmap", watched)
    assert first is not second
    session.close()
    assert early and not any(early)


def test_who_makes_room_looks_again_before_waiting(make_rig: MakeRig, monkeypatch) -> None:
    """As above, between the look at the one that is to leave and its write-back."""
    rig = make_rig(device_bytes=2 * SESSION_BYTES)
    pager, take_free, wait_idle = rig.sessions.pager, rig.sessions.pager.take_free, writeback._wait_idle
    victim, other, point, ids, wanted = two_that_do_not_fit(rig)
    victim.resume()
    victim.forward(ids)
    looked, go_on = threading.Event(), threading.Event()

    def stop_once() -> None:
        if threading.current_thread().name == "djinn-ahead" and not looked.is_set():
            looked.set()
            assert go_on.wait(10)

    def late(room, holding):
        stop_once()
        return wait_idle(room, holding)

    def late_issued(self, **how):
        stop_once()
        return wait_issued(self, **how)

    def none_but_for_the_one_who_waits(owner, sizes, **options):
        return take_free(owner, sizes, **options) if threading.current_thread().name == "djinn-ahead" else None

    wait_issued = Holding.wait_issued
    monkeypatch.setattr(Holding, "wait_issued", late_issued)
    monkeypatch.setattr(writeback, "_wait_idle", late)
    monkeypatch.setattr(pager, "take_free", none_but_for_the_one_who_waits)
    with monkeypatch.context() as patch:
        patch.setattr(pager, "_out", queue.SimpleQueue())  # the writer is busy elsewhere
        victim.pause()
        other.resume()
        assert looked.wait(10)
        victim.resume(point)
        victim.pause()
        assert victim._holding.being_brought
        go_on.set()
        wait_for(lambda: other.trace.job.done)
        wait_for(lambda: not victim._holding.being_brought)
    monkeypatch.undo()
    if other.state is SessionState.RUNNING:
        other.pause()
    victim.resume(point)
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    oracle.forward(ids)
    assert torch.equal(victim.forward(likely(wanted)), oracle.forward(likely(wanted)))
