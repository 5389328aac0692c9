"""The device contract, on every device of this machine."""

from types import SimpleNamespace

import pytest
import torch

from djinn_core.device import CopyCounts, Direction, open_device
from djinn_core.errors import ConfigError, DeviceError, OutOfDeviceMemory
from djinn_core.memory import HostTier


@pytest.fixture
def host(device):
    tier = HostTier(device, 64 << 20)
    blocks = []

    def make(size_bytes):
        blocks.append(tier.allocate(size_bytes, "test"))
        return blocks[-1].tensor

    yield make
    device.synchronize()
    for block in blocks:
        block.free()
    tier.close()


@pytest.fixture
def place(device):
    """Four granules of reserved addresses: (address, granule, tensor)."""
    unit = device.granularity_bytes
    address = device.reserve(4 * unit)
    yield address, unit, device.tensor(address, 4 * unit)
    device.release(address, 4 * unit)


def put(device, address, handle, size_bytes):
    device.map(address, handle, size_bytes)
    device.grant(address, size_bytes)


def test_bytes_and_address_hold_across_unmap_and_map(device, place):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    tensor[:unit].copy_(torch.arange(unit) % 251)
    pointer = tensor.data_ptr()
    device.synchronize()
    device.unmap(address, unit)
    put(device, address, handle, unit)
    assert torch.equal(tensor[:unit].cpu(), (torch.arange(unit) % 251).to(torch.uint8))
    assert tensor.data_ptr() == pointer == address
    device.unmap(address, unit)
    device.destroy(handle)


def test_a_handle_mapped_twice_shows_the_same_bytes(device, place):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    put(device, address + 2 * unit, handle, unit)
    tensor[:unit].fill_(3)
    device.synchronize()
    assert (tensor[2 * unit : 3 * unit] == 3).all()
    device.unmap(address, unit)
    device.unmap(address + 2 * unit, unit)
    device.destroy(handle)


def test_one_grant_covers_neighbouring_maps(device, place):
    address, unit, tensor = place
    handles = [device.create(unit) for _ in range(4)]
    for i, handle in enumerate(handles):
        device.map(address + i * unit, handle, unit)
    device.grant(address, 4 * unit)
    tensor.fill_(9)
    device.synchronize()
    assert int(tensor.sum(dtype=torch.int64)) == 9 * 4 * unit
    for i, handle in enumerate(handles):
        device.unmap(address + i * unit, unit)
        device.destroy(handle)


def test_a_thousand_cycles_do_not_drift(device, place):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    tensor[:unit].fill_(7)
    device.synchronize()
    used = device.used_bytes()
    for _ in range(1000):
        device.unmap(address, unit)
        put(device, address, handle, unit)
    assert abs(device.used_bytes() - used) < unit
    assert (tensor[:unit] == 7).all()
    device.unmap(address, unit)
    device.destroy(handle)


def test_used_bytes_follow_create_and_destroy(device):
    size_bytes = 8 * device.granularity_bytes
    before = device.used_bytes()
    handle = device.create(size_bytes)
    assert device.used_bytes() - before >= size_bytes
    device.destroy(handle)
    assert device.used_bytes() - before < size_bytes


