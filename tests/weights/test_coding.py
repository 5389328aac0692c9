"""Coded weights: fewer bytes on the link, the same bits in the slot, and a broken streamer is caught.

As in test_streamer.py "compute" is asynchronous, and the link and the decoder are slow where a race is to be seen.
"""

import sys
import time

import pytest
import torch

from djinn_core.device.cpu import CpuDevice
from djinn_core.device.faults import FaultPlan
from djinn_core.errors import ConfigError, DeviceError, OutOfHostMemory, TransferError, WeightsError
from djinn_core.memory import ExtentPool, HostTier, Kind
from djinn_core.weights import coding
from djinn_core.weights.coded import CodedStore, CodedStreamer, scratch_bytes
from djinn_core.weights.coding import ZlibPlanes, open_codec
from djinn_core.weights.plan import make_plan
from djinn_core.weights.resident import DeviceBlocks
from djinn_core.weights.store import pack
from tests.weights.rigs import AsyncDevice, Holder

MIB = 1 << 20
SIZE = 40_000


class Numbers:
    """A source of normal bfloat16 numbers, which code to about two thirds; a layer's depend on its name."""

    def read_into(self, name, out):
        generator = torch.Generator().manual_seed(int(name))
        out.copy_(torch.randn(out.shape, generator=generator).to(out.dtype))


class Slow(ZlibPlanes):
    """Decodes take far longer than copies."""

    def decoder(self, coded, source, out):
        decode = super().decoder(coded, source, out)

        def slowly():
            self._device.launch(self.stream, lambda: time.sleep(0.005))
            decode()

        return slowly


