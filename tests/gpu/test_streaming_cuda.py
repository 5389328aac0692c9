"""Streaming on a real GPU: bit-equal to the resident run, exactly the planned bytes, within the budget by NVML."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from djinn_core.context import ContextMeasurement
from djinn_core.models.export import fill_model
from djinn_core.models.source import open_source
from djinn_core.runtime import Runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MIB = 1 << 20
CONFIG = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=4096,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=0,
)
HOST = {"host_bytes": 4 << 30, "activation_bytes": 512 * MIB}
IDS = torch.arange(96).reshape(2, 48) * 31 % 4096


@pytest.fixture(autouse=True)
def repeatable_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def answers(model):
    ids = IDS.cuda()
    with torch.inference_mode():
        logits = [model(ids).logits.clone() for _ in range(3)]
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    return [*logits, tokens]


@pytest.fixture(scope="module")
def want():
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device("cuda:0"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    fill_model(model, open_source(CONFIG, dtype=torch.bfloat16))
    found = [t.cpu() for t in answers(model)]
    del model
    torch.cuda.empty_cache()
    return found


STREAMED = [
    {"resident_layers": "none"},
    {"resident_layers": "none", "slots": 3, "chunk_bytes": 4 * MIB},
    {"resident_layers": 7, "slots": 2, "chunk_bytes": 1 * MIB},
    {"resident_layers": 1, "slots": 1},
]


@pytest.mark.parametrize("how", [*STREAMED, {"resident_layers": "all"}], ids=str)
def test_a_streamed_model_equals_the_resident_one(want, how):
    with Runtime("cuda:0", budget_bytes=4 << 30, **HOST) as runtime:
        model = runtime.load(CONFIG, dtype=torch.bfloat16, **how)
        before = runtime.device.copied.h2d_bytes
        for got, expected in zip(answers(model), want, strict=True):
            assert torch.equal(got.cpu(), expected)
        plan, count = model.djinn.plan, model.djinn.last_pass
        assert count.moved_bytes == plan.streamed_bytes_per_pass
        passes = 3 + 12
        ahead = sum(plan.layer_bytes[layer] for layer in plan.streamed[: plan.slots])
        assert runtime.device.copied.h2d_bytes - before == passes * plan.streamed_bytes_per_pass + ahead


@pytest.mark.parametrize("how", STREAMED, ids=str)
def test_a_coded_model_equals_the_resident_one_and_moves_less(want, how):
    pytest.importorskip("nvidia.nvcomp")
    nvml = ContextMeasurement("cuda:0")
    with Runtime("cuda:0", budget_bytes=4 << 30, **HOST) as runtime:
        model = runtime.load(CONFIG, dtype=torch.bfloat16, coding="ans", **how)
        before = runtime.device.copied.h2d_bytes
        for got, expected in zip(answers(model), want, strict=True):
            assert torch.equal(got.cpu(), expected)
        plan, count = model.djinn.plan, model.djinn.last_pass
        assert model.djinn.codec.startswith("nvCOMP")
        assert count.moved_bytes == plan.streamed_bytes_per_pass < 0.8 * model.djinn.streamed_parameter_bytes
        assert model.djinn.host_bytes < 0.8 * model.djinn.streamed_parameter_bytes
        passes = 3 + 12
        ahead = sum(plan.link_bytes[layer] for layer in plan.streamed[: plan.slots])
        assert runtime.device.copied.h2d_bytes - before == passes * plan.streamed_bytes_per_pass + ahead
        held = runtime.memory()
        assert held.resident_weights_bytes + held.ring_bytes == plan.device_bytes
        torch.cuda.synchronize()
        assert nvml.free_before_bytes - ContextMeasurement("cuda:0").free_before_bytes <= runtime.budget_bytes
        runtime.unload(model)
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0


def test_the_process_keeps_within_its_budget(want):
    nvml = ContextMeasurement("cuda:0")
    free_before = nvml.free_before_bytes
    with Runtime("cuda:0", budget_bytes=2 << 30, **HOST) as runtime:
        model = runtime.load(CONFIG, dtype=torch.bfloat16, resident_layers="fill")
        answers(model)
        torch.cuda.synchronize()
        assert free_before - ContextMeasurement("cuda:0").free_before_bytes <= runtime.budget_bytes
        assert runtime.context_bytes > 0
        memory = runtime.memory()
        assert memory.resident_weights_bytes + memory.ring_bytes == model.djinn.plan.device_bytes
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(600 * MIB, dtype=torch.uint8, device="cuda:0")


@pytest.mark.parametrize("coding", [None, "ans"])
def test_a_pass_queues_without_waiting_for_the_device(want, coding):
    if coding:
        pytest.importorskip("nvidia.nvcomp")
    with Runtime("cuda:0", budget_bytes=4 << 30, **HOST) as runtime:
        model = runtime.load(CONFIG, dtype=torch.bfloat16, resident_layers="none", coding=coding)
        answers(model)
        torch.cuda.synchronize()
        ids = IDS.cuda()
        blocker = torch.cuda.Event()
        with torch.inference_mode():
            torch.cuda._sleep(2_000_000_000)  # about a second of nothing, ahead of the pass
            blocker.record()
            model(ids)
        assert not blocker.query()  # the whole pass is queued, and the GPU has not even begun it
        torch.cuda.synchronize()


def test_closing_gives_the_memory_back(want):
    with Runtime("cuda:0", budget_bytes=4 << 30, **HOST) as runtime:
        before = runtime.device.used_bytes()
        model = runtime.load(CONFIG, dtype=torch.bfloat16)
        answers(model)
        runtime.unload(model)
        torch.cuda.empty_cache()
        runtime.pool.trim()
        assert runtime.device.used_bytes() - before <= 64 * MIB
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0
