"""Who resumes goes first: passes and workers wait for it between two steps, for a few milliseconds at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from djinn_core import turn as turn_module
from djinn_core.errors import BreakpointError, DeviceError, DjinnError
from djinn_core.memory.extents import Extent
from djinn_core.memory.regions import Region
from djinn_core.sessions import SessionState
from djinn_core.sessions import bringin as bringin_module
from djinn_core.sessions import room as room_module
from djinn_core.sessions.bringin import BringIn
from djinn_core.sessions.pager import Pager
from djinn_core.sessions.staging import INBOUND_SLOTS
from djinn_core.turn import Way
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, Rig, released, wait_for

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("late", [False, True])
def test_a_pass_gives_way_before_it_begins_and_between_its_layers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(turn_module, "PATIENCE_S", 30.0)
    way, out, asked, give, begun = rig.sessions.pager.way, [], threading.Event(), Way.give, []
    monkeypatch.setattr(Way, "give", lambda way: (asked.set(), give(way)))
    arrived, standing = threading.Event(), threading.Event()
    session = rig.open()
    before = sum(rig.executed)

    def embedded(*_: object) -> None:
        begun.append(True)
        if late:
            asked.clear()
            standing.set()
            arrived.wait(10)

    rig.served.get_input_embeddings().register_forward_hook(embedded)
    caller = threading.Thread(target=lambda: out.append(session.forward(prompt())))
    if late:
        caller.start()
        assert standing.wait(10)
    with way:
        if late:
            arrived.set()
        else:
            caller.start()
        assert asked.wait(10)
        time.sleep(0.05)
        assert bool(begun) is late, "a kernel was issued while someone was arriving"
        assert sum(rig.executed) == before, "a layer ran while someone was arriving"
    caller.join()
    assert sum(rig.executed) == before + LAYERS
    assert torch.equal(out[0], Oracle(rig.stock).forward(prompt()))


def test_nobody_is_waited_for_longer_than_that_from_when_he_came(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all passes together: who waits for one of them, or for long, would hold up everyone."""
    session = rig.open()
    session.forward(prompt())
    monkeypatch.setattr(turn_module, "PATIENCE_S", 1.0)
    took: list[float] = []

    def run() -> None:
        begun_s = time.perf_counter()
        for _ in range(3):
            session.forward(torch.tensor([[5]]))
        took.append(time.perf_counter() - begun_s)

    caller = threading.Thread(target=run)
    with rig.sessions.pager.way:
        caller.start()
        caller.join()
    assert 0.9 <= took[0] < 2.0


