"""Writing behind: a prefill that stops is on the host by then, and nothing that goes wrong on the way fails it."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DjinnError
from djinn_core.sessions import Session, SessionState, blocks
from djinn_core.sessions import room as room_module
from djinn_core.sessions import writer as writer_module
from djinn_core.sessions.behind import Behind
from tests.ctrl_c import interrupted
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig

TOKENS = 12
TOKEN_BYTES = 2 * 64 * 4  # K and V of one layer of the small Llama, float32
HIDDEN_BYTES = 64 * 4
UNIT = 64 << 10  # a layer of a short session
LINK_GBPS = 0.0002  # the tokens of a layer take 31 ms

pytestmark = pytest.mark.timeout(60)


def stopped(rig: Rig, layer: int = 3) -> tuple[Session, torch.Tensor]:
    """A session whose prefill stopped after `layer`; the logits at its end."""
    session = rig.open()
    session.forward(prompt(), stop_after=layer)
    return session, Oracle(rig.stock).forward(prompt())


def on_host(session: Session) -> list[int]:
    return [sum(block.host_valid_bytes for block in row) for row in session._holding.table.blocks]


def take_in(session: Session) -> None:
    """What its last pass has written behind itself counts."""
    session._holding.behind.settle()
    assert session._holding.behind is None


def leave_and_return(session: Session, wanted: torch.Tensor) -> None:
    """Bit-equal after a round trip, whatever was written when."""
    if session.state is SessionState.RUNNING:
        session.pause(release=True)
    session.wait_until("released", 10)
    assert session.device_bytes == 0
    assert torch.equal(session.resume(), wanted)


def test_a_pause_after_a_stop_has_nothing_left_to_copy(rig: Rig) -> None:
    session, wanted = stopped(rig)
    take_in(session)
    assert on_host(session) == [TOKENS * TOKEN_BYTES] * 3 + [0] * (LAYERS - 3)
    before = rig.device.copied.d2h_bytes
    session.pause(release=True)
    session.wait_until("released", 10)
    assert rig.device.copied.d2h_bytes == before
    leave_and_return(session, wanted)


def test_it_copies_while_the_pass_goes_on_and_counts_only_at_its_end(rig: Rig, monkeypatch) -> None:
    rig.device.link_gbps = LINK_GBPS
    seen: list[tuple[bool, list[int]]] = []

    def look(*_: object) -> None:
        seen.append((not rig.sessions.pager.d2h_behind.query(), on_host(session)))

    session = rig.open()
    hook = rig.served.model.layers[2].register_forward_pre_hook(look)
    session.forward(prompt(), stop_after=3)
    hook.remove()
    assert seen == [(True, [0] * LAYERS)], "the third layer ran while the first ones were on their way"
    rig.device.link_gbps = None
    leave_and_return(session, Oracle(rig.stock).forward(prompt()))


@pytest.mark.parametrize("ids", [prompt(tokens=1), prompt()], ids=["one token", "no stop"])
def test_not_in_a_pass_over_one_token_nor_in_one_that_does_not_stop(rig: Rig, ids: torch.Tensor) -> None:
    session = rig.open()
    session.forward(ids, stop_after=3 if ids.shape[1] == 1 else None)
    assert session._holding.behind is None and rig.device.copied.d2h_bytes <= HIDDEN_BYTES
    assert sum(on_host(session)) == 0


def test_what_a_failed_pass_has_written_does_not_count(rig: Rig) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the third layer fails")

    session = rig.open()
    hook = rig.served.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="third layer"):
        session.forward(prompt(seed=9), stop_after=4)
    hook.remove()
    assert rig.device.copied.d2h_bytes == 2 * TOKENS * TOKEN_BYTES
    take_in(session)
    assert sum(on_host(session)) == 0
    session.forward(prompt(), stop_after=3)  # other bytes in the same places
    leave_and_return(session, Oracle(rig.stock).forward(prompt()))


def test_a_host_without_room_at_hand_leaves_it_to_the_pause(rig: Rig, monkeypatch) -> None:
    first = rig.served.model.layers[0]
    hook = first.register_forward_pre_hook(lambda *_: monkeypatch.setattr(rig.host, "take_ready", lambda *_: None))
    session, wanted = stopped(rig)
    hook.remove()
    monkeypatch.undo()
    assert rig.device.copied.d2h_bytes == TOKENS * HIDDEN_BYTES, "the boundary, and nothing else"
    leave_and_return(session, wanted)


def test_an_earlier_write_back_under_way_is_not_disturbed(rig: Rig) -> None:
    session = rig.open()
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    rig.device.link_gbps = LINK_GBPS
    session.pause()
    while not session._holding.draining:
        time.sleep(0.001)
    session.resume()
    session.forward(prompt(seed=2), stop_after=3)
    assert not session._holding.behind._copies
    rig.device.link_gbps = None
    leave_and_return(session, oracle.forward(prompt(seed=2)))


def test_a_second_stop_while_the_copies_of_the_first_are_under_way(rig: Rig) -> None:
    rig.device.link_gbps = LINK_GBPS
    session, wanted = stopped(rig, 2)
    first = session._holding.behind
    session.resume(stop_after=4)
    assert first is not None and session._holding.behind is first, "one at a time"
    rig.device.link_gbps = None
    first.settle()
    assert on_host(session) == [TOKENS * TOKEN_BYTES] * 2 + [0] * 2
    leave_and_return(session, wanted)


def test_later_prompts_and_later_stops_of_one_pass_are_written_behind_too(rig: Rig) -> None:
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    session.forward(prompt(seed=2), stop_after=1)
    take_in(session)
    session.resume(stop_after=4)
    take_in(session)
    assert on_host(session) == [2 * TOKENS * TOKEN_BYTES] * LAYERS
    leave_and_return(session, oracle.forward(prompt(seed=2)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_copy_that_fails_fails_nothing_else(make_rig: MakeRig, asynchronous: bool) -> None:
    """Each copy of a stopping prefill once. The boundary's own is the pass's business, and may fail it."""
    plan = FaultPlan()
    rig = make_rig()
    rig.device.faults = plan
    stopped(rig)
    total = plan.counts["copy"]
    assert total == 3 + 1
    rig.close()
    failed = 0
    for nth in range(1, total + 1):
        rig = make_rig()
        rig.device.faults = plan = FaultPlan().fail("copy", nth, asynchronous=asynchronous)
        try:
            session, wanted = stopped(rig)
        except DjinnError:
            failed += 1
        else:
            rig.device.faults = None
            take_in(session)
            assert nth == total or on_host(session)[nth - 1] == 0
            leave_and_return(session, wanted)
        assert plan.fired
        rig.close()
    assert failed <= 1


@pytest.mark.parametrize("how", ["close", "evict", "adopt", "displace", "unmap", "sibling"])
def test_memory_goes_only_when_no_copy_reads_it(rig: Rig, monkeypatch, how: str) -> None:
    session = rig.open()
    start = session.checkpoint()
    gate = gated(rig, monkeypatch)
    session.forward(prompt(), stop_after=3)
    wanted = Oracle(rig.stock).forward(prompt())
    pager, holding, late = rig.sessions.pager, session._holding, []
    unmap = holding.region.unmap
    monkeypatch.setattr(holding.region, "unmap", lambda at: (late.append(gate.is_set() or not at), unmap(at))[1])
    threading.Timer(0.1, gate.set).start()
    if how == "close":
        session.close()
    elif how == "adopt":
        session.resume(start)
        assert torch.equal(session.forward(prompt()), wanted)
    elif how in ("displace", "unmap"):
        some = list(holding.mapped.values())[:1]
        pager.displace(holding, some) if how == "displace" else pager._unmap(holding, some)
        assert not some[0].places
    else:
        if how == "sibling":
            twin = session.fork()
            assert torch.equal(twin.resume(), wanted)  # it shares the blocks that are being copied
            twin.pause()
            pager._drain(twin._holding)
            assert twin._holding.is_clean()
        session.pause()
        assert pager.evict(holding)
        assert torch.equal(session.resume(), wanted)
    assert late and all(late)


def gated(rig: Rig, monkeypatch) -> threading.Event:
    """The device is still at the first layer of the next prefill until the event is set."""
    gate, compute, layer = threading.Event(), rig.device.stream(), Behind.layer
    rig.device.launch(compute, lambda: gate.wait(20))
    monkeypatch.setattr(Behind, "layer", lambda self, number, _: layer(self, number, compute))
    return gate


def test_two_threads_take_it_in_once(rig: Rig) -> None:
    rig.device.link_gbps = LINK_GBPS
    session, wanted = stopped(rig)
    behind = session._holding.behind
    threads = [threading.Thread(target=behind.settle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [event for event in rig.sessions.pager.events if event.event == "written behind"]
    assert [event.bytes for event in written] == [3 * TOKENS * TOKEN_BYTES]
    rig.device.link_gbps = None
    leave_and_return(session, wanted)


def test_what_has_been_overwritten_since_does_not_count(rig: Rig) -> None:
    """Back to before the prefill, and another one into the same blocks, before anyone asks for the copies."""
    session, oracle = rig.open(), Oracle(rig.stock)
    session.forward(prompt(tokens=2))
    start = session.checkpoint()
    stop = session.forward(prompt(seed=9), stop_after=4)
    behind = session._holding.behind
    session.resume(start)
    session.drop(stop)
    oracle.forward(prompt(tokens=2))
    oracle.forward(prompt(seed=3))
    logits = session.forward(prompt(seed=3))
    assert session._holding.behind is behind
    leave_and_return_between(session, oracle, logits)


def leave_and_return_between(session: Session, oracle: Oracle, logits: torch.Tensor) -> None:
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    (wanted,) = oracle.greedy(logits, 1)
    assert torch.equal(session.forward(logits.float().argmax(-1)[:, None]), wanted)


# who else is there


def held_writer(monkeypatch, module, name: str) -> tuple[threading.Event, threading.Event]:
    """The writer's first call of a function stops before it begins: (it is there, it may go on)."""
    at, go, plain = threading.Event(), threading.Event(), getattr(module, name)

    def later(*args, **options):
        if threading.current_thread().name == "djinn-writer" and not at.is_set():
            at.set()
            assert go.wait(10)
        return plain(*args, **options)

    monkeypatch.setattr(module, name, later)
    return at, go


