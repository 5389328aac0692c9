"""What a failure leaves behind: a session that can go on or be closed, and no bytes that belong to nobody."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from pathlib import Path

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import (
    DeviceError,
    DjinnError,
    OutOfDeviceMemory,
    OutOfHostMemory,
    SessionStateError,
    UsageError,
)
from djinn_core.sessions import SessionState
from djinn_core.sessions.snapshot import load_session
from djinn_core.sessions.tensorfile import TensorFile
from tests.sessions.oracle import Oracle, likely, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, spill

UNIT = 64 << 10
pytestmark = pytest.mark.timeout(40)


def away(session) -> None:
    session.pause(release=True)
    session.wait_until("released", 10)


def no_hole(monkeypatch_context) -> None:
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch_context.setattr("djinn_core.memory.disktier.libc.punch_hole", fail)


def in_time(work, seconds: float = 4.0) -> list[BaseException]:
    """What it raised; fails when it does not end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it never ends"
    return errors


def test_close_can_be_tried_again(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=64 * UNIT)
    session = rig.open()
    session.forward(prompt())
    away(session)
    spill(rig, session)
    with monkeypatch.context() as patch, contextlib.suppress(DeviceError):
        no_hole(patch)
        session.close()
    assert not in_time(session.close)
    assert session.state is SessionState.CLOSED and rig.disk.held_bytes == 0


def test_drop_gives_everything_up(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=64 * UNIT)
    session = rig.open()
    start = session.checkpoint()
    session.forward(prompt())
    point = session.checkpoint()
    session.resume(start)
    pager = rig.sessions.pager
    for block in point.table:
        assert pager.tiers._spill(session._holding, block)
    assert rig.disk.held_bytes
    with monkeypatch.context() as patch, contextlib.suppress(DeviceError):
        no_hole(patch)
        session.drop(point)
    session.close()
    assert rig.disk.held_bytes == 0


def test_going_back_changes_all_or_nothing(make_rig: MakeRig, monkeypatch) -> None:
    rig = make_rig(disk_bytes=64 * UNIT)
    session, oracle = rig.open(), Oracle(rig.stock)
    first = oracle.forward(prompt())
    (wanted,) = oracle.greedy(first, 1)
    start = session.checkpoint()
    logits = session.forward(prompt())
    away(session)
    spill(rig, session)
    with monkeypatch.context() as patch, contextlib.suppress(DeviceError):
        no_hole(patch)
        session.resume(start)
    if session.state is not SessionState.RUNNING:
        session.resume()  # from where it stands
    assert (session.length == 12) == (session.logits is not None), (
        f"{session.length} tokens, and logits of a pass over 12"
    )
    if session.length:
        assert torch.equal(session.forward(likely(logits)), wanted)


def test_a_close_that_fails_leaves_the_session_as_it_was(make_rig: MakeRig, monkeypatch) -> None:
    monkeypatch.setattr("djinn_core.sessions.tiers.PATIENCE_S", 0.2)
    rig = make_rig(host_bytes=4 * UNIT)
    others = [rig.host.allocate(UNIT, "others") for _ in range(3)]  # one is left, for the boundary
    session = rig.open()
    session.forward(prompt(), stop_after=3)
    wanted = Oracle(rig.stock).forward(prompt())
    twin = session.fork()
    with pytest.raises(OutOfHostMemory):
        session.close()  # the branch wants its blocks, and the host has no room for them
    out = session.resume()  # "nothing was lost": so go on instead
    lengths = session._holding.table.lengths
    for block in others:
        block.free()
    twin.close()
    assert out is not None and torch.equal(out, wanted), f"resume returned {out}, lengths {lengths}"


def test_closing_everything_needs_no_host_memory(make_rig: MakeRig, monkeypatch) -> None:
    monkeypatch.setattr("djinn_core.sessions.tiers.PATIENCE_S", 0.2)
    rig = make_rig(host_bytes=2 * UNIT)
    session = rig.open()
    session.forward(prompt())
    session.fork()
    rig.sessions.close()
    assert rig.pool.held_bytes == 0


