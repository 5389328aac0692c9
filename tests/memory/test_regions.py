"""Regions: all or nothing, coalesced grants, addresses that hold."""

import pytest
import torch

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError, UsageError
from djinn_core.memory import ExtentPool, Kind, Region


@pytest.fixture
def pool(device):
    pool = ExtentPool(device, 16 * device.granularity_bytes)
    yield pool
    pool.close()


@pytest.fixture
def region(device):
    region = Region(device, 8 * device.granularity_bytes - 3)
    yield region
    region.close()


def take(pool, device, *granules):
    return [pool.acquire(n * device.granularity_bytes, Kind.KV, "s") for n in granules]


def clear(pool, region):
    for extent in region.unmap(list(region.mapped())):
        pool.give_back(extent)


def test_views_keep_their_address_and_bytes_across_a_swap(device, pool, region):
    unit = device.granularity_bytes
    assert region.size_bytes == 8 * unit
    (extent,) = take(pool, device, 2)
    view = region.view(unit, (4, 8), torch.float32)
    region.map([(unit, extent)])
    view.copy_(torch.arange(32.0).view(4, 8))
    device.synchronize()
    assert region.unmap([unit]) == [extent]
    assert region.mapped() == {}
    region.map([(unit, extent)])
    assert torch.equal(view.cpu(), torch.arange(32.0).view(4, 8))
    assert view.data_ptr() == region.address + unit
    device.synchronize()
    clear(pool, region)


def test_extents_move_between_places_and_take_their_bytes_along(device, pool, region):
    unit = device.granularity_bytes
    a, b = take(pool, device, 1, 1)
    region.map([(0, a), (3 * unit, b)])
    region.tensor[:unit].fill_(1)
    region.tensor[3 * unit : 4 * unit].fill_(2)
    device.synchronize()
    region.unmap([0, 3 * unit])
    region.map([(0, b), (3 * unit, a)])
    assert (region.tensor[:unit] == 2).all()
    assert (region.tensor[3 * unit : 4 * unit] == 1).all()
    clear(pool, region)


@pytest.mark.parametrize("offset", [-1, 1, 8, 7])
def test_places_outside_are_refused_and_nothing_is_mapped(device, pool, region, offset):
    unit = device.granularity_bytes
    good, bad = take(pool, device, 1, 2)
    place = offset if offset in (-1, 1) else offset * unit
    with pytest.raises(UsageError, match="not a place"):
        region.map([(0, good), (place, bad)])
    assert region.mapped() == {}
    pool.give_back(good)
    pool.give_back(bad)


def test_overlap_is_refused(device, pool, region):
    unit = device.granularity_bytes
    a, b, c = take(pool, device, 2, 2, 1)
    region.map([(2 * unit, a)])
    for offset, extent in ((unit, b), (3 * unit, b), (3 * unit, c), (2 * unit, c)):
        with pytest.raises(UsageError, match="already"):
            region.map([(offset, extent)])
    assert list(region.mapped()) == [2 * unit]
    with pytest.raises(UsageError, match="still mapped"):
        region.close()
    with pytest.raises(UsageError, match="nothing is mapped"):
        region.unmap([0])
    clear(pool, region)
    pool.give_back(b)
    pool.give_back(c)


def test_a_view_must_fit(region):
    for offset, shape in ((2, (1,)), (region.size_bytes, (1,)), (0, (region.size_bytes,)), (-4, (1,))):
        with pytest.raises(UsageError, match="does not fit"):
            region.view(offset, shape, torch.float32)


def test_one_grant_for_each_contiguous_span(cpu_device):
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    plan = cpu_device.faults = FaultPlan()
    pieces = zip((5, 0, 2, 6, 1), take(pool, cpu_device, 1, 1, 1, 1, 1), strict=True)
    region.map([(at * unit, extent) for at, extent in pieces])
    assert (plan.counts["map"], plan.counts["grant"]) == (5, 2)
    region.tensor[: 3 * unit].fill_(1)
    clear(pool, region)
    region.close()
    pool.close()


