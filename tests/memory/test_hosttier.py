"""The host tier: exact blocks, slabs, pinning and what happens when it is refused."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from djinn_core.device import Direction, open_device
from djinn_core.device.faults import FaultPlan
from djinn_core.errors import OutOfHostMemory, PinningRefused, UsageError
from djinn_core.memory import HostTier
from djinn_core.memory.hostmapping import cut_pieces

MIB = 1 << 20
UNIT = 64 << 10


@pytest.fixture
def make_tier(device):
    tiers = []

    def make(budget_bytes=32 * MIB, **options):
        tiers.append(HostTier(device, budget_bytes, **options))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.close()


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("exact", [True, False])
def test_blocks_are_of_the_asked_size_and_copies_take_them(device, make_tier, exact):
    tier = make_tier()
    block = (tier.allocate_exact if exact else tier.allocate)(100_001, "a")
    other = (tier.allocate_exact if exact else tier.allocate)(100_001, "b")
    assert block.tensor.shape == (100_001,)
    assert block.tensor.dtype is torch.uint8
    assert block.pinned
    block.tensor.copy_(torch.arange(100_001) % 251)
    stream = device.stream()
    device.copy(other.tensor, block.tensor, stream, Direction.D2D)
    stream.synchronize()
    assert torch.equal(other.tensor, block.tensor)
    block.free()
    other.free()
    assert tier.held_bytes == 0


def test_exact_blocks_go_back_to_the_operating_system(make_tier):
    tier = make_tier(64 * MIB)
    block = tier.allocate_exact(48 * MIB + 1, "weights")
    assert tier.pinned_bytes == tier.held_bytes == 48 * MIB + 4096
    block.free()
    assert (tier.pinned_bytes, tier.held_bytes, tier.free_bytes) == (0, 0, 64 * MIB)
    assert block.tensor.numel() == 0
    with pytest.raises(UsageError, match="before"):
        block.free()


def test_a_full_budget_is_refused_with_the_numbers(make_tier):
    tier = make_tier(8 * MIB)
    block = tier.allocate_exact(6 * MIB, "weights")
    for allocate in (tier.allocate, tier.allocate_exact):
        with pytest.raises(OutOfHostMemory, match="'kv'") as refused:
            allocate(4 * MIB, "kv")
        assert (refused.value.needed_bytes, refused.value.free_bytes) == (4 * MIB, 2 * MIB)
    tier.allocate(2 * MIB, "kv").free()
    block.free()
    tier.allocate_exact(8 * MIB, "weights").free()  # the empty slab made room


def test_slabs_are_reused(device, make_tier):
    tier = make_tier()
    first = tier.allocate(MIB, "a")
    pinned, address = tier.pinned_bytes, first.address
    first.free()
    second = tier.allocate(MIB, "b")
    assert second.address == address
    assert tier.pinned_bytes == pinned
    assert second.address % device.granularity_bytes == 0
    second.free()


def test_prepare_pins_now_and_ahead_pins_in_the_background(make_tier):
    tier = make_tier()
    tier.prepare(5 * MIB)
    ready = tier.pinned_bytes
    assert ready >= 5 * MIB
    tier.allocate(2 * MIB, "a").free()
    ahead = make_tier(ahead_bytes=6 * MIB)
    wait_for(lambda: ahead.pinned_bytes >= 6 * MIB)
    block = ahead.allocate(4 * MIB, "a")
    wait_for(lambda: ahead.pinned_bytes - ahead.held_bytes >= 6 * MIB)
    block.free()


def test_refused_pinning_raises_and_changes_nothing(cpu_device):
    tier = HostTier(cpu_device, 8 * MIB)
    for allocate in (tier.allocate, tier.allocate_exact):
        before = tier.pinned_bytes
        cpu_device.faults = FaultPlan().fail("pin")
        with pytest.raises(PinningRefused) as refused:
            allocate(MIB, "a")
        assert any("ulimit -l" in note for note in refused.value.__notes__)
        assert (tier.held_bytes, tier.pinned_bytes) == (0, before)
        allocate(MIB, "a").free()
    tier.close()


def test_optional_pinning_goes_on_with_pageable_memory_and_says_so(cpu_device):
    tier = HostTier(cpu_device, 8 * MIB, pinning="optional")
    cpu_device.faults = FaultPlan().fail("pin")
    block = tier.allocate_exact(MIB, "a")
    assert not block.pinned
    assert not tier.pinned
    assert tier.pinned_bytes == 0
    pinned = tier.allocate_exact(MIB, "b")
    assert pinned.pinned
    block.tensor.fill_(4)
    stream = cpu_device.stream()
    cpu_device.copy(pinned.tensor, block.tensor, stream, Direction.D2D)
    assert (pinned.tensor == 4).all()  # pageable copies block
    block.free()
    pinned.free()
    assert tier.pinned
    tier.close()


def test_close_is_refused_while_held(make_tier):
    tier = make_tier()
    block = tier.allocate(1, "a")
    with pytest.raises(UsageError, match="still held"):
        tier.close()
    block.free()


def test_pieces_end_at_cuts():
    page = 4096
    assert cut_pieces(10 * page, (), 10 * page) == [(0, 10 * page)]
    cuts = [2 * page, 3 * page, 7 * page]
    assert cut_pieces(10 * page, cuts, 5 * page) == [(0, 3 * page), (3 * page, 4 * page), (7 * page, 3 * page)]
    for bad in ((), (page + 1, 6 * page), (3 * page,)):
        with pytest.raises(ValueError, match="need a cut"):
            cut_pieces(10 * page, bad, 5 * page)


def test_exact_blocks_are_registered_in_pieces(cpu_device, monkeypatch):
    monkeypatch.setattr("djinn_core.memory.hostmapping.PIECE_BYTES", MIB)
    plan = cpu_device.faults = FaultPlan()
    tier = HostTier(cpu_device, 8 * MIB)
    block = tier.allocate_exact(2 * MIB, "w", cuts=[MIB // 2, MIB])
    assert plan.counts["pin"] == 2
    block.free()
    plan.fail("pin", 2)
    with pytest.raises(PinningRefused):
        tier.allocate_exact(2 * MIB, "w", cuts=[MIB])
    assert len(cpu_device._pinned) == 0
    tier.close()


def test_threads_share_the_tier(cpu_device):
    tier = HostTier(cpu_device, 8 * MIB, ahead_bytes=MIB)
    errors = []

    def work(seed):
        try:
            for step in range(60):
                block = tier.allocate((1 + (seed + step) % 5) * UNIT, f"s{seed}")
                block.tensor.fill_(seed)
                assert (block.tensor == seed).all()
                block.free()
        except (AssertionError, UsageError, OutOfHostMemory, ValueError, RuntimeError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert tier.held_bytes == 0
    assert tier.pinned_bytes <= tier.budget_bytes
    tier.close()


class TierMachine(RuleBasedStateMachine):
    """Random allocations and frees: no block overlaps another, none loses its bytes, the budget holds."""

    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.device = open_device("cpu", capacity_bytes=MIB)
        self.tier = HostTier(self.device, 4 * MIB)
        self.held = {}
        self.next_mark = 0

    @rule(target=blocks, units=st.integers(1, 12), exact=st.booleans())
    def allocate(self, units, exact):
        allocate = self.tier.allocate_exact if exact else self.tier.allocate
        try:
            block = allocate(units * UNIT, "owner")
        except OutOfHostMemory as error:
            assert error.needed_bytes > error.free_bytes
            return None
        self.next_mark = self.next_mark % 255 + 1
        block.tensor.fill_(self.next_mark)
        self.held[block] = self.next_mark
        return block

    @rule(block=consumes(blocks))
    def free(self, block):
        if block is not None:
            assert (block.tensor == self.held.pop(block)).all()
            block.free()

    @invariant()
    def budget_holds(self):
        assert self.tier.held_bytes == sum(block.size_bytes for block in self.held)
        assert self.tier.held_bytes <= self.tier.pinned_bytes <= self.tier.budget_bytes

    def teardown(self):
        for block, mark in self.held.items():
            assert (block.tensor == mark).all()
            block.free()
        self.tier.close()
        assert len(self.device._pinned) == 0
        self.device.close()


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def test_preparing_more_than_the_budget_ends_with_the_numbers(cpu_device):
    unit = cpu_device.granularity_bytes
    tier = HostTier(cpu_device, 16 * unit + 4096, threads=1)
    with pytest.raises(OutOfHostMemory) as refused:
        tier.prepare(tier.budget_bytes)
    assert refused.value.needed_bytes == 4096
    assert tier.pinned_bytes == 16 * unit
    tier.close()


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that `address` lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(word, 16) for word in head.split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_a_child_process_does_not_copy_it(make_tier):
    """A fork copies pages that are locked for a device, all of them, so these are left out of it ("dc")."""
    tier = make_tier()
    exact, slab = tier.allocate_exact(2 * MIB, "weights"), tier.allocate(UNIT, "session")
    assert "dc" in flags_of(exact.address) and "dc" in flags_of(slab.address)
    plain = torch.ones(2 * MIB, dtype=torch.uint8)
    assert "dc" not in flags_of(plain.data_ptr())
    exact.free()
    slab.free()
