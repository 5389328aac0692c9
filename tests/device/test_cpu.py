"""What the emulated device has beyond the contract: faults, strictness, asynchrony that can be seen."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_core.device import Direction, libc, open_device
from djinn_core.device.faults import FaultPlan
from djinn_core.device.spans import FreeSpans
from djinn_core.errors import DeviceError, OutOfDeviceMemory, PinningRefused, TransferError

UNIT = 64 << 10
TOUCH = """
import torch
from djinn_core.device import open_device
device = open_device("cpu", capacity_bytes=1 << 20)
unit = device.granularity_bytes
address = device.reserve(4 * unit)
tensor = device.tensor(address, 4 * unit)
handle = device.create(unit)
device.map(address, handle, unit)
{before}
tensor[{index}] = 1
print("survived", flush=True)
"""


@pytest.fixture
def mapped(cpu_device):
    handle = cpu_device.create(UNIT)
    address = cpu_device.reserve(UNIT)
    cpu_device.map(address, handle, UNIT)
    cpu_device.grant(address, UNIT)
    yield cpu_device.tensor(address, UNIT)
    cpu_device.faults = None
    cpu_device.synchronize()
    cpu_device.unmap(address, UNIT)
    cpu_device.release(address, UNIT)


@pytest.fixture
def pinned(cpu_device):
    block = torch.zeros(UNIT, dtype=torch.uint8)
    cpu_device.pin(block.data_ptr(), UNIT)
    yield block
    cpu_device.unpin(block.data_ptr(), UNIT)


@pytest.mark.parametrize(
    ("before", "index", "faults"),
    [
        ("device.grant(address, unit)", 0, False),
        ("", 0, True),  # mapped, not granted
        ("device.grant(address, unit)", UNIT, True),  # reserved only
        ("device.grant(address, unit); device.unmap(address, unit)", 0, True),
    ],
)
def test_touching_what_is_not_there_is_a_fault(before, index, faults):
    code = TOUCH.format(before=before, index=index)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    if faults:
        assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
        assert "survived" not in done.stdout
    else:
        assert done.returncode == 0, done.stderr


def test_fragmentation_is_no_reason_to_fail():
    device = open_device("cpu", capacity_bytes=8 * UNIT)
    handles = [device.create(UNIT) for _ in range(8)]
    for handle in handles[::2]:
        device.destroy(handle)
    scattered = device.create(4 * UNIT)
    address = device.reserve(8 * UNIT)
    for at in (0, 4 * UNIT):
        device.map(address + at, scattered, 4 * UNIT)
        device.grant(address + at, 4 * UNIT)
    tensor = device.tensor(address, 8 * UNIT)
    tensor[: 4 * UNIT] = (torch.arange(4 * UNIT) % 253).to(torch.uint8)
    assert torch.equal(tensor[: 4 * UNIT], tensor[4 * UNIT :])
    device.unmap(address, 4 * UNIT)
    device.unmap(address + 4 * UNIT, 4 * UNIT)
    device.destroy(scattered)
    device.release(address, 8 * UNIT)
    device.close()


def test_destroyed_memory_really_goes(cpu_device, mapped):
    big = cpu_device.create(256 * UNIT)
    address = cpu_device.reserve(256 * UNIT)
    cpu_device.map(address, big, 256 * UNIT)
    cpu_device.grant(address, 256 * UNIT)
    cpu_device.tensor(address, 256 * UNIT).fill_(1)
    blocks = os.fstat(cpu_device._fd).st_blocks * 512
    cpu_device.unmap(address, 256 * UNIT)
    cpu_device.destroy(big)
    assert blocks - os.fstat(cpu_device._fd).st_blocks * 512 >= 256 * UNIT
    cpu_device.release(address, 256 * UNIT)


def test_a_mapped_handle_cannot_be_destroyed(cpu_device):
    handle, address = cpu_device.create(UNIT), cpu_device.reserve(UNIT)
    cpu_device.map(address, handle, UNIT)
    with pytest.raises(DeviceError, match="still mapped"):
        cpu_device.destroy(handle)
    with pytest.raises(DeviceError, match="maps in it"):
        cpu_device.release(address, UNIT)
    cpu_device.unmap(address, UNIT)
    cpu_device.release(address, UNIT)
    cpu_device.destroy(handle)
    with pytest.raises(DeviceError, match="does not exist"):
        cpu_device.destroy(handle)


def test_an_unpinned_source_is_refused_and_not_counted(cpu_device, mapped):
    with pytest.raises(TransferError, match="nor pinned"):
        cpu_device.copy(mapped, torch.zeros(UNIT, dtype=torch.uint8), cpu_device.stream(), Direction.H2D)
    assert cpu_device.copied.h2d_bytes == 0


def test_copies_are_asynchronous_and_keep_order(cpu_device, mapped, pinned):
    cpu_device.link_gbps = UNIT / 1e9 / 0.05  # 50 ms a copy
    pinned.fill_(5)
    stream, event = cpu_device.stream(), cpu_device.event()
    start = time.perf_counter()
    cpu_device.copy(mapped, pinned, stream, Direction.H2D)
    event.record(stream)
    assert time.perf_counter() - start < 0.04
    assert not event.query()
    assert not stream.query()
    assert (mapped == 0).all()  # not waiting is a race that can be seen
    event.synchronize()
    assert (mapped == 5).all()


def test_a_failed_copy_in_flight_is_told_once_by_the_stream_and_always_by_its_event(cpu_device, mapped, pinned):
    cpu_device.faults = FaultPlan().fail("copy", asynchronous=True)
    stream, before, after = cpu_device.stream(), cpu_device.event(), cpu_device.event()
    before.record(stream)
    pinned.fill_(8)
    cpu_device.copy(mapped, pinned, stream, Direction.H2D)
    after.record(stream)
    with pytest.raises(TransferError, match="planned fault"):
        after.synchronize()
    with pytest.raises(TransferError):
        after.query()
    before.synchronize()
    stream.synchronize()  # told already
    assert (mapped == 0).all()
    cpu_device.copy(mapped, pinned, stream, Direction.H2D)
    after.record(stream)
    after.synchronize()
    assert (mapped == 8).all()


def test_a_failure_reaches_a_stream_that_waits_for_it(cpu_device, mapped, pinned):
    cpu_device.faults = FaultPlan().fail("copy", asynchronous=True)
    first, second, event = cpu_device.stream(), cpu_device.stream(), cpu_device.event()
    cpu_device.copy(mapped, pinned, first, Direction.H2D)
    event.record(first)
    second.wait_event(event)
    with pytest.raises(TransferError):
        second.synchronize()
    with pytest.raises(TransferError):
        cpu_device.current_stream().wait_event(event)


def test_any_error_of_queued_work_is_told(cpu_device):
    stream = cpu_device.stream()
    cpu_device.launch(stream, lambda: {}["missing"])
    with pytest.raises(DeviceError, match="missing"):
        cpu_device.synchronize()
    cpu_device.synchronize()


def test_close_ends_streams_that_wait_for_ever():
    device = open_device("cpu", capacity_bytes=UNIT)
    waiting, blocked = device.stream(), device.stream()
    event = device.event()
    device.launch(blocked, lambda: time.sleep(1.5))
    event.record(blocked)
    waiting.wait_event(event)
    start = time.perf_counter()
    device.close()
    assert time.perf_counter() - start < 6


@pytest.mark.parametrize("call", ["create", "map", "grant", "unmap", "copy", "pin"])
def test_each_call_can_be_failed_once_and_retried(cpu_device, call, pinned):
    plan = cpu_device.faults = FaultPlan().fail(call)
    other = torch.zeros(UNIT, dtype=torch.uint8)
    address = cpu_device.reserve(UNIT)
    handle = None
    failures = []

    def tried(work):
        try:
            return work()
        except (DeviceError, OutOfDeviceMemory, PinningRefused) as error:
            failures.append(error)
            return work()

    handle = tried(lambda: cpu_device.create(UNIT))
    tried(lambda: cpu_device.map(address, handle, UNIT))
    tried(lambda: cpu_device.grant(address, UNIT))
    tensor = cpu_device.tensor(address, UNIT)
    tried(lambda: cpu_device.copy(tensor, pinned, cpu_device.current_stream(), Direction.H2D))
    tried(lambda: cpu_device.pin(other.data_ptr(), UNIT))
    tried(lambda: cpu_device.unmap(address, UNIT))
    assert plan.fired == [call]
    assert len(failures) == 1
    assert cpu_device.copied.h2d_bytes == UNIT
    cpu_device.unpin(other.data_ptr(), UNIT)
    cpu_device.destroy(handle)
    cpu_device.release(address, UNIT)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_spans_never_overlap_and_come_back_whole(steps):
    spans = FreeSpans(64, 1)
    taken: list[tuple[int, int]] = []
    for give, size in steps:
        if give and taken:
            spans.give(*taken.pop(size % len(taken)))
        else:
            pieces = spans.take_scattered(size)
            assert (pieces is None) == (size > 64 - sum(n for _, n in taken))
            taken += pieces or []
        used = sorted(byte for start, n in taken for byte in range(start, start + n))
        assert len(used) == len(set(used)) == 64 - spans.free_bytes
    for piece in taken:
        spans.give(*piece)
    assert spans.largest_bytes == 64
    with pytest.raises(ValueError):
        spans.give(0, 1)


def test_addresses_that_cannot_be_had_are_an_error_of_the_device():
    device = open_device("cpu", capacity_bytes=1 << 20)
    try:
        with pytest.raises(DeviceError, match="addresses could be reserved"):
            device.reserve(1 << 60)
    finally:
        device.close()


def test_no_copy_is_of_more_than_a_piece(cpu_device, mapped, pinned):
    """Each piece is a copy of its own, so that another stream's gets in between."""
    cpu_device.faults = plan = FaultPlan()
    stream = cpu_device.stream()
    pairs = [(mapped[: UNIT // 2], pinned[: UNIT // 2]), (mapped[UNIT // 2 :], pinned[UNIT // 2 :])]
    cpu_device.copy_all(pairs, stream, Direction.H2D, piece_bytes=UNIT // 4)
    cpu_device.copy_all(pairs[:1], stream, Direction.H2D, piece_bytes=UNIT // 2)
    stream.synchronize()
    assert plan.counts["copy"] == 4 + 1


@pytest.mark.parametrize("piece_bytes", [UNIT, UNIT // 4])
def test_copies_say_when_the_first_one_begins_and_the_last_one_is_done(cpu_device, mapped, pinned, piece_bytes):
    cpu_device.link_gbps = UNIT / 0.1e9  # a tenth of a second for all of it
    stream, begun, done = cpu_device.stream(), cpu_device.event(timing=True), cpu_device.event(timing=True)
    cpu_device.copy_all([(mapped, pinned)], stream, Direction.H2D, piece_bytes=piece_bytes, begun=begun, done=done)
    assert not done.query()
    stream.synchronize()
    assert begun.elapsed_time(done) > 90


def test_memory_that_the_system_does_not_take_back_stays_the_handles(cpu_device, monkeypatch):
    handle = cpu_device.create(UNIT)
    used = cpu_device.used_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(libc, "punch_hole", raising)
        with pytest.raises(DeviceError, match="could not be given back"):
            cpu_device.destroy(handle)
    assert cpu_device.used_bytes() == used
    cpu_device.destroy(handle)
    assert cpu_device.used_bytes() == used - UNIT


def raising(*_):
    raise OSError(5, "Input/output error")