def test_create_beyond_capacity_says_what_is_needed_and_free(device):
    size_bytes = (device.capacity_bytes // device.granularity_bytes + 1) * device.granularity_bytes
    with pytest.raises(OutOfDeviceMemory) as refused:
        device.create(size_bytes)
    assert refused.value.needed_bytes == size_bytes
    assert 0 < refused.value.free_bytes <= device.capacity_bytes


def test_a_second_map_at_one_address_is_refused(device, place):
    address, unit, _ = place
    handle = device.create(unit)
    device.map(address, handle, unit)
    with pytest.raises(DeviceError):
        device.map(address, handle, unit)
    device.unmap(address, unit)
    with pytest.raises(DeviceError):
        device.unmap(address, unit)
    device.destroy(handle)


def test_copies_arrive_and_are_counted(device, place, host):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    there, back = host(1000), host(1000)
    there.copy_(torch.arange(1000) % 256)
    stream, event, start = device.stream(), device.event(timing=True), device.event(timing=True)
    start.record(stream)
    device.copy(tensor[24:1024], there, stream, Direction.H2D)
    device.copy(back, tensor[24:1024], stream, Direction.D2H)
    event.record(stream)
    event.synchronize()
    assert event.query()
    assert start.elapsed_time(event) >= 0
    assert torch.equal(back, there)
    assert (device.copied.h2d_bytes, device.copied.d2h_bytes, device.copied.d2d_bytes) == (1000, 1000, 0)
    device.synchronize()
    device.unmap(address, unit)
    device.destroy(handle)


def test_maps_side_by_side_are_unmapped_in_one_call_and_whole(device, place):
    address, unit, tensor = place
    handles = [device.create(unit), device.create(2 * unit), device.create(unit)]
    sizes = (unit, 2 * unit, unit)

    def put_all():
        at = address
        for handle, size_bytes in zip(handles, sizes, strict=True):
            device.map(at, handle, size_bytes)
            at += size_bytes
        device.grant(address, 4 * unit)

    put_all()
    tensor[unit : 3 * unit] = 5
    tensor[3 * unit :] = 6
    device.synchronize()
    with pytest.raises(DeviceError, match="cannot be unmapped: a map of"):
        device.unmap(address, 2 * unit)  # it ends inside the second
    with pytest.raises(DeviceError, match="cannot be unmapped: nothing is mapped"):
        device.unmap(address + 2 * unit, 2 * unit)  # it begins inside it
    device.unmap(address, 3 * unit)
    assert int(tensor[-1]) == 6
    device.unmap(address + 3 * unit, unit)
    with pytest.raises(DeviceError, match="nothing is mapped"):
        device.unmap(address, unit)
    put_all()
    assert (int(tensor[unit]), int(tensor[-1])) == (5, 6)
    device.unmap(address, 4 * unit)
    for handle in handles:
        device.destroy(handle)


def test_copies_in_one_call_arrive_and_are_counted(device, place, host):
    """Pieces of any size and order, an empty one among them; one of the wrong length refuses all."""
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    there, back, stream = host(unit), host(unit), device.stream()
    there.copy_(torch.arange(unit) * 7 % 251)
    spans = [(4096, unit), (0, 24), (24, 24), (24, 4096)]
    before = device.copied
    device.copy_all([(tensor[a:b], there[a:b]) for a, b in spans], stream, Direction.H2D)
    device.copy_all([(back[a:b], tensor[a:b]) for a, b in spans], stream, Direction.D2H, gives_way=True)
    stream.synchronize()
    assert torch.equal(back, there)
    counted = device.copied - before
    assert (counted.h2d_bytes, counted.d2h_bytes) == (unit, unit)
    with pytest.raises(ValueError, match="copy of 8 bytes into 9"):
        device.copy_all([(tensor[:4], there[:4]), (tensor[:9], there[:8])], stream, Direction.H2D)
    device.copy_all([], stream, Direction.H2D)
    assert (device.copied - before).h2d_bytes == unit
    there.copy_(torch.arange(unit) * 5 % 251)
    halves = [(0, unit // 2), (unit // 2, unit)]
    device.copy_all([(tensor[a:b], there[a:b]) for a, b in halves], stream, Direction.H2D, piece_bytes=1000)
    device.copy_all([(back, tensor[:unit])], stream, Direction.D2H, piece_bytes=unit - 1)
    stream.synchronize()
    assert torch.equal(back, there)
    counted = device.copied - before
    assert (counted.h2d_bytes, counted.d2h_bytes) == (2 * unit, 2 * unit)
    device.synchronize()
    device.unmap(address, unit)
    device.destroy(handle)


def test_a_stream_waits_for_another_ones_event(device, place, host):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    there, back = host(unit // 2), host(unit // 2)
    first, second = device.stream(), device.stream(priority=-1)
    for value in range(1, 20):
        there.fill_(value)
        device.copy(tensor[: unit // 2], there, first, Direction.H2D)
        device.launch(first, lambda: tensor[: unit // 2].add_(1))
        event = device.event()
        event.record(first)
        second.wait_event(event)
        device.copy(back, tensor[: unit // 2], second, Direction.D2H)
        second.synchronize()
        assert (back == value + 1).all()
    device.synchronize()
    device.unmap(address, unit)
    device.destroy(handle)


def test_the_callers_stream_is_gated_by_an_event(device, place, host):
    address, unit, tensor = place
    handle = device.create(unit)
    put(device, address, handle, unit)
    source, stream, event = host(unit // 2), device.stream(), device.event()
    for value in range(20):
        source.fill_(value)
        device.copy(tensor[: unit // 2], source, stream, Direction.H2D)
        event.record(stream)
        device.current_stream().wait_event(event)
        assert (tensor[: unit // 2] == value).all()
    device.synchronize()
    device.unmap(address, unit)
    device.destroy(handle)


def test_a_prepared_copy_is_counted_and_stays_within_its_target(device, place):
    address, unit, tensor = place
    handle, tier = device.create(unit), HostTier(device, 64 << 20)
    put(device, address, handle, unit)
    stream, fits, larger = device.stream(), tier.allocate(unit // 2, "test"), tier.allocate(unit + 1, "test")
    tensor[:unit].zero_()
    device.synchronize()
    fill, before = device.copier(tensor[:unit], stream, Direction.H2D), device.copied
    fits.tensor.fill_(7)
    fill(fits)
    with pytest.raises(ValueError, match=f"copy of {unit + 1} bytes into {unit}"):
        fill(larger)
    stream.synchronize()
    assert (tensor[: unit // 2] == 7).all() and (tensor[unit // 2 : unit] == 0).all()
    assert device.copied - before == CopyCounts(h2d_bytes=unit // 2)
    for block in (fits, larger):
        block.free()
    tier.close()
    device.unmap(address, unit)
    device.destroy(handle)


@torch.no_grad()
def test_a_graph_does_what_was_recorded_on_the_same_addresses(device):
    source = torch.ones(4, device=device.torch_device)
    graphs = device.graphs()
    first, second = graphs.new(), graphs.new()
    first.begin()
    doubled = (source * 2).view(2, 2)
    first.end()
    second.begin()
    out = doubled.t().reshape(-1) + 1
    second.end()
    for value, stream in ((3, device.current_stream()), (5, device.stream())):
        source.copy_(torch.arange(4) * value)
        device.synchronize()
        first.replay(stream)
        second.replay(stream)
        device.synchronize()
        assert out.tolist() == [1, 4 * value + 1, 2 * value + 1, 6 * value + 1]


@torch.no_grad()
def test_what_is_recorded_changes_nothing_until_it_is_replayed(device):
    """Neither what was there before."""
    source, graph = torch.ones(4, device=device.torch_device), device.graphs().new()
    factor = torch.full((1,), 2.0, device=device.torch_device).expand(4)  # it may be read, and not be written
    graph.begin()
    source.mul_(factor)
    out = source + 1
    graph.end()
    device.synchronize()
    assert source.tolist() == [1.0] * 4
    for value in (2.0, 4.0):
        graph.replay(device.current_stream())
        device.synchronize()
        assert source.tolist() == [value] * 4 and out.tolist() == [value + 1] * 4


@torch.no_grad()
def test_after_a_recording_that_was_abandoned_work_is_done_again(device):
    source = torch.ones(4, device=device.torch_device)
    make = device.graphs().new
    graph = make()
    graph.begin()
    source * 2
    graph.abandon()
    assert (source + 1).tolist() == [2.0] * 4
    again = make()
    again.begin()
    out = source * 3
    again.end()
    again.replay(device.current_stream())
    device.synchronize()
    assert out.tolist() == [3.0] * 4


@torch.no_grad()
def test_a_chain_does_its_rows_one_behind_the_other(device):
    """Each row adds its own number, then its part of what changes, and hands twice the sum to the next."""
    graphs, rows, made, out = device.graphs(), [], [], torch.ones(4, device=device.torch_device)
    first, kept = out, []  # graphs hold addresses only
    for number in range(3):
        own = torch.full((4,), float(number), device=device.torch_device)
        before, behind, into = graphs.new(), graphs.new(), torch.empty(4, device=device.torch_device)
        before.begin()
        read = out + own
        before.end()
        behind.begin()
        out = into * 2
        behind.end()
        rows.append(SimpleNamespace(before=before, behind=behind, reads=(read,), into=into))
        made.append(read)
        kept.append((own, out))
    chain = graphs.chain(rows)

    def run(changing, key, stream):
        def step(row):
            return made[row] + changing[row][key]

        kind = chain.record(key, step, changing[0])
        for part in (range(2), range(2, 3)):
            chain.replay(stream, key, step, changing[part.start : part.stop], part)
        return kind

    def expected(changing, key):
        value = 1.0
        for number, tensor in enumerate(changing):
            value = (value + number + float(tensor[key])) * 2
        return value

    kinds = set()
    for value, key, stream in ((1, 0, device.current_stream()), (7, 0, device.stream()), (3, 1, device.stream())):
        changing = [torch.tensor([value, value * 10.0], device=device.torch_device) * (row + 1) for row in range(3)]
        first.fill_(1)
        device.synchronize()
        kinds.add(run(changing, key, stream))
        device.synchronize()
        assert out.tolist() == [expected(changing, key)] * 4
    assert len(kinds) == 1


def test_an_unrecorded_event_is_complete(device):
    event = device.event()
    assert event.query()
    event.synchronize()
    device.current_stream().wait_event(event)


def test_close_is_refused_while_addresses_are_reserved(device):
    address = device.reserve(device.granularity_bytes)
    with pytest.raises(DeviceError, match="reservations"):
        device.close()
    device.release(address, device.granularity_bytes)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:0", "cuda:", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError):
        open_device(name, capacity_bytes=1 << 20)


def test_the_emulated_device_needs_a_size():
    with pytest.raises(ConfigError, match="capacity_bytes"):
        open_device("cpu")