@pytest.mark.parametrize("release", [False, True])
def test_a_write_back_that_finds_another_pass_begun_is_not_held_up(rig: Rig, monkeypatch, release: bool) -> None:
    """The writer has seen the session paused; before it goes on, its owner is in the next prefill."""
    at, go = held_writer(monkeypatch, room_module if release else writer_module, "write_back")
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    session.pause(release=release)
    assert at.wait(5)
    session.resume()
    hook = rig.served.model.layers[2].register_forward_pre_hook(lambda *_: (go.set(), time.sleep(0.1))[1])
    session.forward(prompt(seed=2), stop_after=3)
    hook.remove()
    leave_and_return(session, oracle.forward(prompt(seed=2)))


def test_a_branch_that_writes_a_block_back_keeps_its_own_copy(rig: Rig, monkeypatch) -> None:
    """It has claimed the block, and is getting host memory for it, when the copies behind the pass are taken in."""
    session, wanted = stopped(rig)
    twin, tiers = session.fork(), rig.sessions.pager.tiers
    assert torch.equal(twin.resume(), wanted)
    allocate, allocated = tiers.allocate, []

    def take_in_first(*args, **options):
        if session._holding.behind is not None:
            take_in(session)
        allocated.append(args[1])
        return allocate(*args, **options)

    monkeypatch.setattr(tiers, "allocate", take_in_first)
    twin.pause()
    twin.wait_until("clean", 10)
    monkeypatch.undo()
    assert session._holding.behind is None
    assert allocated == [twin.id] * LAYERS, "one block of each layer, and none twice"
    leave_and_return(session, wanted)


