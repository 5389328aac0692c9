"""The pool: budget, accounting, reuse, the background trimmer, and failures."""

import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from djinn_core.device import open_device
from djinn_core.device.faults import FaultPlan
from djinn_core.errors import OutOfDeviceMemory, UsageError
from djinn_core.memory import ExtentPool, Kind, Ledger

UNIT = 64 << 10


def wait_for(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def make_pool(device):
    pools = []

    def make(granules, **options):
        pools.append(ExtentPool(device, granules * device.granularity_bytes, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_sizes_are_rounded_up_and_reused(device, make_pool):
    unit = device.granularity_bytes
    pool = make_pool(4, reserve_bytes=4 * unit)
    extent = pool.acquire(unit + 1, Kind.KV, "a")
    assert extent.size_bytes == 2 * unit
    assert pool.free_bytes == 2 * unit
    pool.give_back(extent)
    again = pool.acquire(2 * unit, Kind.RING, "b")
    assert again.handle == extent.handle
    pool.give_back(again)


def test_a_full_budget_says_the_numbers_and_who_holds(device, make_pool):
    unit = device.granularity_bytes
    pool = make_pool(4)
    held = [pool.acquire(unit, Kind.KV, "s7"), pool.acquire(2 * unit, Kind.RING, "weights")]
    with pytest.raises(OutOfDeviceMemory, match=r"weight ring of weights .* KV cache of s7") as refused:
        pool.acquire(2 * unit, Kind.KV, "s8")
    assert (refused.value.needed_bytes, refused.value.free_bytes) == (2 * unit, unit)
    assert pool.held_bytes == 3 * unit
    for extent in held:
        pool.give_back(extent)


def test_pooled_extents_of_other_sizes_make_room(device, make_pool):
    unit = device.granularity_bytes
    pool = make_pool(4, reserve_bytes=4 * unit)
    small = [pool.acquire(unit, Kind.KV, "a") for _ in range(4)]
    for extent in small:
        pool.give_back(extent)
    big = pool.acquire(4 * unit, Kind.KV, "b")
    assert pool.pooled_bytes == 0
    pool.give_back(big)


def test_the_device_sees_given_back_memory_go_down_to_the_reserve(device, make_pool):
    unit = device.granularity_bytes
    before = device.used_bytes()
    pool = make_pool(8, reserve_bytes=2 * unit)
    extents = [pool.acquire(unit, Kind.KV, "a") for _ in range(8)]
    for extent in extents:
        pool.give_back(extent)
    wait_for(lambda: pool.pooled_bytes == 2 * unit)
    wait_for(lambda: device.used_bytes() - before == 2 * unit)
    assert pool.trim() == 2 * unit


def test_giving_back_twice_and_closing_while_held_are_refused(device, make_pool):
    pool = make_pool(2)
    extent = pool.acquire(1, Kind.STAGING, "boundary")
    with pytest.raises(UsageError, match="staging of boundary"):
        pool.close()
    pool.give_back(extent)
    with pytest.raises(UsageError, match="before"):
        pool.give_back(extent)


def test_a_device_that_is_full_gives_up_the_pool_first(cpu_device):
    pool = ExtentPool(cpu_device, 2 * cpu_device.capacity_bytes, reserve_bytes=cpu_device.capacity_bytes)
    pool.give_back(pool.acquire(cpu_device.capacity_bytes, Kind.KV, "a"))
    extent = pool.acquire(UNIT, Kind.KV, "b")
    with pytest.raises(OutOfDeviceMemory, match="others use it"):
        pool.acquire(cpu_device.capacity_bytes, Kind.KV, "c")
    assert pool.held_bytes == UNIT
    pool.give_back(extent)
    pool.close()


def test_a_failed_create_changes_nothing(cpu_device):
    pool = ExtentPool(cpu_device, 4 * UNIT)
    cpu_device.faults = FaultPlan().fail("create")
    with pytest.raises(OutOfDeviceMemory):
        pool.acquire(UNIT, Kind.KV, "a")
    assert (pool.held_bytes, pool.pooled_bytes, pool.usage().held) == (0, 0, {})
    pool.give_back(pool.acquire(4 * UNIT, Kind.KV, "a"))
    pool.close()


def test_threads_never_pass_the_budget(cpu_device):
    pool = ExtentPool(cpu_device, 16 * UNIT)
    errors, most = [], [0]

    def work(seed):
        for step in range(150):
            try:
                extent = pool.acquire((1 + (step * 7 + seed) % 3) * UNIT, Kind.KV, f"s{seed}")
            except OutOfDeviceMemory:
                continue
            most[0] = max(most[0], cpu_device.used_bytes())
            pool.give_back(extent)

    def guarded(seed):
        try:
            work(seed)
        except (UsageError, ValueError, RuntimeError, KeyError) as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert 0 < most[0] <= 16 * UNIT
    assert pool.held_bytes == 0
    pool.close()
    assert cpu_device.used_bytes() == 0


def promised(pool, size_bytes, owner="a"):
    (extent,) = pool.acquire_all([size_bytes], Kind.KV, owner, promise=True)
    return extent


def test_what_is_promised_is_held_and_created_when_it_is_asked_for(device, make_pool):
    unit = device.granularity_bytes
    pool = make_pool(4, reserve_bytes=2 * unit)
    before = device.used_bytes()
    extents = pool.acquire_all([2 * unit, 2 * unit - 1], Kind.KV, "a", promise=True)
    assert (pool.held_bytes, device.used_bytes() - before) == (4 * unit, 0)
    with pytest.raises(OutOfDeviceMemory, match="budget"):
        promised(pool, unit, "b")
    for _ in range(2):
        pool.back(extents[0])
    if not device.is_gpu:
        assert device.used_bytes() - before == 2 * unit
    for extent in extents:
        pool.give_back(extent)
    assert (pool.held_bytes, pool.free_bytes) == (0, 4 * unit)
    assert pool.pooled_bytes == 2 * unit  # of the one that had been created
    with pytest.raises(UsageError, match="given back before"):
        pool.give_back(extents[1])


def test_a_pooled_extent_is_taken_when_it_is_promised_and_when_it_is_asked_for(cpu_device):
    pool = ExtentPool(cpu_device, 4 * UNIT, reserve_bytes=4 * UNIT)
    first, second = pool.acquire(UNIT, Kind.KV, "a"), promised(pool, UNIT)
    handle = first.handle
    pool.give_back(first)
    third = promised(pool, UNIT)
    assert (second.handle, third.handle) == (None, handle)
    pool.give_back(third)
    pool.back(second)
    assert (second.handle, pool.pooled_bytes) == (handle, 0)
    pool.give_back(second)
    pool.close()


def test_the_device_is_not_asked_for_what_is_pooled(cpu_device, monkeypatch):
    pool = ExtentPool(cpu_device, 4 * UNIT, reserve_bytes=4 * UNIT)
    for extent in [pool.acquire(UNIT, Kind.KV, "a") for _ in range(2)]:
        pool.give_back(extent)
    asked, used_bytes = [], cpu_device.used_bytes
    monkeypatch.setattr(cpu_device, "used_bytes", lambda: asked.append(True) or used_bytes())
    extents = pool.acquire_all([UNIT] * 2, Kind.KV, "a", promise=True)
    assert not asked and all(extent.handle is not None for extent in extents)
    extents += pool.acquire_all([UNIT] * 2, Kind.KV, "a", promise=True)
    assert len(asked) == 1, "once for all that are not"
    assert all(extent.handle is None for extent in extents[2:])
    for extent in extents:
        pool.give_back(extent)
    pool.close()


def test_a_promise_needs_room_for_what_is_not_pooled_only():
    device = open_device("cpu", capacity_bytes=3 * UNIT)
    pool = ExtentPool(device, 3 * UNIT, reserve_bytes=3 * UNIT)
    for extent in [pool.acquire(UNIT, Kind.KV, "a") for _ in range(2)]:
        pool.give_back(extent)
    extents = pool.acquire_all([UNIT] * 3, Kind.KV, "a", promise=True)
    assert [extent.handle is None for extent in extents] == [False, False, True]
    for extent in extents:
        pool.give_back(extent)
    pool.close()
    device.close()


def test_no_more_is_promised_than_the_device_has_room_for():
    """What others hold counts, and so do promises that are still to be kept; the rest is created at once."""
    device = open_device("cpu", capacity_bytes=8 * UNIT)
    pool = ExtentPool(device, 8 * UNIT)
    others = device.create(4 * UNIT)
    first, second = promised(pool, 2 * UNIT), promised(pool, UNIT)
    third, fourth = pool.acquire_all([UNIT, UNIT // 2], Kind.KV, "b", promise=True)
    assert [extent.handle is None for extent in (first, second, third, fourth)] == [True, True, False, False]
    with pytest.raises(OutOfDeviceMemory, match="others use it"):
        pool.acquire_all([UNIT, 2 * UNIT], Kind.KV, "c", promise=True)
    assert pool.held_bytes == 5 * UNIT, "none of both is held"
    device.destroy(others)
    for extent in (first, second, third, fourth):
        pool.back(extent)
        pool.give_back(extent)
    pool.close()
    device.close()


def test_a_promise_that_others_make_impossible_is_an_error_and_stays_a_promise():
    device = open_device("cpu", capacity_bytes=4 * UNIT)
    pool = ExtentPool(device, 4 * UNIT)
    extent = promised(pool, 2 * UNIT)
    others = device.create(3 * UNIT)
    with pytest.raises(OutOfDeviceMemory, match="others use it"):
        pool.back(extent)
    assert (extent.handle, extent.held, pool.held_bytes) == (None, True, 2 * UNIT)
    device.destroy(others)
    pool.back(extent)
    assert device.used_bytes() == 2 * UNIT
    pool.give_back(extent)
    pool.close()
    device.close()


class PoolMachine(RuleBasedStateMachine):
    """Random acquires, returns and trims against a model of who holds what."""

    extents = Bundle("extents")

    def __init__(self):
        super().__init__()
        self.device = open_device("cpu", capacity_bytes=32 * UNIT)
        self.pool = ExtentPool(self.device, 24 * UNIT, reserve_bytes=6 * UNIT)
        self.held = {}

    @rule(
        target=extents,
        granules=st.integers(1, 6),
        kind=st.sampled_from(Kind),
        owner=st.sampled_from("abc"),
        promise=st.booleans(),
    )
    @precondition(lambda self: sum(self.held.values()) <= 18 * UNIT)
    def acquire(self, granules, kind, owner, promise):
        (extent,) = self.pool.acquire_all([granules * UNIT - 5], kind, owner, promise=promise)
        assert promise or extent.handle is not None
        self.held[extent] = granules * UNIT
        return extent

    @rule(extent=extents)
    def back(self, extent):
        if extent in self.held:
            self.pool.back(extent)
            assert extent.handle is not None

    @rule()
    def acquire_too_much(self):
        free = self.pool.free_bytes
        with pytest.raises(OutOfDeviceMemory) as refused:
            self.pool.acquire(free + 1, Kind.KV, "z")
        assert refused.value.free_bytes == free

    @rule(extent=consumes(extents))
    def give_back(self, extent):
        self.pool.give_back(extent)
        del self.held[extent]

    @rule(keep=st.integers(0, 4))
    def trim(self, keep):
        self.pool.trim(keep * UNIT)
        assert self.pool.pooled_bytes <= keep * UNIT

    @invariant()
    def accounts_agree(self):
        assert self.pool.held_bytes == sum(self.held.values())
        handles = [extent.handle for extent in self.held if extent.handle is not None]
        assert len(set(handles)) == len(handles)
        backed = sum(size for extent, size in self.held.items() if extent.handle is not None)
        promised = self.pool.held_bytes - backed
        assert backed <= self.device.used_bytes() <= self.pool.budget_bytes - promised
        memory = Ledger(self.pool, context_bytes=7, activation_bytes=3).snapshot()
        total = memory.resident_weights_bytes + memory.ring_bytes + memory.staging_bytes + memory.kv_bytes
        assert total == self.pool.held_bytes
        assert memory.kv_bytes == sum(memory.kv_by_session.values())
        assert total + memory.free_bytes + 10 == memory.budget_bytes

    def teardown(self):
        for extent in self.held:
            self.pool.give_back(extent)
        self.pool.close()
        assert self.device.used_bytes() == 0
        self.device.close()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