def test_a_load_that_fails_leaves_nothing(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.save(tmp_path / "saved")
    session.close()
    calls = []

    def fail(self, name, target):
        calls.append(name)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return plain(self, name, target)

    plain = TensorFile.read_into
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(TensorFile, "read_into", fail)
        load_session(tmp_path / "saved", rig.served, rig.sessions)
    assert (len(rig.sessions.infos()), rig.host.held_bytes) == (0, 0)


def test_a_save_to_a_full_disk_says_so(rig: Rig, monkeypatch, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Exception) as caught:
        patch.setattr("djinn_core.sessions.tensorfile.os.fsync", full)
        session.save(tmp_path / "saved")
    assert isinstance(caught.value, DjinnError), repr(caught.value)


def test_a_boundary_that_stayed_on_the_device_can_be_saved(rig: Rig, tmp_path: Path) -> None:
    session = rig.open()
    session.forward(prompt(tokens=1))
    rig.device.faults = FaultPlan().fail("copy", 1, asynchronous=True)
    session.forward(prompt(tokens=1, seed=2), stop_after=2)
    rig.device.faults = None
    away(session)
    errors = []
    for _ in range(3):
        try:
            session.save(tmp_path / "saved")
            break
        except DjinnError as error:
            errors.append(error)
    assert len(errors) < 3, errors


def test_a_boundary_on_the_device_is_not_changed_by_a_pass(rig: Rig) -> None:
    session = rig.open()
    gate = threading.Event()
    rig.device.launch(rig.sessions.pager.staging.out_stream, lambda: gate.wait(20))  # its copy is still on the way
    point = session.forward(prompt(), stop_after=2)

    def halve(module, args) -> None:
        args[0].mul_(0.5)

    hook = rig.served.model.layers[2].input_layernorm.register_forward_pre_hook(halve)
    try:
        one = session.resume(point).clone()
        two = session.resume(point).clone()
    finally:
        hook.remove()
        gate.set()
    assert torch.equal(one, two), "resuming consumed the checkpoint"


def test_a_policy_that_insists_does_not_hang_anybody(make_rig: MakeRig) -> None:
    class Insists:
        def choose(self, candidates, needed_bytes, now_s):
            return ["s0"]

    rig = make_rig(device_bytes=8 * UNIT, policy=Insists())
    one = rig.open()
    one.forward(prompt())
    stop = []
    plain = rig.sessions.pager.policy.choose

    def choose(*args):
        if stop:
            return []
        return plain(*args)

    rig.sessions.pager.policy.choose = choose
    two = rig.open()
    try:
        errors = in_time(lambda: two.forward(prompt()), 3)
    finally:
        stop.append(1)
        time.sleep(0.2)
    assert errors and isinstance(errors[0], OutOfDeviceMemory)


def test_the_trimmer_survives_a_failure(rig: Rig, monkeypatch) -> None:
    destroy, calls = rig.device.destroy, []

    def once(handle):
        calls.append(handle)
        if len(calls) == 1:
            raise DeviceError("destroy failed")
        destroy(handle)

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(rig.device, "destroy", once)
    for _ in range(3):
        session = rig.open()
        session.forward(prompt())
        session.close()
        time.sleep(0.2)
    assert rig.pool.pooled_bytes == 0, f"{rig.pool.pooled_bytes} bytes are kept from the driver for ever"


def test_who_is_admitted_can_run_alone(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=6 * UNIT)
    try:
        session = rig.open()
    except OutOfDeviceMemory:
        return
    session.forward(prompt())


@pytest.mark.parametrize("hint", ["soon", math.nan, math.inf, -math.inf, 10**400])
def test_a_wrong_hint_changes_nothing(rig: Rig, hint: object) -> None:
    session = rig.open()
    session.forward(prompt())
    with pytest.raises(UsageError, match="give seconds from now, or None"):
        session.pause(expected_resume_s=hint, release=True)
    assert session.state is SessionState.RUNNING


def test_an_open_that_fails_half_way_gives_its_addresses_back(rig: Rig, monkeypatch) -> None:
    first = rig.open()
    before = len(rig.device._reserved)

    def fail(*_):
        raise OutOfDeviceMemory("no scratch granule", needed_bytes=1, free_bytes=0)

    with monkeypatch.context() as patch, pytest.raises(OutOfDeviceMemory):
        patch.setattr(rig.device, "tensor", fail)  # on a GPU: `tensor` creates a granule
        rig.open()
    after = len(rig.device._reserved)
    first.close()
    for start in list(rig.device._reserved._starts):
        size = rig.device._reserved.get(start)
        if size == 4 * UNIT:
            rig.device.release(start, size)
    assert after == before


def test_a_slot_that_fails_half_way_gives_its_extent_back(rig: Rig, monkeypatch) -> None:
    rig.open()
    held = rig.pool.held_bytes

    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    from djinn_core.sessions import staging

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(staging.Slot, "renew", fail)
        rig.open(max_length=2000)
    assert rig.pool.held_bytes == held


def test_failed_copies_are_taken_back_beside_an_eviction(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session.forward(prompt())
    wanted = Oracle(rig.stock)
    first = wanted.forward(prompt())
    away(session)
    pager = rig.sessions.pager
    rig.device.faults = FaultPlan().fail("copy", 3, asynchronous=True)
    session.resume()
    session._holding.wait_issued()
    rig.device.faults = None
    plain = pager._take_back

    def evicted_first(holding, lost=None):
        pager.evict(holding, wait=False)  # another session needs room, just now
        return plain(holding, lost)

    monkeypatch.setattr(pager, "_take_back", evicted_first)
    with pytest.raises(DjinnError) as caught:
        session.forward(likely(first))
    monkeypatch.undo()
    print(repr(caught.value), session.state)
    session.resume()
    assert torch.equal(session.forward(likely(first)), wanted.greedy(first, 1)[0])
    assert "planned fault" in str(caught.value)


def test_a_stop_beside_a_branch_that_plans(rig: Rig, monkeypatch) -> None:
    one = rig.open()
    logits = one.forward(prompt())
    two = one.fork()
    two.resume()
    two.wait_until("restored", 10)
    pager = rig.sessions.pager
    from djinn_core.sessions.blocks import BlockTable

    issued, inside, copied = threading.Event(), threading.Event(), threading.Event()
    boundary_issued, reach, copy = pager.boundary_issued, BlockTable.reach_bytes, BlockTable.copy
    errors = []

    def plan() -> None:
        try:
            issued.wait(5)
            two.forward(likely(logits))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    def after_settle(boundary):
        boundary_issued(boundary)
        issued.set()
        inside.wait(5)

    def slow(self, block):
        if threading.current_thread() is planner and block.layer == 3 and not inside.is_set():
            inside.set()
            copied.wait(2)
        return reach(self, block)

    def copying(self):
        out = copy(self)
        copied.set()
        return out

    planner = threading.Thread(target=plan)
    monkeypatch.setattr(pager, "boundary_issued", after_settle)
    monkeypatch.setattr(BlockTable, "reach_bytes", slow)
    monkeypatch.setattr(BlockTable, "copy", copying)
    planner.start()
    one.forward(likely(logits), stop_after=2)
    planner.join(10)
    assert not errors, errors


def test_not_into_a_slab_that_came_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    from djinn_core.errors import PinningRefused
    from djinn_core.memory import HostTier
    from tests.sessions import rigs

    rig = rigs.make_rig(tmp_path)
    rig.host._optional = True
    session = rig.open()
    copies = []

    def refuse(address, size_bytes):
        raise PinningRefused("refused", needed_bytes=size_bytes, free_bytes=0)

    def grown(*_):
        rig.device.pin = refuse
        ready = [rig.host.allocate(UNIT, "others") for _ in range(rig.host._ready_bytes() // UNIT)]
        copies.append(ready)
        copies.append(rig.host.allocate(UNIT, "others"))  # a slab that is pageable

    hook = rig.served.model.layers[0].register_forward_pre_hook(grown)
    assert rig.host.pinned
    session.forward(prompt(), stop_after=4)
    hook.remove()
    behind = session._holding.behind
    pageable = [copy for copy in behind._copies if not copy.host.pinned] if behind else []
    for block in (*copies[0], copies[1]):
        block.free()
    rig.close()
    assert not pageable, f"{len(pageable)} copies held up the pass"
    del HostTier


def test_logits_keep_one_position(rig: Rig, monkeypatch) -> None:
    session = rig.open()
    session._options = {}  # as for a model whose forward does not know logits_to_keep
    logits = session.forward(prompt())
    assert logits.untyped_storage().nbytes() == logits.numel() * logits.element_size()


@pytest.mark.parametrize("choice", ["s1", [1, 2], 7])
def test_a_policy_that_returns_no_ids_is_named(make_rig: MakeRig, choice: object) -> None:
    class Strange:
        def choose(self, candidates, needed_bytes, now_s):
            return choice

    rig = make_rig(device_bytes=8 * UNIT, policy=Strange())
    one, two = rig.open(), rig.open()
    one.forward(prompt())
    one.pause()
    one.wait_until("clean", 10)
    with pytest.raises(UsageError, match="the policy Strange"):
        two.forward(prompt(tokens=40))


def test_who_calls_a_session_from_its_own_pass_is_told_so(rig: Rig) -> None:
    session, told = rig.open(), []

    def inside(*_: object) -> None:
        with pytest.raises(SessionStateError, match="under way on this thread"):
            session.pause()
        told.append(True)

    hook = rig.served.get_input_embeddings().register_forward_hook(inside)
    session.forward(prompt())
    hook.remove()
    assert told


def test_a_resize_says_who_cannot_leave_and_why(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=6 * LAYERS * UNIT, host_bytes=2 * LAYERS * UNIT)
    for _ in range(6):
        session = rig.open()
        session.forward(prompt())
        session.pause()
    with pytest.raises(OutOfDeviceMemory, match=r"cannot leave \(\d paused; .* the host is full"):
        rig.sessions.pager.resize(2 * LAYERS * UNIT)
