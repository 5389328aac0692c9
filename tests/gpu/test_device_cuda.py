"""What the contract's own tests (tests/device, tests/memory, run on the GPU too) do not see of the CUDA device."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda.bindings import driver

from djinn_core.device import Direction, open_device
from djinn_core.device.drivercalls import checked
from djinn_core.errors import ConfigError, DeviceError
from djinn_core.memory import Extent, ExtentPool, HostBlock, HostTier, Kind, Region

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MIB = 1 << 20


@pytest.fixture
def gpu():
    device = open_device("cuda:0")
    yield device
    device.close()


def test_the_device_describes_the_gpu(gpu):
    assert gpu.is_gpu
    assert gpu.granularity_bytes % (64 << 10) == 0
    assert gpu.capacity_bytes == torch.cuda.get_device_properties(0).total_memory
    assert 0 < gpu.used_bytes() < gpu.capacity_bytes
    with pytest.raises(ConfigError):
        open_device("cuda:0", capacity_bytes=MIB)


def test_a_tensor_made_before_any_map_computes_after_one(gpu):
    unit = gpu.granularity_bytes
    pool, region = ExtentPool(gpu, 4 * unit), Region(gpu, 4 * unit)
    view = region.view(unit, (64, 64), torch.float16)
    assert view.device == gpu.torch_device
    assert view.data_ptr() == region.address + unit
    extent = pool.acquire(unit, Kind.KV, "s")
    region.map([(unit, extent)])
    view.copy_(torch.eye(64))
    assert torch.equal((view @ view).cpu(), torch.eye(64, dtype=torch.float16))
    gpu.synchronize()
    region.unmap([unit])
    region.map([(unit, extent)])
    assert torch.equal(view.cpu(), torch.eye(64, dtype=torch.float16))
    gpu.synchronize()
    pool.give_back(*region.unmap([unit]))
    region.close()
    pool.close()


def test_a_tensor_over_a_mapped_place_keeps_its_bytes(gpu):
    unit = gpu.granularity_bytes
    handle, address = gpu.create(unit), gpu.reserve(unit)
    gpu.map(address, handle, unit)
    gpu.grant(address, unit)
    gpu.tensor(address, unit).fill_(6)
    assert (gpu.tensor(address, unit) == 6).all()
    gpu.synchronize()
    gpu.unmap(address, unit)
    gpu.release(address, unit)
    gpu.destroy(handle)


def test_a_graph_survives_a_swap(gpu):
    unit = gpu.granularity_bytes
    pool, region = ExtentPool(gpu, 2 * unit), Region(gpu, unit)
    extent = pool.acquire(unit, Kind.KV, "s")
    region.map([(0, extent)])
    view = region.view(0, (1024,), torch.float32)
    view.zero_()
    gpu.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        view.add_(1)
    graph.replay()
    gpu.synchronize()
    region.unmap([0])
    region.map([(0, extent)])
    graph.replay()
    gpu.synchronize()
    assert (view == 2).all()
    del graph
    pool.give_back(*region.unmap([0]))
    region.close()
    pool.close()


def test_a_wait_with_a_blocking_event_sleeps(gpu):
    spent = {}
    for blocking in (False, True):
        event = gpu.event(timing=True, blocking=blocking)
        gpu.synchronize()
        torch.cuda._sleep(400_000_000)  # cycles: a fifth of a second and more
        event.record(gpu.current_stream())
        begin_s, cpu_s = time.perf_counter(), time.thread_time()
        event.synchronize()
        spent[blocking] = (time.thread_time() - cpu_s) / (time.perf_counter() - begin_s)
    assert spent[True] < 0.2 < spent[False]


def test_copies_from_the_host_tier_do_not_block_the_caller(gpu):
    size_bytes = 512 * MIB
    pool, region, host = ExtentPool(gpu, size_bytes), Region(gpu, size_bytes), HostTier(gpu, 2 * size_bytes)
    region.map([(0, pool.acquire(size_bytes, Kind.KV, "s"))])
    block = host.allocate_exact(size_bytes, "s")
    assert block.tensor.is_pinned()
    stream, event = gpu.stream(), gpu.event()
    gpu.copy(region.tensor, block.tensor, stream, Direction.H2D)
    gpu.synchronize()
    start = time.perf_counter()
    gpu.copy(region.tensor, block.tensor, stream, Direction.H2D)
    event.record(stream)
    issued_s = time.perf_counter() - start
    assert not event.query()
    event.synchronize()
    assert issued_s < (time.perf_counter() - start) / 2
    pool.give_back(*region.unmap([0]))
    block.free()
    host.close()
    region.close()
    pool.close()


@pytest.mark.parametrize("keeps", [True, False], ids=["in batches", "one by one"])
def test_copies_that_give_way_let_another_stream_go_first(gpu, keeps):
    """Half a gigabyte is queued; what is issued last arrives long before its end, and nothing is lost."""
    size_bytes, steps = 32 * MIB, 16
    pool, region = ExtentPool(gpu, 17 * size_bytes), Region(gpu, 17 * size_bytes)
    region.map([(0, pool.acquire(17 * size_bytes, Kind.KV, "s"))])
    host = HostTier(gpu, 2 * size_bytes + MIB)
    block, other = (host.allocate_exact(size_bytes, name) for name in ("s", "t"))
    block.tensor.fill_(5)
    other.tensor.fill_(6)
    slow, quick = gpu.stream(), gpu.stream()
    for _ in range(2):  # the first time warms up
        gpu.synchronize()
        begin, arrived, end = (gpu.event(timing=True) for _ in range(3))
        for step in range(steps):
            target = region.tensor[step * size_bytes : (step + 1) * size_bytes]
            begun = None if step else begin
            pairs, how = [(target, block.tensor)], {"piece_bytes": 8 * MIB, "gives_way": True, "begun": begun}
            with gpu.keeping_interpreter(keeps):
                gpu.copy_all(pairs, slow, Direction.H2D, **how)
        end.record(slow)
        gpu.copy_all([(region.tensor[steps * size_bytes :], other.tensor)], quick, Direction.H2D, piece_bytes=8 * MIB)
        arrived.record(quick)
        gpu.synchronize()
    assert begin.elapsed_time(arrived) < begin.elapsed_time(end) / 2
    assert (region.tensor[: steps * size_bytes] == 5).all() and (region.tensor[steps * size_bytes :] == 6).all()
    gpu.synchronize()
    pool.give_back(*region.unmap([0]))
    block.free()
    other.free()
    host.close()
    region.close()
    pool.close()


@contextmanager
def another_thread() -> Iterator[Callable[[], int]]:
    """Says how often a thread that only wants to run has run: it gets in where the interpreter is given away."""
    ran, stop = 0, False

    def spin():
        nonlocal ran
        while not stop:
            ran += 1
            time.sleep(0)  # it asks for the interpreter again

    other, before_s = threading.Thread(target=spin), sys.getswitchinterval()
    sys.setswitchinterval(30)
    other.start()
    try:
        yield lambda: ran
    finally:
        stop = True
        sys.setswitchinterval(before_s)
        other.join()


@contextmanager
def both_sides(gpu, size_bytes) -> Iterator[tuple[Region, Extent, HostBlock]]:
    """A region, what may be mapped at its beginning, and as much of the host."""
    pool, region, host = ExtentPool(gpu, size_bytes), Region(gpu, size_bytes), HostTier(gpu, size_bytes + MIB)
    block = host.allocate_exact(size_bytes, "s")
    yield region, pool.acquire(size_bytes, Kind.KV, "s"), block
    gpu.synchronize()
    pool.give_back(*region.unmap([0]))
    block.free()
    host.close()
    region.close()
    pool.close()


@pytest.mark.parametrize("keeps", [True, False])
def test_calls_that_keep_the_interpreter(gpu, keeps):
    """They do what the others do, and no other thread runs meanwhile."""
    size_bytes, stream = 32 * MIB, gpu.stream()
    with both_sides(gpu, size_bytes) as (region, extent, block):
        block.tensor.view(torch.int32).copy_(torch.arange(size_bytes // 4, dtype=torch.int32))
        with another_thread() as ran, gpu.keeping_interpreter(keeps):
            before, ran_before = gpu.copied, ran()
            region.map([(0, extent)])
            gpu.copy_all([(region.tensor, block.tensor)], stream, Direction.H2D, piece_bytes=8 * MIB, gives_way=True)
            grants = 0
            while grants < 50 or (not keeps and ran() == ran_before and grants < 50_000):  # the other has to be awake
                gpu.grant(region.address, size_bytes)
                grants += 1
            free_bytes = gpu.capacity_bytes - gpu.used_bytes()
            meanwhile, copied = ran() - ran_before, gpu.copied - before
        assert (meanwhile == 0) is keeps
        assert copied.h2d_bytes == size_bytes and 0 < free_bytes < gpu.capacity_bytes
        gpu.synchronize()
        assert torch.equal(region.tensor.cpu(), block.tensor)


@pytest.mark.parametrize("keeps", [True, False])
def test_events_and_batches_that_keep_the_interpreter(gpu, keeps, monkeypatch):
    """No other thread runs between a pause's copies and the events around them."""
    unit, stream, second = gpu.granularity_bytes, gpu.stream(), gpu.stream()
    begun, done, spare = (gpu.event(timing=True) for _ in range(3))
    del spare  # a handle to use again
    batches, batch = [], gpu._held.cuMemcpyBatchAsync
    monkeypatch.setattr(gpu._held, "cuMemcpyBatchAsync", lambda *given: batches.append(len(given[0])) or batch(*given))
    with both_sides(gpu, unit) as (region, extent, block):
        region.map([(0, extent)])
        region.tensor.copy_(torch.arange(unit, dtype=torch.int64).to(torch.uint8))
        gpu.synchronize()
        pairs = list(zip(block.tensor.split(unit // 40), region.tensor.split(unit // 40), strict=True))
        with another_thread() as ran, gpu.keeping_interpreter(keeps):
            ran_before = ran()
            for _ in range(200):
                gpu.copy_all(pairs, stream, Direction.D2H, begun=begun, done=done)
                gpu.event(timing=True).record(stream)  # and is given up at once
                second.wait_event(done)
                done.query()
            meanwhile = ran() - ran_before
        assert (meanwhile == 0) is keeps
        if checked("cuDriverGetVersion", driver.cuDriverGetVersion()) >= 13_000:
            assert batches == [len(pairs)] * 200 * keeps
        done.synchronize()
        assert 0 < begun.elapsed_time(done) < 1000
        assert torch.equal(region.tensor.cpu(), block.tensor)


def test_an_events_handle_is_used_again_and_counts_as_new(gpu):
    stream, first = gpu.stream(), gpu.event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    first.record(stream)
    handle = first._handle
    assert not first.query()
    del first
    again = gpu.event()
    assert again._handle == handle
    assert again.query()
    again.record(stream)
    assert not again.query()
    torch.cuda.current_stream().wait_event(again)
    torch.cuda.current_stream().synchronize()
    assert again.query()


def test_every_stream_is_its_own_and_a_closed_device_leaves_them_to_the_next():
    device = open_device("cuda:0")
    streams = [device.stream() for _ in range(40)]
    others = [torch.cuda.Stream() for _ in range(40)]
    handles = {stream.cuda_stream for stream in streams}
    assert len(handles) == 40
    assert not handles & {stream.cuda_stream for stream in others}
    device.close()
    again = open_device("cuda:0")
    assert {again.stream().cuda_stream for _ in range(40)} == handles
    again.close()


def test_a_thread_that_nobody_bound_can_use_the_device(gpu):
    failures = []

    def work():
        try:
            gpu.destroy(gpu.create(gpu.granularity_bytes))
        except DeviceError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert failures == []


def test_errors_name_the_call_and_what_the_driver_says(gpu):
    with pytest.raises(DeviceError, match=r"cuMemSetAccess failed: CUDA_ERROR_\w+, \w+"):
        gpu.grant(gpu.granularity_bytes, gpu.granularity_bytes)
    with pytest.raises(DeviceError, match="cuMemHostUnregister"):
        gpu.unpin(4096, 4096)