def test_who_waits_for_a_slot_is_not_in_the_way(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    wait_for(lambda: session.stopped.boundary.device is None)
    pager = rig.sessions.pager
    slots = [pager.staging.take(Way()) for _ in range(INBOUND_SLOTS)]
    caller = threading.Thread(target=session.resume)
    caller.start()
    wait_for(lambda: session._holding.user.locked() and not pager.way.taken)
    time.sleep(0.05)
    assert caller.is_alive() and not pager.way.taken
    for slot in slots:
        pager.staging.give_back(slot)
    caller.join()
    assert session.state is SessionState.RUNNING


def test_who_waits_for_room_or_for_a_read_is_not_in_the_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    pager, prepare, seen = rig.sessions.pager, BringIn.prepare, []
    session = rig.open()
    session.forward(prompt())
    session.pause()

    def prepared(job: BringIn, *, wait: bool, read: bool = False) -> bool:
        seen.append((wait, pager.way.taken))
        return wait and prepare(job, wait=wait, read=read)  # someone else has to leave first

    monkeypatch.setattr(BringIn, "prepare", prepared)
    with pager.way:
        pager.claim(session._holding, 0, LAYERS, 40)
    assert seen == [(False, True), (True, False)]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_resume_has_the_way_until_its_bring_in_has_begun_and_not_while_it_waits_for_its_turn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    way, seen, begin = rig.sessions.pager.way, [], Pager.resume
    session = rig.open()
    session.forward(prompt(), stop_after=2 if stopped else None)
    session.pause(release=True)
    session.wait_until("released", 10)

    def resume(pager: Pager, *args: object) -> BringIn | None:
        seen.append(way.taken)
        return begin(pager, *args)

    monkeypatch.setattr(Pager, "resume", resume)
    turn = rig.served._djinn_boundary._turn
    with turn:
        caller = threading.Thread(target=session.resume)
        caller.start()
        wait_for(lambda: turn.waiting if stopped else not caller.is_alive())
        assert not way.taken
    caller.join()
    assert seen == [True]
    session.wait_until("restored", 10)
    assert session.state is SessionState.RUNNING


def test_a_resume_that_fails_is_not_in_the_way(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=3)
    session.pause()
    with pytest.raises(BreakpointError):
        session.resume(stop_after=2)
    assert not rig.sessions.pager.way.taken
    between = rig.open()
    between.forward(prompt())
    between.pause()

    def refuse(*_: object) -> None:
        raise DjinnError("refused")

    monkeypatch.setattr(Pager, "resume", refuse)
    for one in (session, between):
        with pytest.raises(DjinnError, match="refused"):
            one.resume()
        assert not rig.sessions.pager.way.taken


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is within is waited for, however long that takes."""
    monkeypatch.setattr(turn_module, "PATIENCE_S", 30.0)


def held_up(asks: list[str], who: str) -> None:
    """Return when that thread has asked for the way and stands; fails after ten seconds."""
    wait_for(lambda: who in asks)
    time.sleep(0.05)


@pytest.fixture
def asks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that found the way taken, in order."""
    names, way, give = [], rig.sessions.pager.way, Way.give

    def asked(one: Way, *until_s: float) -> None:
        if way.taken:
            names.append(threading.current_thread().name)
        give(one, *until_s)

    monkeypatch.setattr(Way, "give", asked)
    return names


def test_a_write_back_begins_behind_who_resumes(rig: Rig, patient: None, asks: list[str]) -> None:
    session = rig.open()
    session.forward(prompt())
    with rig.sessions.pager.way:
        session.pause()
        held_up(asks, "djinn-writer")
        assert not session._holding.is_clean()
    session.wait_until("clean", 10)


def test_beside_a_write_back_who_resumes_maps_one_layer_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grant takes a millisecond for each extent there."""
    pager, copy_all, beside = rig.sessions.pager, rig.device.copy_all, []
    session = rig.open()
    session.forward(prompt())

    def watched(*args: object, **options: object) -> None:
        beside.append(pager.write_backs)
        copy_all(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "copy_all", watched)
        session.pause(release=True)
        session.wait_until("released", 10)
    assert beside == [1] and pager.write_backs == 0
    mine, maps, back = threading.current_thread(), [], Region.map

    def mapped(region: Region, parts: list) -> None:
        maps.append((len(parts), threading.current_thread()))
        back(region, parts)

    monkeypatch.setattr(Region, "map", mapped)
    pager.write_backs = 1
    session.resume()
    session.wait_until("restored", 10)
    pager.write_backs = 0
    assert maps[0] == (1, mine) and sum(count for count, _ in maps) == LAYERS
    assert mine not in [thread for _, thread in maps[1:]], "it has waited for one"


def test_an_eviction_gives_way_between_its_pieces(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, patient: None, asks: list[str]
) -> None:
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    holding = session._holding
    monkeypatch.setattr(room_module, "UNMAP_BYTES", 2 * max(block.size_bytes for block in holding.mapped.values()))
    caller = threading.Thread(target=pager.evict, args=(holding,), name="evict")
    with pager.way:
        caller.start()
        held_up(asks, "evict")
        assert len(holding.mapped) == LAYERS - 2, "a piece is two layers here"
    caller.join()
    assert session.state is SessionState.SWAPPED and not holding.mapped


def test_an_eviction_that_fails_half_way_keeps_account_of_its_pieces(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session, pager = rig.open(), rig.sessions.pager
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    logits = session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    holding, unmap, calls = session._holding, Region.unmap, []
    before_bytes = rig.kv_bytes

    def refuse(region: Region, offsets: list[int]) -> list[Extent]:
        calls.append(offsets)
        if len(calls) == 3:
            raise DeviceError("refused")
        return unmap(region, offsets)

    monkeypatch.setattr(room_module, "UNMAP_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(DeviceError, match="refused"):
        patch.setattr(Region, "unmap", refuse)
        pager.evict(holding)
    assert len(holding.mapped) == LAYERS - 2 and session.state is SessionState.PAUSED
    assert rig.kv_bytes == sum(block.size_bytes for block in holding.mapped.values())
    assert before_bytes - rig.kv_bytes == sum(event.bytes for event in pager.events if event.event == "evict")
    session.resume()
    token = logits.argmax(-1, keepdim=True)
    assert torch.equal(session.forward(token), oracle.forward(token))


@pytest.mark.parametrize("ending", ["go back", "close"])
def test_what_the_host_does_not_have_is_unmapped_all_or_none(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """In pieces, one that fails would have lost those before it."""
    session, unmap, calls = rig.open(), Region.unmap, []
    before = session.forward(prompt(), stop_after=1)
    session.resume()
    session.wait_until("restored", 10)
    monkeypatch.setattr(room_module, "UNMAP_BYTES", 1)
    monkeypatch.setattr(
        Region, "unmap", lambda region, offsets: (calls.append(len(offsets)), unmap(region, offsets))[1]
    )
    if ending == "close":
        session.close()
    else:
        session.resume(before)
    assert calls[0] >= LAYERS - 1


def test_an_eviction_gives_way_for_so_long_in_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    monkeypatch.setattr(room_module, "UNMAP_BYTES", 1)
    monkeypatch.setattr(turn_module, "PATIENCE_S", 0.4)
    with somebody_always_within(pager.way):
        begun_s = time.perf_counter()
        pager.evict(session._holding)
        took_s = time.perf_counter() - begun_s
    assert 0.3 < took_s < 0.4 * (LAYERS - 1)


def test_the_link_looks_again_for_the_most_urgent_when_it_has_given_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, patient: None, asks: list[str]
) -> None:
    monkeypatch.setattr(bringin_module, "STEP_BYTES", 1)
    early, late = rig.open(), rig.open()
    for session in (early, late):
        session.forward(prompt())
        session.pause(release=True)
        session.wait_until("released", 10)
    steps, step = [], BringIn.step
    monkeypatch.setattr(BringIn, "step", lambda job: (steps.append(job.holding), step(job))[1])
    caller = threading.Thread(target=late.resume)
    with rig.sessions.pager.way:
        early.prefetch()
        held_up(asks, "djinn-link")
        caller.start()
        caller.join()
    for session in (early, late):
        session.wait_until("restored", 10)
    assert steps == [late._holding] * LAYERS + [early._holding] * LAYERS


def test_of_two_who_resume_at_once_neither_issues_a_second_layer_before_the_others_first(
    rig: Rig, patient: None, asks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringin_module, "STEP_BYTES", 1)
    session, pager = released(rig), rig.sessions.pager
    begun = threading.Thread(target=lambda: pager.resume(session._holding, 0, 0, 0))
    with pager.way:  # this thread is the other one
        begun.start()
        begun.join()
        held_up(asks, "djinn-link")
        assert session._holding.jobs[0].left == LAYERS - 1
    session.wait_until("restored", 10)


def test_later_layers_and_the_look_ahead_come_behind_who_resumes(
    rig: Rig, patient: None, asks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bringin_module, "STEP_BYTES", 1)
    session, pager = released(rig), rig.sessions.pager
    with pager.way:
        pager.resume(session._holding, 0, 0, 0)  # the first two are issued here, the rest by the link
        held_up(asks, "djinn-link")
        held_up(asks, "djinn-ahead")
        assert session._holding.jobs[0].left == LAYERS - 2
    session.wait_until("restored", 10)


def test_who_is_within_waits_for_nobody(patient: None) -> None:
    way, begun_s, both = Way(), time.perf_counter(), threading.Barrier(2)

    def come() -> None:
        with way:
            both.wait()
            way.give()
            both.wait()

    callers = [threading.Thread(target=come) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert time.perf_counter() - begun_s < 10


def test_room_is_not_made_beside_who_resumes(rig: Rig, patient: None) -> None:
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    worker = threading.Thread(target=pager.make_room_clean, args=(pager.pool.budget_bytes, 0.0, 0.0))
    with pager.way:
        worker.start()
        time.sleep(0.1)
        assert session.state is SessionState.PAUSED
    worker.join()
    assert session.state is SessionState.SWAPPED


@contextmanager
def somebody_always_within(way: Way) -> Iterator[None]:
    """As if one came after the other, without a gap: each time that he enters, a thread has just come."""
    stop, within = threading.Event(), threading.Event()

    def come_again() -> None:
        while not stop.is_set():
            way.__enter__()
            within.set()
            time.sleep(0.02)
        way.leave()

    caller = threading.Thread(target=come_again)
    caller.start()
    try:
        assert within.wait(10)
        yield
    finally:
        stop.set()
        caller.join()


def test_a_worker_is_held_up_once_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "PATIENCE_S", 0.2)
    way = Way()
    with somebody_always_within(way):
        begun_s = time.perf_counter()
        way.give()
        took_s = time.perf_counter() - begun_s
    assert 0.15 < took_s < 2.0


@pytest.mark.parametrize("back", [False, True])
def test_who_waits_for_an_eviction_is_not_in_the_way(rig: Rig, back: bool) -> None:
    session, pager = rig.open(), rig.sessions.pager
    session.forward(prompt())
    place = session.checkpoint() if back else None
    session.pause()
    session.wait_until("clean", 10)
    with pager.lock:
        session._holding.moving = True
    caller = threading.Thread(target=session.resume, args=(place,))
    caller.start()
    wait_for(lambda: session._holding.user.locked() and not pager.way.taken)
    time.sleep(0.05)
    assert caller.is_alive() and not pager.way.taken
    with pager.lock:
        session._holding.moving = False
        pager.lock.notify_all()
    caller.join()
    assert session.state is SessionState.RUNNING
