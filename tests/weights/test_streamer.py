"""The streamer reads the right block in every pass, and a broken one is caught.

Here "compute" is asynchronous, as on a GPU: the device's current stream is a worker, so a wait that is missing is a
real race and not hidden by a caller that has finished already.
"""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn_core.device.faults import FaultPlan
from djinn_core.errors import DeviceError, SessionStateError, TransferError
from djinn_core.memory import ExtentPool, HostTier, Kind
from djinn_core.weights import streamer
from djinn_core.weights.plan import make_plan
from djinn_core.weights.resident import DeviceBlocks
from djinn_core.weights.ring import Ring, Slot, SlotState, SlotStep
from djinn_core.weights.streamer import Streamer
from tests.weights.rigs import AsyncDevice, Holder


class Rig:
    """A streamer over layers of known bytes, and a pass that writes down what each layer would have read."""

    def __init__(self, sizes, *, streamer=Streamer, resident_layers="none", slots=None, chunk_bytes=None, work_s=0.0):
        self.device = AsyncDevice()
        self.pool = ExtentPool(self.device, self.device.capacity_bytes)
        self.host = HostTier(self.device, 16 << 20)
        self.plan = make_plan(
            sizes, 0, 10**9, slots=slots, resident_layers=resident_layers, chunk_bytes=chunk_bytes,
            granularity_bytes=self.device.granularity_bytes,
        )  # fmt: skip
        plan, self.work_s = self.plan, work_s
        self.block = self.host.allocate_exact(sum(sizes) or 1, "test")
        self.bytes, at = {}, 0
        for layer, size in enumerate(sizes):
            self.bytes[layer] = self.block.tensor[at : at + size]
            self.bytes[layer].copy_((torch.arange(size) * 7 + layer * 31 + 1).to(torch.uint8))
            at += size
        blocks = [plan.slot_bytes] * plan.slots
        self.slots = DeviceBlocks(self.device, self.pool, blocks, Kind.RING, "test") if blocks else None
        memory = self.slots.blocks if self.slots else []
        self.parameters = {layer: torch.nn.Parameter(torch.zeros(1), requires_grad=False) for layer in plan.streamed}
        rebinding = None
        if not plan.stable_addresses:
            rebinding = {
                (layer, index): [(Holder(self.parameters, layer), slot[: sizes[layer]])]
                for layer in plan.streamed
                for index, slot in enumerate(memory)
            }
        else:
            for index, layer in enumerate(plan.streamed):
                self.parameters[layer] = memory[index % plan.slots][: sizes[layer]]
        self.streamer = streamer(self.device, plan, self.bytes, memory, rebinding)

    def run(self, first_layer=0, stop_after=None, fail_in=None):
        """One pass. Returns (layer, bytes it read) for each layer, as the compute stream saw them."""
        seen = []
        self.streamer.begin_pass(first_layer)
        try:
            for layer in range(first_layer, len(self.plan.layer_bytes)):
                self.streamer.acquire(layer)
                try:
                    if layer == fail_in:
                        raise RuntimeError("the layer failed")
                    if layer in self.parameters:
                        memory = self.parameters[layer]
                        self.device.launch(self.device.compute, lambda m=memory, i=layer: self._read(m, i, seen))
                finally:
                    self.streamer.release(layer)
                if layer == stop_after:
                    break
        finally:
            self.streamer.end_pass()
        self.device.compute.synchronize()
        return seen

    def _read(self, memory, layer, seen):
        time.sleep(self.work_s)
        seen.append((layer, torch.equal(memory, self.bytes[layer])))

    def close(self):
        self.streamer.close()
        if self.slots:
            self.slots.close()
        self.block.free()
        self.pool.close()
        self.host.close()
        self.device.close()