class Rig:
    """A coded streamer over layers of known bytes, and a pass that writes down what each layer would have read."""

    def __init__(
        self, layers, *, streamer=CodedStreamer, codec=ZlibPlanes, slots=None, link_gbps=None, work_s=0.0, **how
    ):
        self.device = AsyncDevice(link_gbps)
        self.pool = ExtentPool(self.device, self.device.capacity_bytes)
        self.host = HostTier(self.device, how.pop("host_bytes", 16 * MIB))
        self.work_s = work_s
        layouts = {i: pack([(str(i), (SIZE // 2 + 64 * i,), torch.bfloat16)]) for i in range(layers)}
        sizes = [layout.size_bytes for layout in layouts.values()]
        self.codec = codec(self.device)
        self.plan = plan = make_plan(
            sizes, 0, 10**9, slots=slots, resident_layers="none", granularity_bytes=self.device.granularity_bytes,
            coded_bound=self.codec.bound_bytes, **how,
        )  # fmt: skip
        blocks = [plan.slot_bytes] * plan.slots + [plan.landing_bytes] * plan.landings
        self.ring = DeviceBlocks(self.device, self.pool, blocks, Kind.RING, "test")
        self.slots, landings = self.ring.blocks[: plan.slots], self.ring.blocks[plan.slots :]
        self.store = CodedStore(self.device, self.host, self.codec, "test")
        self.streamer = None
        try:
            self.store.read(Numbers(), layouts, self.slots[0], landings)
        except BaseException:
            self.close()
            raise
        self.plan = plan.with_coded({layer: block.numel() for layer, block in self.store.blocks.items()})
        self.wanted = {}
        for layer, layout in layouts.items():
            self.wanted[layer] = torch.zeros(layout.size_bytes, dtype=torch.uint8)
            Numbers().read_into(str(layer), layout.views(self.wanted[layer])[str(layer)])
        self.parameters = {}
        rebinding = None
        if plan.stable_addresses:
            self.parameters = {i: self.slots[i % plan.slots][: sizes[i]] for i in range(layers)}
        else:
            rebinding = {
                (i, index): [(Holder(self.parameters, i), slot[: sizes[i]])]
                for i in range(layers)
                for index, slot in enumerate(self.slots)
            }
        self.streamer = streamer(
            self.device, self.plan, self.store, self.codec, self.slots, landings, rebinding
        )  # fmt: skip

    def run(self, first_layer=0, stop_after=None):
        """One pass. Returns (layer, its bytes were right) for each layer, as the compute stream saw them."""
        seen = []
        self.streamer.begin_pass(first_layer)
        try:
            for layer in range(first_layer, len(self.plan.layer_bytes)):
                self.streamer.acquire(layer)
                memory = self.parameters[layer]
                self.device.launch(self.device.compute, lambda m=memory, i=layer: self._read(m, i, seen))
                self.streamer.release(layer)
                if layer == stop_after:
                    break
        finally:
            self.streamer.end_pass()
        self.device.compute.synchronize()
        return seen

    def _read(self, memory, layer, seen):
        time.sleep(self.work_s)
        seen.append((layer, torch.equal(memory, self.wanted[layer])))

    def right(self, seen, first_layer=0, last_layer=None):
        last = len(self.plan.layer_bytes) - 1 if last_layer is None else last_layer
        return seen == [(layer, True) for layer in range(first_layer, last + 1)]

    def close(self):
        if self.streamer is not None:
            self.streamer.close()
        self.store.close()
        self.ring.close()
        assert self.host.held_bytes == self.pool.held_bytes == 0
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


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_every_pass_reads_the_right_bytes_and_moves_the_coded_ones(rig, slots):
    r = rig(8, slots=slots, chunk_bytes=5000)
    coded_bytes = sum(block.numel() for block in r.store.blocks.values())
    assert r.right(r.run())
    before_bytes = r.device.copied.h2d_bytes
    for _ in range(3):
        assert r.right(r.run())
        count = r.streamer.last_pass
        assert count.moved_bytes == count.planned_bytes == r.plan.streamed_bytes_per_pass == coded_bytes
    assert r.device.copied.h2d_bytes - before_bytes == 3 * coded_bytes
    assert 0.5 < r.plan.coded_ratio == coded_bytes / sum(r.plan.layer_bytes) < 0.8


def test_a_pass_that_stops_and_goes_elsewhere_reads_the_right_bytes(rig):
    r = rig(9, slots=3, work_s=0.001)
    for first, last in [(0, 4), (5, 8), (2, 2), (7, 8), (0, 8)]:
        assert r.right(r.run(first, last), first, last)
        assert r.streamer.last_pass.moved_bytes == sum(r.plan.link_bytes[first : last + 1])


def test_a_slow_decoder_is_waited_for(rig):
    r = rig(8, slots=4, codec=Slow, link_gbps=1.0)
    for _ in range(2):
        assert r.right(r.run())


def test_the_host_holds_the_coded_bytes_and_no_scratch(rig):
    class Ends(ZlibPlanes):
        ended = 0

        def end_encoding(self):
            self.ended += 1

    r = rig(6, slots=2, codec=Ends)
    assert r.codec.ended == 1
    assert r.host.held_bytes == r.store.size_bytes == sum(-(-b.numel() // 4096) * 4096 for b in r.store.blocks.values())
    assert r.store.size_bytes < 0.85 * sum(r.plan.layer_bytes)


def test_the_plan_counts_the_landing_buffers():
    plan = make_plan([1000, 3000], 0, 10**6, resident_layers="none", slots=2, coded_bound=lambda size: size + 500)
    assert (plan.landings, plan.landing_bytes, plan.ring_bytes) == (2, 3500, 13_000)
    assert plan.link_bytes == plan.layer_bytes and plan.coded_ratio == 1
    coded = plan.with_coded({0: 700, 1: 1700})
    assert (coded.streamed_bytes_per_pass, coded.coded_ratio) == (2400, 0.6)
    assert coded.chunks(1) == ((0, 1700),) and coded.device_bytes == plan.device_bytes
    kept = make_plan([1000, 3000], 0, 10**6, resident_layers="all", coded_bound=lambda size: size)
    assert (kept.landings, kept.ring_bytes) == (0, 0)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("nth", range(1, 11))
def test_a_copy_that_fails_fails_its_pass_and_the_ring_recovers(rig, nth, asynchronous):
    r = rig(5, slots=2, chunk_bytes=16_000)
    r.device.faults = FaultPlan().fail("copy", nth, asynchronous=asynchronous)
    failures = 0
    for _ in range(3):
        try:
            assert r.right(r.run())
        except DeviceError:
            failures += 1
    assert failures == 1 and r.device.faults.fired == ["copy"]
    assert r.right(r.run())


# broken on purpose: each gate must see it


class SkipsACopy(CodedStreamer):
    def _copy_list(self, layer, arrival):
        return super()._copy_list(layer, arrival)[1:] if layer == 2 else super()._copy_list(layer, arrival)


class SwapsTwoBlocks(CodedStreamer):
    def _bring(self, layer, slot):
        super()._bring({1: 2, 2: 1}.get(layer, layer), slot)


class IgnoresFree(CodedStreamer):
    def _wait_free(self, landing):
        pass


class IgnoresFilled(CodedStreamer):
    def _wait_filled(self, landing):
        pass


class IgnoresConsumed(CodedStreamer):
    def _wait_consumed(self, slot):
        pass


def goes_wrong(r):
    """A pass fails, or reads other bytes than it should."""
    try:
        return not r.right(r.run())
    except DeviceError:
        return True


def test_a_skipped_copy_is_caught_by_the_byte_count(rig):
    r = rig(4, streamer=SkipsACopy, slots=2, chunk_bytes=8000)
    with pytest.raises(TransferError, match=r"moved [0-9,]+ bytes for 4 layers, the plan says"):
        r.run()
    assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass - 8000


def test_swapped_blocks_are_caught_by_the_bytes_read(rig):
    r = rig(4, streamer=SwapsTwoBlocks, slots=2)
    assert [layer for layer, equal in r.run() if not equal] == [1, 2]
    assert r.streamer.last_pass.moved_bytes == r.plan.streamed_bytes_per_pass  # the count alone cannot see it


def test_a_landing_buffer_used_too_early_is_caught(rig):
    """The link brings a block while the decoder has not read the one before it there."""
    assert goes_wrong(rig(8, streamer=IgnoresFree, codec=Slow, slots=4))
    honest = rig(8, codec=Slow, slots=4)
    assert honest.right(honest.run())


def test_a_decode_before_its_copy_is_caught(rig):
    assert goes_wrong(rig(8, streamer=IgnoresFilled, slots=2, link_gbps=0.005))
    honest = rig(8, slots=2, link_gbps=0.005)
    assert honest.right(honest.run())


def test_a_slot_decoded_into_too_early_is_caught(rig):
    assert goes_wrong(rig(8, streamer=IgnoresConsumed, slots=2, work_s=0.01))
    honest = rig(8, slots=2, work_s=0.01)
    assert honest.right(honest.run())


# at load


def test_a_block_that_is_damaged_in_the_store_is_found_at_load(monkeypatch):
    class Damages(AsyncDevice):
        """Every third block arrives on the host with one byte flipped."""

        blocks = 0

        def _issue_copy(self, dst, src, stream):
            super()._issue_copy(dst, src, stream)
            if self._pinned.cover(dst.data_ptr(), dst.numel()):
                self.blocks += 1
                if self.blocks == 3:
                    self.launch(stream, lambda: dst[dst.numel() // 2].bitwise_xor_(1))

    monkeypatch.setattr(sys.modules[__name__], "AsyncDevice", Damages)
    with pytest.raises(TransferError, match=r"a coded block of [0-9,]+ bytes is damaged"):
        Rig(4, slots=2)


def test_a_codec_that_loses_a_bit_is_found_at_load():
    class LosesABit(ZlibPlanes):
        def encode(self, block, out):
            block = block.clone()
            block[1234] ^= 1
            return super().encode(block, out)

    with pytest.raises(WeightsError, match=r"layer 0 was coded by zlib .* and differs from what was read"):
        Rig(4, slots=2, codec=LosesABit)


def test_a_host_budget_too_small_for_the_coded_layers_is_refused_with_the_bytes():
    with pytest.raises(OutOfHostMemory, match=r"2 of 4 layers took [0-9,]+ bytes") as caught:
        Rig(4, slots=2, host_bytes=40_960 + 2 * 32_768 + 4096)  # to read a layer, for two coded ones, and a page
    assert caught.value.needed_bytes > caught.value.free_bytes == 4096


def test_a_block_that_does_not_shrink_is_kept_coded_all_the_same():
    device = CpuDevice(4 * MIB)
    codec = ZlibPlanes(device, 2)
    block = torch.randint(0, 256, (SIZE,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    out, again = torch.zeros(codec.bound_bytes(SIZE), dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8)
    coded = codec.encode(block, out)
    assert SIZE < coded.size_bytes <= codec.bound_bytes(SIZE)
    codec.decoder(coded, out[: coded.size_bytes], again)()
    codec.stream.synchronize()
    assert torch.equal(again, block)
    device.close()


def test_what_cannot_be_coded_is_refused():
    device = CpuDevice(MIB)
    assert open_codec(device, None, torch.float32) is None
    assert open_codec(device, "ans", torch.bfloat16).name.startswith("zlib")
    with pytest.raises(ConfigError, match="'ans' and None"):
        open_codec(device, "zstd", torch.bfloat16)
    with pytest.raises(ConfigError, match="16-bit floats on a GPU, and these weights are float32"):
        coding.check("ans", torch.float32, is_gpu=True)
    device.close()


def test_on_a_gpu_without_the_library_the_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia.nvcomp")] + ["nvidia.nvcomp"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"needs nvidia-nvcomp-cu13 .* install it"):
        coding.check("ans", torch.bfloat16, is_gpu=True)


def test_scratch_is_the_largest_layer():
    layouts = [pack([("a", (count,), torch.bfloat16)]) for count in (10, 5000)]
    assert scratch_bytes(layouts) == 12_288 and scratch_bytes([]) == 0