@pytest.mark.parametrize(("call", "nth"), [("map", 1), ("map", 2), ("map", 3), ("grant", 1), ("grant", 2)])
def test_a_failed_map_leaves_nothing_mapped_and_can_be_retried(cpu_device, call, nth):
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    pieces = [(at * unit, extent) for at, extent in zip((0, 1, 4), take(pool, cpu_device, 1, 1, 2), strict=True)]
    cpu_device.faults = FaultPlan().fail(call, nth)
    with pytest.raises(DeviceError, match="planned"):
        region.map(pieces)
    assert region.mapped() == {}
    region.map(pieces)
    region.tensor[4 * unit : 6 * unit].fill_(1)
    assert list(region.mapped()) == [0, unit, 4 * unit]
    clear(pool, region)
    region.close()
    pool.close()


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupt_in_the_call_leaves_nothing_mapped(cpu_device, monkeypatch, done):
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    extents = take(pool, cpu_device, 1, 1)
    calls, plain = [], cpu_device.map

    def interrupted(*args):
        calls.append(args)
        if done or len(calls) < 2:
            plain(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cpu_device, "map", interrupted)
        region.map([(0, extents[0]), (unit, extents[1])])
    assert region.mapped() == {}
    region.map([(0, extents[1]), (unit, extents[0])])
    clear(pool, region)
    region.close()
    pool.close()


def test_neighbours_are_unmapped_in_one_call(cpu_device):
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    offsets = [0, unit, 3 * unit, 5 * unit]
    extents = take(pool, cpu_device, 1, 2, 1, 2)
    region.map(list(zip(offsets, extents, strict=True)))
    region.tensor[unit : 3 * unit].fill_(7)
    cpu_device.faults = plan = FaultPlan()
    some = [5 * unit, 0, unit]
    assert region.unmap(some) == [extents[3], extents[0], extents[1]]
    assert plan.counts["unmap"] == 2
    assert region.mapped() == {3 * unit: extents[2]}
    region.map([(6 * unit, extents[1])])
    assert bool((region.tensor[6 * unit : 8 * unit] == 7).all())
    region.unmap([3 * unit, 6 * unit])
    for extent in extents:
        pool.give_back(extent)
    region.close()
    pool.close()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_unmap_keeps_everything_mapped_with_its_bytes(cpu_device, nth):
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    offsets = [0, unit, 4 * unit]
    region.map(list(zip(offsets, take(pool, cpu_device, 1, 1, 2), strict=True)))
    for value, offset in enumerate(offsets):
        region.tensor[offset : offset + unit].fill_(value + 1)
    cpu_device.faults = FaultPlan().fail("unmap", nth)
    with pytest.raises(DeviceError, match="planned"):
        region.unmap(offsets)
    assert list(region.mapped()) == offsets
    for value, offset in enumerate(offsets):
        assert (region.tensor[offset : offset + unit] == value + 1).all()
    clear(pool, region)
    region.close()
    pool.close()


def test_an_unmap_that_cannot_be_undone_says_what_is_mapped(cpu_device):
    """Two spans: the first is unmapped, the second refused, and so is the map that would undo the first."""
    unit = cpu_device.granularity_bytes
    pool, region = ExtentPool(cpu_device, 16 * unit), Region(cpu_device, 8 * unit)
    first, second = take(pool, cpu_device, 1, 1)
    region.map([(0, first), (4 * unit, second)])
    cpu_device.faults = FaultPlan().fail("unmap", 2).fail("map")
    with pytest.raises(DeviceError, match="unmap number 2"):
        region.unmap([0, 4 * unit])
    assert region.at(0) is None and region.at(4 * unit) is second
    region.map([(0, first)])
    clear(pool, region)
    region.close()
    pool.close()