def test_others_leave_while_the_device_is_still_at_this_prefill(rig: Rig, monkeypatch) -> None:
    other = rig.open()
    other.forward(prompt(seed=5))
    gate = gated(rig, monkeypatch)
    session, wanted = stopped(rig)
    other.pause(release=True)
    begun_s = time.monotonic()
    other.wait_until("released", 10)
    assert time.monotonic() - begun_s < 5
    gate.set()
    leave_and_return(session, wanted)


def test_a_branch_of_it_leaves_in_the_middle_of_the_pass(rig: Rig) -> None:
    """From a hook, where waiting for the pass would be for ever."""
    session, oracle = rig.open(), Oracle(rig.stock)
    oracle.forward(prompt())
    session.forward(prompt())
    twin = session.fork()

    def leave(*_: object) -> None:
        twin.resume()
        twin.wait_until("restored", 10)
        twin.pause(release=True)
        twin.wait_until("released", 10)

    hook = rig.served.model.layers[2].register_forward_pre_hook(leave)
    session.forward(prompt(seed=2), stop_after=3)
    hook.remove()
    leave_and_return(session, oracle.forward(prompt(seed=2)))


# a host that is full


def test_the_next_stop_has_room_for_its_boundary(make_rig: MakeRig) -> None:
    for settled in (False, True):
        rig = make_rig(host_bytes=3 * UNIT)
        session = rig.open()
        rig.host.prepare(3 * UNIT)
        session.forward(prompt(), stop_after=1)
        session.resume(stop_after=2)
        if settled:
            take_in(session)
        session.resume(stop_after=3)  # three boundaries in three units of host memory
        rig.close()


