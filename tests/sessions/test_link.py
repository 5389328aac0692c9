"""The link is shared step by step, the most urgent first, and room is made before anyone waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError
from djinn_core.memory.regions import Region
from djinn_core.sessions import SessionState, ahead, bringin, link
from djinn_core.sessions.holding import Use
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, released, wait_for

pytestmark = pytest.mark.timeout(60)  # the watchdog: a bring-in that nobody ends

SESSION_BYTES = LAYERS * (64 << 10)
LINK_GBPS = 0.0002
LAYER_MS = 38  # what 15 tokens of a layer take then


def order_of(jobs: dict[str, object]) -> list[str]:
    """Layers in the order in which they arrived, named after their session."""
    first = next(iter(jobs.values())).begun
    rows = [
        (first.elapsed_time(event), f"{name}{layer}")
        for name, job in jobs.items()
        for layer, event in enumerate(job.arrival)
    ]
    return [name for _, name in sorted(rows)]


@pytest.fixture
def slow(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A slow link, with steps of one layer and two layers in flight at most."""
    monkeypatch.setattr(bringin, "STEP_BYTES", 1)
    monkeypatch.setattr(link, "QUEUED_BYTES", 1)
    return make_rig()


def test_a_second_resume_gets_its_first_layer_soon(slow: Rig) -> None:
    one, two = released(slow, 1), released(slow, 2)
    slow.device.link_gbps = LINK_GBPS
    one.resume()
    time.sleep(0.01)
    two.resume()
    for session in (one, two):
        session.wait_until("restored", 10)
    order = order_of({"a": one.trace.job, "b": two.trace.job})
    assert order.index("b0") < order.index("a3") < order.index("b1"), order
    assert two.trace.job.begun.elapsed_time(two.trace.job.arrival[0]) < 1.5 * LAYER_MS, "it queued behind the other"
    assert one.trace.job.begun.elapsed_time(two.trace.job.arrival[0]) < 2.6 * LAYER_MS
    slow.device.link_gbps = None
    for seed, session in ((1, one), (2, two)):
        oracle = Oracle(slow.stock)
        logits = oracle.forward(prompt(seed=seed))
        wanted = oracle.greedy(logits, 1)[0]
        assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), wanted)


