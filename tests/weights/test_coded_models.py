"""A model whose layers cross the link coded equals the stock model bit for bit, and holds what its plan says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import djinn_core as djinn
from djinn_core.errors import OutOfDeviceMemory, OutOfHostMemory
from djinn_core.models.export import fill_model
from djinn_core.models.source import open_source
from djinn_core.runtime import Runtime

MIB = 1 << 20
LLAMA = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=128,
)
GPT2 = GPT2Config(
    n_embd=128, n_layer=10, n_head=4, vocab_size=256, n_positions=128, bos_token_id=0, eos_token_id=None, pad_token_id=0
)
IDS = torch.arange(18).reshape(2, 9) * 7 % 256


def answers(model):
    with torch.inference_mode():
        logits = model(IDS).logits.clone()
        how = {"max_new_tokens": 5, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
        return logits, model.generate(IDS, do_sample=False, **how)


def stock_answers(config, dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fill_model(model, open_source(config, dtype=dtype))
    return answers(model)


@pytest.mark.parametrize(
    "how",
    [
        {"resident_layers": "none", "slots": 1},
        {"resident_layers": "none", "slots": 2, "chunk_bytes": 20_000},
        {"resident_layers": "none", "slots": 3},
        {"resident_layers": "none"},
        {"resident_layers": 3},
        {"resident_layers": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_coded_model_equals_the_stock_model(config, how):
    want = stock_answers(config, torch.bfloat16)
    with Runtime("cpu", budget_bytes=16 * MIB, host_bytes=16 * MIB) as runtime:
        model = runtime.load(config, dtype="bfloat16", coding="ans", prove=False, **how)
        loaded = model.djinn
        before_bytes = runtime.device.copied.h2d_bytes
        for _ in range(2):
            assert all(map(torch.equal, answers(model), want))
            assert loaded.last_pass.moved_bytes == loaded.last_pass.planned_bytes == loaded.plan.streamed_bytes_per_pass
        held = runtime.memory()
        assert held.ring_bytes == loaded.plan.ring_bytes
        assert held.resident_weights_bytes + held.ring_bytes == loaded.plan.device_bytes == runtime.device.used_bytes()
        assert runtime.host.held_bytes == loaded.host_bytes
        if not loaded.plan.streamed:
            assert loaded.codec is None and runtime.device.copied.h2d_bytes == before_bytes
            return
        assert loaded.codec.startswith("zlib")
        assert loaded.plan.streamed_bytes_per_pass < 0.85 * loaded.streamed_parameter_bytes
        assert loaded.host_bytes < 0.9 * loaded.streamed_parameter_bytes


def test_float16_is_coded_too_and_the_twin_is_proved():
    want = stock_answers(LLAMA, torch.float16)
    room = {"device": "cpu", "budget_bytes": 4 * MIB, "host_bytes": 16 * MIB}
    model = djinn.load(LLAMA, dtype="float16", coding="ans", resident_layers="none", **room)
    assert all(map(torch.equal, answers(model), want))
    assert model.djinn.plan.coded_ratio < 0.95
    model.djinn.runtime.close()


def test_everything_goes_back_at_unload():
    with Runtime("cpu", budget_bytes=4 * MIB, host_bytes=16 * MIB) as runtime:
        for _ in range(2):
            model = runtime.load(LLAMA, dtype="bfloat16", coding="ans", resident_layers="none", prove=False)
            answers(model)
            runtime.unload(model)
            runtime.pool.trim()
            assert runtime.device.used_bytes() == runtime.pool.held_bytes == runtime.host.held_bytes == 0


def test_float32_is_coded_by_the_emulated_device():
    with Runtime("cpu", budget_bytes=24 * MIB, host_bytes=64 * MIB) as runtime:
        plain = answers(runtime.load(LLAMA, dtype="float32", prove=False))
        model = runtime.load(LLAMA, dtype="float32", coding="ans", resident_layers="none", prove=False)
        assert all(torch.equal(one, other) for one, other in zip(answers(model), plain, strict=True))
        assert model.djinn.plan.coded_ratio < 0.95 and model.djinn.codec.startswith("zlib")


def test_a_device_without_room_for_the_landing_buffers_is_refused_before_any_copy():
    with Runtime("cpu", budget_bytes=3 * MIB // 2, host_bytes=16 * MIB) as runtime:
        runtime.unload(runtime.load(LLAMA, dtype="bfloat16", resident_layers="none", slots=3, prove=False))
        before_bytes = runtime.device.copied.h2d_bytes
        with pytest.raises(OutOfDeviceMemory, match=r"3 slots of [0-9,]+ and 2 landing buffers"):
            runtime.load(LLAMA, dtype="bfloat16", resident_layers="none", slots=3, coding="ans", prove=False)
        assert runtime.device.copied.h2d_bytes == before_bytes


def test_a_host_without_room_for_the_coded_layers_is_refused_and_leaves_nothing():
    with Runtime("cpu", budget_bytes=4 * MIB, host_bytes=MIB) as runtime:
        with pytest.raises(OutOfHostMemory, match="the coded weights do not fit the host budget") as caught:
            runtime.load(LLAMA, dtype="bfloat16", coding="ans", resident_layers="none", prove=False)
        assert caught.value.needed_bytes > caught.value.free_bytes
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0