@pytest.fixture
def rig():
    made = []

    def make(*args, **kwargs):
        made.append(Rig(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def right(rig, seen, first_layer=0, last_layer=None):
    last = len(rig.plan.layer_bytes) - 1 if last_layer is None else last_layer
    return seen == [(layer, True) for layer in rig.plan.streamed if first_layer <= layer <= last]


def test_three_slots_over_forty_layers_wrap_correctly(rig):
    r = rig([3000] * 40, slots=3, work_s=0.0005)
    for _ in range(3):
        assert right(r, r.run())
        assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass == 120_000


def test_a_whole_pass_moves_exactly_the_plan_and_the_device_agrees(rig):
    r = rig([1000, 2000, 3000, 4000, 5000], slots=2, chunk_bytes=700, resident_layers=1)
    r.run()
    before = r.device.copied.h2d_bytes
    for _ in range(4):
        r.run()
        assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass
        assert r.streamer.last_pass.dropped_bytes == 0
    assert r.device.copied.h2d_bytes - before == 4 * r.plan.streamed_bytes_per_pass


def test_prefetch_crosses_the_border_between_passes(rig):
    r = rig([3000] * 8, slots=4)
    r.run()
    assert r.device.copied.h2d_bytes == 12 * 3000  # the next pass's first four are on their way
    r.streamer.empty()
    r.run()
    assert r.device.copied.h2d_bytes == 24 * 3000


def test_no_more_crosses_the_border_than_keeps_the_link_busy(rig, monkeypatch):
    """Whoever waits for the device after a pass waits for it too; the next pass fills the rest as it begins."""
    monkeypatch.setattr(streamer, "BORDER_BYTES", 4000)
    r = rig([3000] * 8, slots=4, work_s=0.001)
    for number in range(1, 4):
        assert right(r, r.run())
        assert r.device.copied.h2d_bytes == (8 * number + 2) * 3000
        assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass
    r.streamer.begin_pass(0)
    assert r.device.copied.h2d_bytes == (8 * 3 + 4) * 3000
    r.streamer.end_pass()


def test_a_slot_is_filled_again_as_soon_as_it_is_released(rig):
    r = rig([3000] * 8, slots=2)
    r.streamer.begin_pass(0)
    for layer in range(8):
        r.streamer.acquire(layer)
        assert r.device.copied.h2d_bytes == 3000 * (layer + 2)
        r.streamer.release(layer)
        assert r.device.copied.h2d_bytes == 3000 * (layer + 3)
    r.streamer.end_pass()


def test_resuming_where_the_last_pass_stopped_drops_nothing(rig):
    r = rig([3000] * 10, slots=3)
    assert right(r, r.run(stop_after=3), last_layer=3)
    assert right(r, r.run(first_layer=4), first_layer=4)
    assert r.streamer.last_pass.dropped_bytes == 0
    assert r.device.copied.h2d_bytes == 13 * 3000


def test_resuming_elsewhere_drops_what_was_aimed_elsewhere(rig):
    r = rig([3000] * 10, slots=3)
    r.run(stop_after=1)
    assert right(r, r.run(first_layer=7), first_layer=7)
    assert r.streamer.last_pass.dropped_bytes == 3 * 3000
    assert r.streamer.last_pass.moved_bytes == r.streamer.last_pass.planned_bytes == 3 * 3000


passes = st.tuples(st.integers(0, 8), st.integers(0, 8), st.sampled_from(["whole", "stop", "fail"]))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    slots=st.none() | st.integers(1, 5),
    resident=st.integers(0, 8),
    chunk=st.integers(1, 900),
    sequence=st.lists(passes, min_size=1, max_size=6),
)
def test_any_sequence_of_passes_reads_the_right_blocks(sizes, slots, resident, chunk, sequence):
    depth = len(sizes)
    r = Rig(
        sizes, slots=slots, resident_layers=min(resident, depth), chunk_bytes=min(max(chunk, max(sizes) // 20), *sizes)
    )  # fmt: skip
    try:
        for first, where, how in sequence:
            first = min(first, depth)
            where = min(max(where, first), depth - 1)
            if how == "fail" and first < depth:
                with pytest.raises(RuntimeError, match="the layer failed"):
                    r.run(first, fail_in=where)
                continue
            stop = where if how == "stop" else None
            assert right(r, r.run(first, stop_after=stop), first, stop)
            count = r.streamer.last_pass
            assert count.moved_bytes == count.planned_bytes == sum(sizes[layer] for layer in count.layers)
            assert all(slot.state in (SlotState.FREE, SlotState.READY) for slot in r.streamer._ring.slots)
    finally:
        r.close()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("nth", range(1, 13))
def test_a_copy_that_fails_fails_its_pass_and_the_next_is_right(rig, nth, asynchronous):
    r = rig([3000] * 5, slots=2, chunk_bytes=1500)
    r.device.faults = FaultPlan().fail("copy", nth, asynchronous=asynchronous)
    failures = 0
    for _ in range(3):
        try:
            assert right(r, r.run())
        except DeviceError:
            failures += 1
    assert failures == 1 and r.device.faults.fired == ["copy"]
    assert right(r, r.run())


# broken on purpose: each gate must see it


class SkipsACopy(Streamer):
    def _copy_list(self, layer, slot):
        return super()._copy_list(layer, slot)[1:] if layer == 2 else super()._copy_list(layer, slot)


class IgnoresConsumed(Streamer):
    def _wait_consumed(self, slot):
        pass


class SwapsTwoBlocks(Streamer):
    def _copy_list(self, layer, slot):
        return super()._copy_list({1: 2, 2: 1}.get(layer, layer), slot)


class SlotPerLayer(Streamer):
    """The ring of the early prototype: the slot follows the layer's number, not the position."""

    def __init__(self, device, plan, *rest):
        super().__init__(device, plan, *rest)
        ring, depth = self._ring, len(plan.streamed)
        ring.slot_of = lambda position: ring.slots[position % depth % len(ring)]


def test_a_skipped_copy_is_caught_by_the_byte_count(rig):
    r = rig([3000] * 4, streamer=SkipsACopy, slots=2, chunk_bytes=1000)
    with pytest.raises(TransferError, match=r"moved 11,000 bytes for 4 layers, the plan says 12,000"):
        r.run()


def test_a_copy_lost_below_the_streamer_is_caught_by_the_bytes_read(rig):
    r = rig([3000] * 4, slots=2)
    issue, calls = r.device._issue_copy, []
    r.device._issue_copy = lambda *args: (calls.append(1), issue(*args) if len(calls) != 3 else None)
    assert not right(r, r.run())


def test_swapped_blocks_are_caught_by_the_bytes_read(rig):
    r = rig([3000] * 4, streamer=SwapsTwoBlocks, slots=2)
    seen = r.run()
    assert [layer for layer, equal in seen if not equal] == [1, 2]
    assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass  # the count alone cannot see it


def test_a_slot_reused_too_early_is_caught_by_the_bytes_read(rig):
    r = rig([3000] * 8, streamer=IgnoresConsumed, slots=2, work_s=0.01)
    assert not right(r, r.run())
    honest = rig([3000] * 8, slots=2, work_s=0.01)
    assert right(honest, honest.run())


def test_a_slot_per_layer_number_is_refused_at_the_wrap(rig):
    r = rig([3000] * 40, streamer=SlotPerLayer, slots=3)
    with pytest.raises(DeviceError, match=r"slot 0 is ready \(position 39\) and cannot fill"):
        r.run()


@pytest.mark.parametrize("state", list(SlotState))
@pytest.mark.parametrize("step", list(SlotStep))
def test_only_the_drawn_steps_are_legal(state, step):
    legal = {
        (SlotState.FREE, SlotStep.FILL): SlotState.FILLING,
        (SlotState.FILLING, SlotStep.FILLED): SlotState.READY,
        (SlotState.FILLING, SlotStep.DROP): SlotState.FREE,
        (SlotState.READY, SlotStep.ACQUIRE): SlotState.IN_USE,
        (SlotState.READY, SlotStep.DROP): SlotState.FREE,
        (SlotState.IN_USE, SlotStep.RELEASE): SlotState.FREE,
    }
    slot = Slot(0, None, None)
    slot.state = state
    if (state, step) in legal:
        slot.step(step)
        assert slot.state is legal[state, step]
    else:
        with pytest.raises(DeviceError, match="cannot"):
            slot.step(step)
        assert slot.state is state


def test_positions_and_not_layers_own_slots():
    ring = Ring([Slot(i, None, None) for i in range(3)])
    assert [ring.slot_of(p).index for p in range(38, 43)] == [2, 0, 1, 2, 0]
    assert list(ring.window(39)) == [39, 40, 41]


def test_a_closed_streamer_refuses(rig):
    r = rig([3000] * 2)
    r.streamer.close()
    with pytest.raises(SessionStateError, match="unloaded"):
        r.run()


def test_no_thread_and_no_event_is_made_in_a_steady_pass(rig):
    r = rig([3000] * 8, slots=4)
    for _ in range(2):
        r.run()
    threads = threading.active_count()
    r.device.event = None  # calling it would raise
    r.run()
    assert threading.active_count() == threads