def test_who_resumes_issues_the_first_layers_itself(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker has to wake for them, and they count as in flight; one of them where others are on the link."""
    one, two = released(slow, 1), released(slow, 2)
    slow.device.link_gbps = LINK_GBPS
    step, by, idle = bringin.BringIn.step, {}, []

    def watched(job: bringin.BringIn) -> tuple:
        by.setdefault(job.holding.id, []).append((threading.current_thread(), counted.counts["grant"]))
        idle.append(slow.sessions.pager.link.idle)
        return step(job)

    monkeypatch.setattr(bringin.BringIn, "step", watched)
    monkeypatch.setattr(link, "QUEUED_BYTES", -1)
    counted = slow.device.faults = FaultPlan()
    one.resume()
    job, link_ = one.trace.job, slow.sessions.pager.link
    assert [thread for thread, _ in by[one.id][:2]] == [threading.current_thread()] * 2
    assert by[one.id][1][1] == 1, "one grant serves both"
    assert not any(idle), "room would be made beside it"
    assert job.issued[0] and job.issued[1] and [flying[0] for flying in link_._flying] == [job, job]
    two.resume()
    for session in (one, two):
        session.wait_until("restored", 10)
    assert by[two.id][0][0] is threading.current_thread()
    assert len(by[one.id]) == len(by[two.id]) == LAYERS
    assert {thread.name for thread, _ in by[one.id][2:] + by[two.id][1:]} == {"djinn-link"}


@pytest.mark.parametrize("pinned", [True, False])
def test_which_calls_keep_the_interpreter(slow: Rig, monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    """Copies, unless the memory is pageable, and all else of who resumes: not the link's grants, which take long."""
    session, seen, kept = released(slow, 1), set(), threading.local()

    @contextmanager
    def keep(keeps: bool = True) -> Iterator[None]:
        before, kept.now = getattr(kept, "now", False), keeps
        yield
        kept.now = before

    def watched(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def watch(*args: object, **kwargs: object) -> None:
            who = "link" if threading.current_thread().name == "djinn-link" else "caller"
            seen.add((who, name, getattr(kept, "now", False)))
            call(*args, **kwargs)

        return watch

    monkeypatch.setattr(slow.device, "keeping_interpreter", keep)
    monkeypatch.setattr(type(slow.host), "pinned", pinned)
    for name in ("grant", "copy_all"):
        monkeypatch.setattr(slow.device, name, watched(name, getattr(slow.device, name)))
    session.resume()
    session.wait_until("restored", 10)
    by_caller = {("caller", "grant", True), ("caller", "copy_all", pinned)}
    assert seen == by_caller | {("link", "grant", False), ("link", "copy_all", pinned)}
    seen.clear()
    session.forward(prompt(seed=2))
    session.pause()
    session.wait_until("clean", 10)
    slow.open().forward(prompt(seed=3), stop_after=LAYERS - 1)  # which is written behind, if it is pinned
    assert {kept for _, call, kept in seen if call == "copy_all"} == {pinned}


def test_whoever_waits_for_the_rest_is_woken_at_its_end(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a thread that no Ctrl-C can wake, and though the books were right a moment before the bring-in was done."""
    session, pager = released(slow, 1), slow.sessions.pager
    ended, took = pager.ended, []

    def late(job: bringin.BringIn) -> None:
        ended(job)
        time.sleep(0.05)

    def wait() -> None:
        begun_s = time.monotonic()
        session.wait_until("restored", 20)
        took.append(time.monotonic() - begun_s)

    monkeypatch.setattr(pager, "ended", late)
    slow.device.link_gbps = LINK_GBPS
    session.resume()
    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join()
    assert took[0] < 10


def test_a_first_layer_that_fails_is_told_to_the_pass(slow: Rig) -> None:
    session, oracle = released(slow, 1), Oracle(slow.stock)
    ids = oracle.forward(prompt(seed=1)).float().argmax(-1)[:, None]
    slow.device.faults = FaultPlan().fail("map", 1)
    session.resume()
    assert slow.sessions.pager.link.idle, "no worker has it"
    with pytest.raises(DeviceError):
        session.forward(ids)
    assert session.state is SessionState.SWAPPED
    session.resume()
    assert torch.equal(session.forward(ids), oracle.forward(ids))


def test_a_prefetch_gives_way_to_a_resume(slow: Rig) -> None:
    early, late = released(slow, 1), released(slow, 2)
    slow.device.link_gbps = LINK_GBPS
    early.prefetch()
    prefetch = early._holding.jobs[0]
    while not any(prefetch.issued):
        time.sleep(0.001)
    late.resume()
    late.wait_until("restored", 10)
    early.wait_until("restored", 10)
    order = order_of({"p": prefetch, "r": late.trace.job})
    assert order.index("r3") < order.index("p3"), order
    assert early.state is SessionState.PAUSED


def test_maps_hide_behind_copies(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is mapped while the one before it is on its way: only the first map finds the link idle."""
    session = released(slow, 1)
    slow.device.link_gbps = LINK_GBPS
    map_one, idle = slow.device.map, []

    def watched(address: int, handle: int, size_bytes: int) -> None:
        idle.append(slow.sessions.pager.h2d.query())
        map_one(address, handle, size_bytes)

    monkeypatch.setattr(slow.device, "map", watched)
    session.prefetch()
    session.wait_until("restored", 10)
    assert idle[1:] == [False] * (LAYERS - 1)


def test_a_pass_behind_a_resume_waits_for_its_own_layers_only(slow: Rig) -> None:
    """A resume between two tokens returns at once; the next pass begins while the last layers are not even issued."""
    session = released(slow, 1)
    oracle = Oracle(slow.stock)
    ids = oracle.forward(prompt(seed=1)).float().argmax(-1)[:, None]
    slow.device.link_gbps = LINK_GBPS
    session.resume()
    job, issued = session.trace.job, []
    hook = slow.served.model.embed_tokens.register_forward_hook(lambda *_: issued.append(sum(job.issued)))
    logits = session.forward(ids)
    hook.remove()
    assert issued[0] <= 2 < LAYERS
    assert torch.equal(logits, oracle.forward(ids))
    slow.device.link_gbps = None
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    ids = logits.float().argmax(-1)[:, None]
    assert torch.equal(session.forward(ids), oracle.forward(ids))


def test_a_second_resume_plans_anew_what_a_pass_had_followed(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass stopped early; the next one is not held to the bring-in that the second resume has cancelled."""
    monkeypatch.setattr(link, "QUEUED_BYTES", -1)
    session = released(slow, 1)
    oracle = Oracle(slow.stock)
    ids = oracle.forward(prompt(seed=1)).float().argmax(-1)[:, None]
    slow.device.link_gbps = LINK_GBPS
    session.resume()
    first = session.trace.job
    session.forward(ids, stop_after=1)
    assert not first.done
    monkeypatch.setattr(first, "complete", lambda: False)  # its last copy is still on its way
    session.pause()
    logits = session.resume()
    assert first.cancelled
    monkeypatch.undo()
    assert torch.equal(logits, oracle.forward(ids))


@pytest.fixture
def two_by_two(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """The slow link, with steps of two layers, one of them in flight."""
    monkeypatch.setattr(bringin, "STEP_BYTES", 2 * SESSION_BYTES // LAYERS)
    monkeypatch.setattr(link, "QUEUED_BYTES", -1)
    return slow


def test_the_next_step_is_mapped_while_the_link_is_full(two_by_two: Rig) -> None:
    slow = two_by_two
    session = released(slow, 1)
    slow.device.link_gbps = LINK_GBPS
    session.prefetch()
    job = session._holding.jobs[0]
    wait_for(lambda: sum(job.issued) == 2)  # the link takes no more
    wait_for(lambda: len(session._holding.region.mapped()) == LAYERS)
    assert sum(job.issued) == 2
    session.wait_until("restored", 10)
    assert not job._ahead


def test_several_steps_are_mapped_with_one_grant(slow: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied one by one all the same."""
    session = released(slow, 1)
    monkeypatch.setattr(bringin, "MAP_BYTES", 2 * SESSION_BYTES // LAYERS)
    grants, done, back = [], [], Region.map
    monkeypatch.setattr(Region, "map", lambda region, parts: (grants.append(len(parts)), back(region, parts)))
    step = bringin.BringIn.step
    monkeypatch.setattr(bringin.BringIn, "step", lambda job: (done.append(sum(job.issued)), step(job))[1])
    slow.device.link_gbps = LINK_GBPS
    session.resume()
    session.wait_until("restored", 10)
    assert done == list(range(LAYERS)), "one layer a step"
    assert grants[0] == max(grants) and 2 * grants[0] == sum(grants) == LAYERS * grants[0] // 2, grants


def test_what_was_mapped_ahead_is_given_back_when_nobody_wants_it_any_more(two_by_two: Rig) -> None:
    slow = two_by_two
    session = released(slow, 1)
    before = slow.kv_bytes
    slow.device.link_gbps = LINK_GBPS
    session.prefetch()
    job = session._holding.jobs[0]
    wait_for(lambda: len(job._ahead) == 2)
    job.cancel()
    job.wait_issued()
    layers = sum(job.issued)
    assert layers < LAYERS and len(session._holding.region.mapped()) == layers
    assert slow.kv_bytes == before + layers * SESSION_BYTES // LAYERS
    slow.device.link_gbps = None
    session.resume()
    oracle = Oracle(slow.stock)
    logits = oracle.forward(prompt(seed=1))
    assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), oracle.greedy(logits, 1)[0])


def test_a_step_is_one_map_and_one_call_for_its_copies(two_by_two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a resume's first layer goes alone, before what other sessions have in flight; it is mapped with the next."""
    monkeypatch.setattr(link, "QUEUED_BYTES", 1 << 30)  # or what comes next is mapped together while the link is full
    session, copied, granted, way = released(two_by_two, 1), [], [], []
    device, copy_all, grant = two_by_two.device, two_by_two.device.copy_all, two_by_two.device.grant

    def count_copies(pairs, *args, **options):
        copied.append(len(pairs))
        way.append(options["gives_way"])
        copy_all(pairs, *args, **options)

    def count_grants(address, size_bytes):
        granted.append(size_bytes * LAYERS // SESSION_BYTES)
        grant(address, size_bytes)

    monkeypatch.setattr(device, "copy_all", count_copies)
    monkeypatch.setattr(device, "grant", count_grants)
    session.resume()
    session.wait_until("restored", 10)
    assert (copied, granted) == ([1, 2, 1], [3, 1])
    assert way == [False, True, True]
    job = session.trace.job
    assert job.arrival[1] is job.arrival[2] is not job.arrival[3]


@pytest.mark.parametrize(("layers", "steps", "flying"), [(2, [1, 2, 1], 3), (1, [1, 1, 1, 1], 2)])
def test_little_is_in_flight(
    slow: Rig, monkeypatch: pytest.MonkeyPatch, layers: int, steps: list[int], flying: int
) -> None:
    """What is, others' first layers would wait for. One step is beside the next, even if a layer is large."""
    session, copied, beside = released(slow, 1), [], []
    pager, copy_all = slow.sessions.pager, slow.device.copy_all

    def watched(pairs, *args, **options):
        copied.append(len(pairs))
        coming = sum(size_bytes for _, event, size_bytes in pager.link._flying if not event.query())
        beside.append((coming + sum(there.numel() for _, there in pairs)) / pairs[0][0].numel())
        copy_all(pairs, *args, **options)

    monkeypatch.setattr(slow.device, "copy_all", watched)
    monkeypatch.setattr(bringin, "STEP_BYTES", layers * SESSION_BYTES // LAYERS)
    slow.device.link_gbps = LINK_GBPS
    session.resume()
    session.wait_until("restored", 10)
    assert copied == steps and max(beside) == flying, beside
    arrival = session.trace.job.arrival
    assert len(set(arrival)) == len(steps), "an event for each step, and a step for each layer that is large enough"


def test_room_is_made_before_anyone_needs_it(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES)
    pager = rig.sessions.pager
    sessions = [rig.open() for _ in range(9)]
    for seed, session in enumerate(sessions):
        session.forward(prompt(seed=seed))
        session.pause()
        session.wait_until("clean", 10)
    away = next(session for session in sessions if session.state is SessionState.SWAPPED)
    wait_for(lambda: rig.pool.free_bytes >= SESSION_BYTES)
    time.sleep(4 * link.TICK_S)
    before = len(pager.events)
    time.sleep(4 * link.TICK_S)
    assert len(pager.events) == before, "it goes on evicting while nobody wants anything"
    away.resume()
    away.wait_until("restored", 10)
    kinds = [event.event for event in list(pager.events)[before:]]
    assert "swap_in" in kinds and "evict" not in kinds[: kinds.index("swap_in")]


@pytest.mark.parametrize(("callers", "room"), [(1, 1), (2, 2), (5, 2)])
def test_room_is_kept_for_two_where_there_were_several_callers(make_rig: MakeRig, callers: int, room: int) -> None:
    """They have all paused, and may come back at once. To be open, or to run, does not make a caller."""
    rig = make_rig(device_bytes=9 * SESSION_BYTES)
    sessions = [rig.open() for _ in range(12)]
    rig.sessions.pager.callers.see(callers, time.monotonic())
    for session in sessions:
        session.forward(prompt())
        session.pause()
        session.wait_until("clean", 10)
    wait_for(lambda: room * SESSION_BYTES <= rig.pool.free_bytes < (room + 1) * SESSION_BYTES)
    time.sleep(4 * link.TICK_S)
    assert rig.pool.free_bytes < (room + 1) * SESSION_BYTES


def test_room_is_kept_for_who_is_in_a_call(make_rig: MakeRig) -> None:
    """Whoever pauses is about to resume another session."""
    rig = make_rig(device_bytes=9 * SESSION_BYTES)
    sessions = [rig.open() for _ in range(12)]
    for session in sessions:
        session.forward(prompt())
        session.pause()
        session.wait_until("clean", 10)
    with ExitStack() as calls:
        for session in sessions[:3]:
            calls.enter_context(Use(session._holding, "be called"))
        wait_for(lambda: 3 * SESSION_BYTES <= rig.pool.free_bytes < 4 * SESSION_BYTES)


def test_callers_are_counted_while_the_second_worker_is_busy(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig()
    session, others, callers = released(rig, 1), [rig.open(), rig.open()], rig.sessions.pager.callers
    monkeypatch.setattr(link, "look_ahead", lambda pager: None)
    monkeypatch.setattr(link, "TICK_S", 1000.0)
    prepare = bringin.BringIn.prepare
    monkeypatch.setattr(bringin.BringIn, "prepare", lambda job, *, wait, **how: wait and prepare(job, wait=wait, **how))
    time.sleep(0.2)
    with Use(others[0]._holding, "be called"), Use(others[1]._holding, "be called"):
        session.resume()
        wait_for(lambda: callers.most(time.monotonic()) >= 2)


def test_callers_are_forgotten_in_the_end(rig: Rig) -> None:
    callers, span_s = ahead.Callers(), ahead.CALLERS_S
    seen = []
    for count, now_s in ((1, 0.0), (3, 1.0), (1, 2.0), (2, span_s + 1), (1, 2 * span_s), (1, 2 * span_s + 2)):
        callers.see(count, now_s)
        seen.append(callers.most(now_s))
    assert seen == [1, 3, 3, 3, 3, 2], "the time of the three is over"
    assert callers.most(9 * span_s) == 0, "nobody looked for long"
    callers.see(0, 9 * span_s)
    assert callers.most(9 * span_s) == 0
    rig.sessions.pager.callers.see(3, time.monotonic())
    assert not rig.sessions.pager.shared, "nobody has a session"


def test_nobody_is_evicted_while_all_fit(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES)
    sessions = [rig.open() for _ in range(4)]
    for session in sessions:
        session.forward(prompt())
        session.pause()
    time.sleep(6 * link.TICK_S)
    assert all(session.state is SessionState.PAUSED for session in sessions)


def test_room_is_not_made_of_those_who_come_back_first(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 * SESSION_BYTES)
    away = rig.open()
    away.forward(prompt())
    away.pause(expected_resume_s=500.0, release=True)
    away.wait_until("released", 10)
    sessions = []
    while rig.pool.free_bytes >= SESSION_BYTES:
        session = rig.open()
        session.forward(prompt())
        session.pause(expected_resume_s=100.0)
        session.wait_until("clean", 10)
        sessions.append(session)
    time.sleep(6 * link.TICK_S)
    assert all(session.state is SessionState.PAUSED for session in sessions)
    sessions[1].resume()
    sessions[1].pause(expected_resume_s=900.0)
    wait_for(lambda: rig.pool.free_bytes >= SESSION_BYTES)
    assert sessions[1].state is SessionState.SWAPPED


def test_a_place_that_is_wanted_before_the_last_one_was_reached(slow: Rig) -> None:
    """A resume cancels the one before it, in the middle, and its pass waits only for what was issued."""
    session = slow.open()
    oracle = Oracle(slow.stock)
    logits = oracle.forward(prompt())
    session.forward(prompt())
    token = logits.float().argmax(-1)[:, None]
    between = session.checkpoint()
    point = session.forward(token, stop_after=1)
    session.pause(release=True)
    session.wait_until("released", 10)
    slow.device.link_gbps = LINK_GBPS
    wanted = oracle.forward(token)
    for _ in range(3):
        session.resume(between)
        assert torch.equal(session.resume(point), wanted)
        session.pause()
        session.wait_until("clean", 10)
        slow.sessions.pager.evict(session._holding)


def test_a_prefill_maps_each_layer_as_it_comes_to_it(make_rig: MakeRig, monkeypatch) -> None:
    """The device computes one layer while the next one is mapped; a map that fails there fails the pass alone."""
    rig = make_rig()
    executed_then: list[int] = []
    map_one = rig.device.map

    def watched(address: int, handle: int, size_bytes: int) -> None:
        executed_then.append(sum(rig.executed))
        map_one(address, handle, size_bytes)

    session = rig.open()
    monkeypatch.setattr(rig.device, "map", watched)
    rig.device.faults = FaultPlan().fail("grant", 3)
    with pytest.raises(DeviceError):
        session.forward(prompt())
    assert executed_then == [0, 1, 2] and session.length == 0
    held_bytes = rig.kv_bytes
    assert held_bytes == session.device_bytes == 2 * session._holding.layout.block_bytes
    rig.device.faults = None
    logits = session.forward(prompt())
    assert executed_then[3:] == [2 + 2, 2 + 3]  # two layers ran before the failure, and their maps stay
    assert torch.equal(logits, Oracle(rig.stock).forward(prompt()))