def test_who_must_have_room_gets_it_from_a_prefill_under_way(make_rig: MakeRig) -> None:
    rig = make_rig(host_bytes=5 * UNIT)
    other = rig.open()
    other.forward(prompt(seed=5))
    rig.host.prepare(5 * UNIT)

    def leave(*_: object) -> None:
        assert rig.host.free_bytes < LAYERS * UNIT
        other.pause(release=True)
        other.wait_until("released", 10)

    hook = rig.served.model.layers[2].register_forward_pre_hook(leave)
    session, _ = stopped(rig)
    hook.remove()
    assert sum(on_host(session)) == 0
    rig.close()


def test_not_into_pageable_memory_which_would_hold_up_the_pass(rig: Rig, monkeypatch) -> None:
    monkeypatch.setattr(rig.host, "_pageable_bytes", UNIT)
    session, _ = stopped(rig)
    monkeypatch.undo()
    assert session._holding.behind is None


# what ends it in the middle


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=lambda error: type(error).__name__)
def test_an_error_between_two_blocks_of_a_layer(rig: Rig, monkeypatch, error: BaseException) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", UNIT)
    session = rig.open(max_length=200)
    rig.host.prepare(16 * UNIT)
    take, calls = rig.host.take_ready, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:  # the second layer's second block
            raise error
        return take(*args)

    ids = prompt(tokens=200)
    first = rig.served.model.layers[0]
    hook = first.register_forward_pre_hook(lambda *_: monkeypatch.setattr(rig.host, "take_ready", fail))
    with pytest.raises(type(error)):
        session.forward(ids, stop_after=3)
    hook.remove()
    monkeypatch.undo()
    session.forward(ids, stop_after=3)
    leave_and_return(session, Oracle(rig.stock).forward(ids))


def test_ctrl_c_while_someone_waits_for_the_copies(rig: Rig) -> None:
    """They run on, and what they read stays until they have ended."""
    rig.device.link_gbps = LINK_GBPS / 10  # 0.3 s a layer
    session, _ = stopped(rig)
    session.pause(release=True)
    with interrupted(0.1), pytest.raises(KeyboardInterrupt):
        session.wait_until("released", 10)
    rig.device.link_gbps = None
    session.close()
    assert rig.sessions.pager.d2h_behind.query()


def test_ctrl_c_at_the_end_of_a_pass_that_failed(rig: Rig) -> None:
    """Its bring-in was to begin at the end of the pass, and ends all the same."""
    session, _ = stopped(rig, 2)
    session.pause(release=True)
    session.wait_until("released", 10)
    rig.device.link_gbps = LINK_GBPS / 10

    def fail(*_: object) -> None:
        raise RuntimeError("the fourth layer fails")

    hook = rig.served.model.layers[3].register_forward_pre_hook(fail)
    with interrupted(0.1), contextlib.suppress(KeyboardInterrupt, RuntimeError):
        session.resume(stop_after=4)
    hook.remove()
    rig.device.link_gbps = None
    session.close()
