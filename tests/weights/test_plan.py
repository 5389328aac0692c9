"""The plan: within the budget, covering every layer once, spread evenly, and refused with numbers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn_core.errors import ConfigError, OutOfDeviceMemory
from djinn_core.weights.plan import make_plan, spread

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=24)


@given(
    sizes, st.integers(0, 3000), st.integers(0, 120_000), st.none() | st.integers(1, 6), st.sampled_from([1, 64, 512])
)
def test_a_plan_keeps_within_its_budget_and_covers_every_layer(layers, other, budget, slots, granularity):
    try:
        plan = make_plan(layers, other, budget, slots=slots, chunk_bytes=1, granularity_bytes=granularity)
    except OutOfDeviceMemory as error:
        assert error.needed_bytes > error.free_bytes == budget
        return
    assert plan.device_bytes <= budget
    assert sorted(plan.resident + plan.streamed) == list(range(len(layers)))
    assert plan.streamed_bytes_per_pass == sum(layers[layer] for layer in plan.streamed)
    assert (plan.slots == 0) == (not plan.streamed)
    assert all(plan.slot_bytes >= layers[layer] for layer in plan.streamed)
    assert slots is None or plan.slots == min(slots, len(plan.streamed))


@given(sizes, st.integers(1, 600))
def test_chunks_cover_each_block_exactly_and_in_order(layers, chunk):
    plan = make_plan(layers, 0, 10**9, resident_layers="none", chunk_bytes=min(chunk, max(layers)))
    for layer, size in enumerate(layers):
        chunks = plan.chunks(layer)
        assert all(0 < n <= plan.chunk_bytes for _, n in chunks)
        assert [at for at, _ in chunks] == [sum(n for _, n in chunks[:i]) for i in range(len(chunks))]
        assert sum(n for _, n in chunks) == size


@given(st.integers(1, 24), st.integers(0, 40_000))
def test_fill_leaves_no_room_for_one_more_layer(depth, budget):
    layers = [1000] * depth
    try:
        plan = make_plan(layers, 500, budget, slots=3)
    except OutOfDeviceMemory:
        assert 500 + 1000 * min(3, depth) > budget
        return
    if plan.streamed:
        more = 500 + 1000 * (len(plan.resident) + 1) + 1000 * min(3, len(plan.streamed) - 1)
        assert more > budget


@pytest.mark.parametrize(("count", "depth"), [(0, 7), (1, 7), (2, 8), (7, 7), (13, 40)])
def test_resident_layers_are_spread_evenly(count, depth):
    chosen = spread(count, depth)
    assert len(set(chosen)) == count and all(0 <= layer < depth for layer in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_default_slots_give_stable_addresses_where_they_can():
    for depth, slots in ((40, 4), (80, 4), (9, 3), (10, 5), (22, 2), (13, 4)):
        plan = make_plan([1000] * depth, 0, 10**6, resident_layers="none")
        assert (plan.slots, plan.stable_addresses) == (slots, depth % slots == 0)


def test_a_tight_budget_takes_fewer_slots():
    assert make_plan([1000] * 8, 100, 2100).slots == 2
    with pytest.raises(OutOfDeviceMemory, match="2 slots") as caught:
        make_plan([1000] * 8, 100, 2099)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (2100, 2099)


def test_all_and_numbers_say_what_stays():
    assert make_plan([10] * 4, 5, 45, resident_layers="all").device_bytes == 45
    with pytest.raises(OutOfDeviceMemory):
        make_plan([10] * 4, 5, 44, resident_layers="all")
    assert make_plan([10] * 4, 5, 100, resident_layers=2).resident == (1, 3)


def test_the_time_of_a_pass_is_bytes_over_the_rate():
    assert make_plan([10**9] * 4, 0, 10**10, resident_layers="none").pass_s(50) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk_bytes": 11}, "larger than a slot of 10"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": True}, "slots is True"),
        ({"resident_layers": "most"}, "'most'"),
        ({"resident_layers": 5}, "has 4 layers"),
        ({"resident_layers": -1}, "has 4 layers"),
        ({"resident_layers": 1.5}, "1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        make_plan([10] * 4, 5, 30 if "chunk_bytes" in settings else 100, **settings)
