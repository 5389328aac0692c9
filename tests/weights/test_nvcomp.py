"""What nvCOMP is asked, seen by a stand-in with the same calls: it needs no GPU, and says nothing of nvCOMP itself."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from djinn_core.errors import DeviceError
from djinn_core.weights.coding import NvcompAns

SIZE = 4096


class StandIn(ModuleType):
    """The calls of `nvidia.nvcomp` that are used. It "codes" by halving, for blocks of one value."""

    __version__ = "6.0.0"

    def __init__(self):
        super().__init__("nvidia.nvcomp")
        self.opened, self.allocator, self.most_bytes, self.fails = [], None, SIZE, False
        outer = self

        class Codec:
            def __init__(self, **options):
                self.options, self.calls = options, []
                outer.opened.append(self)

            def get_max_comp_buffer_size(self, source):
                return outer.most_bytes

            def encode(self, array, out=None):
                self.calls.append("encode")
                count = array.tensor.nbytes // 2
                out.tensor[:count] = array.tensor.view(torch.uint8)[0]
                return SimpleNamespace(buffer_size=count)

            def decompression_config(self, src):
                return ("config", src.tensor.numel())

            def decode(self, src, out=None, decompression_config=None):
                self.calls.append("decode")
                if outer.fails:
                    raise RuntimeError("CUDA out of memory")
                assert decompression_config == ("config", src.tensor.numel())  # without one a decode would wait
                out.tensor.view(torch.uint8)[:] = src.tensor[0]

        self.Codec = Codec

    def set_device_allocator(self, allocator):
        assert not self.opened  # one that is set later would not get what a codec takes at once
        self.allocator = allocator

    def as_array(self, source):
        return SimpleNamespace(tensor=source)


@pytest.fixture
def library(monkeypatch):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvcomp=made))
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", made)
    return made


@pytest.fixture
def codec(library):
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    device = SimpleNamespace(name="cuda:1", is_gpu=True, torch_device=torch.device("cuda", 1), stream=lambda: stream)
    return NvcompAns(device)


def test_a_block_is_coded_and_decoded_by_codecs_on_the_stream_of_its_device(library, codec):
    block = torch.full((SIZE,), 7, dtype=torch.uint8)
    out, again = torch.zeros(codec.bound_bytes(SIZE), dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8)
    coded = codec.encode(block, out)
    codec.end_encoding()
    decode = codec.decoder(coded, out[: coded.size_bytes], again)
    assert coded.size_bytes == SIZE // 2 and not again.any()
    decode()
    assert torch.equal(again, block)
    for each in library.opened:
        assert (each.options["algorithm"], each.options["data_type"]) == ("ANS", "<f2")
        assert (each.options["device_id"], each.options["cuda_stream"]) == (1, 77)
    assert [each.calls for each in library.opened] == [["decode"], ["encode"]]  # what encoding takes ends with it
    assert library.allocator is not None


def test_a_landing_buffer_too_small_for_this_nvcomp_is_refused(library, codec):
    library.most_bytes = 10 * SIZE
    with pytest.raises(DeviceError, match=r"may need 40,960 bytes for a block of 4,096, and 4,096 were planned"):
        codec.encode(torch.zeros(SIZE, dtype=torch.uint8), torch.zeros(SIZE, dtype=torch.uint8))
    assert all("encode" not in each.calls for each in library.opened)


def test_a_decode_that_cannot_be_queued_is_a_device_error(library, codec):
    out = torch.zeros(SIZE, dtype=torch.uint8)
    coded = codec.encode(torch.zeros(SIZE, dtype=torch.uint8), out)
    library.fails = True
    with pytest.raises(DeviceError, match=r"could not decode a block of 4,096 bytes: CUDA out of memory"):
        codec.decoder(coded, out[: coded.size_bytes], torch.zeros(SIZE, dtype=torch.uint8))()
