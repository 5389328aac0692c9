"""A model larger than its budget equals the stock model bit for bit, within the budget, and leaves nothing behind."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import djinn_core as djinn
from djinn_core.device.faults import FaultPlan
from djinn_core.errors import (
    ConfigError,
    DeviceError,
    OutOfDeviceMemory,
    OutOfHostMemory,
    PinningRefused,
    SessionStateError,
    UnsupportedModel,
    UsageError,
)
from djinn_core.models.export import fill_model
from djinn_core.models.source import open_source
from djinn_core.runtime import Runtime
from djinn_core.weights.streamer import Streamer

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
HOST = {"host_bytes": 32 * MIB}
IDS = torch.arange(18).reshape(2, 9) * 7 % 256
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def stock(config, dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    fill_model(model, open_source(config, dtype=dtype))
    return model


def answers(model):
    """Logits of a prefill, and tokens of a greedy and of a sampled generation."""
    how = {"max_new_tokens": 6, "attention_mask": MASK, "pad_token_id": 0}
    with torch.inference_mode():
        logits = model(IDS, attention_mask=MASK).logits.clone()
        greedy = model.generate(IDS, do_sample=False, **how)
        torch.manual_seed(3)
        sampled = model.generate(IDS, do_sample=True, top_k=20, **how)
    return logits, greedy, sampled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_model_larger_than_its_budget_equals_the_stock_model(config, dtype):
    want = answers(stock(config, dtype))
    budget = 3 * MIB if dtype is torch.float32 else 3 * MIB // 2
    with Runtime("cpu", budget_bytes=budget, **HOST) as runtime:
        model = runtime.load(config, dtype=dtype, resident_layers="none")
        assert model.djinn.parameter_bytes > budget
        for _ in range(2):
            for got, expected in zip(answers(model), want, strict=True):
                assert torch.equal(got, expected)
            assert model.djinn.last_pass.moved_bytes == model.djinn.plan.streamed_bytes_per_pass
        memory = runtime.memory()
        held = memory.resident_weights_bytes + memory.ring_bytes
        assert held == model.djinn.plan.device_bytes == runtime.device.used_bytes() <= budget
        assert model.djinn.host_bytes <= 1.05 * model.djinn.parameter_bytes


@pytest.mark.parametrize(
    "how",
    [
        {"resident_layers": "none", "slots": 3},
        {"resident_layers": 3, "slots": 2, "chunk_bytes": 50_000},
        {"resident_layers": 1, "slots": 1},
        {"resident_layers": "all"},
        {"resident_layers": "fill"},
    ],
    ids=str,
)
def test_every_plan_gives_the_same_answers(how):
    want = answers(stock(LLAMA, torch.float32))
    with Runtime("cpu", budget_bytes=16 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", **how)
        for got, expected in zip(answers(model), want, strict=True):
            assert torch.equal(got, expected)


def test_two_models_share_one_budget_and_take_turns():
    want = answers(stock(LLAMA, torch.float32)), answers(stock(GPT2, torch.float32))
    with Runtime("cpu", budget_bytes=6 * MIB, **HOST) as runtime:
        first = runtime.load(LLAMA, dtype="float32", resident_layers="none", slots=2)
        second = runtime.load(GPT2, dtype="float32", resident_layers="none", slots=2)
        for model, expected in zip((first, second, first), (*want, want[0]), strict=True):
            assert all(map(torch.equal, answers(model), expected))
        with pytest.raises(OutOfDeviceMemory):
            runtime.load(LLAMA, dtype="float32", resident_layers="all")
        runtime.unload(first)
        assert runtime.memory().ring_bytes == second.djinn.plan.ring_bytes
        assert all(map(torch.equal, answers(second), want[1]))


def test_everything_goes_back_at_close():
    runtime = Runtime("cpu", budget_bytes=4 * MIB, **HOST)
    for _ in range(3):
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none")
        answers(model)
        runtime.unload(model)
        runtime.pool.trim()
        assert runtime.device.used_bytes() == runtime.pool.held_bytes == runtime.host.held_bytes == 0
    model = runtime.load(LLAMA, dtype="float32", resident_layers="none")
    runtime.close()
    runtime.close()
    assert runtime.pool.held_bytes == runtime.host.held_bytes == 0
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(SessionStateError, match="closed"):
        runtime.memory()


def test_a_budget_below_the_minimum_is_refused_before_any_copy():
    with Runtime("cpu", budget_bytes=MIB + 1, **HOST) as runtime:
        with pytest.raises(OutOfDeviceMemory, match="budget of 1,048,577 bytes") as caught:
            runtime.load(LLAMA, dtype="float32")
        assert caught.value.needed_bytes > caught.value.free_bytes == MIB
        assert runtime.device.copied.h2d_bytes == 0
        assert runtime.device.used_bytes() == runtime.host.pinned_bytes == 0


def test_a_host_budget_too_small_is_refused_and_leaves_nothing():
    with Runtime("cpu", budget_bytes=4 * MIB, host_bytes=MIB) as runtime:
        with pytest.raises(OutOfHostMemory):
            runtime.load(LLAMA, dtype="float32", resident_layers="none")
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0


def test_a_host_budget_without_room_for_the_streamed_layers_is_refused_before_any_copy():
    """The embedding and the head would fit, and were they read first, a large model would be refused minutes later."""
    with Runtime("cpu", budget_bytes=4 * MIB, host_bytes=4 * MIB) as runtime:
        with pytest.raises(OutOfHostMemory, match=r"its 10 streamed layers take [0-9,]+ bytes there") as caught:
            runtime.load(LLAMA, dtype="float32", resident_layers="none")
        streamed_bytes = 10 * 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
        assert caught.value.needed_bytes >= streamed_bytes > caught.value.free_bytes == 4 * MIB
        assert runtime.device.copied.h2d_bytes == runtime.device.used_bytes() == runtime.host.pinned_bytes == 0


@pytest.mark.parametrize(
    ("call", "nth", "error"),
    [
        ("create", 1, OutOfDeviceMemory),
        ("create", 3, OutOfDeviceMemory),
        ("map", 1, DeviceError),
        ("grant", 2, DeviceError),
        ("pin", 1, PinningRefused),
        ("pin", 2, PinningRefused),
        ("copy", 1, DeviceError),
    ],
)
def test_a_load_that_fails_leaves_nothing_and_can_be_retried(call, nth, error):
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        runtime.device.faults = FaultPlan().fail(call, nth)
        with pytest.raises(error):
            runtime.load(LLAMA, dtype="float32", resident_layers="none")
        assert runtime.device.faults.fired == [call]
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none")
        assert all(map(torch.equal, answers(model), answers(stock(LLAMA, torch.float32))))


def test_a_pass_that_fails_leaves_the_model_right():
    want = answers(stock(LLAMA, torch.float32))
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none", slots=3)
        handle = model.model.layers[4].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="boom"):
            answers(model)
        handle.remove()
        assert all(map(torch.equal, answers(model), want))
        runtime.device.faults = FaultPlan().fail("copy", 5)
        with pytest.raises(DeviceError):
            answers(model)
        assert all(map(torch.equal, answers(model), want))


def fail(*_):
    raise ValueError("boom")


def test_sessions_work_on_a_streamed_model():
    want = answers(stock(LLAMA, torch.float32))[1]
    with Runtime("cpu", budget_bytes=5 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none", slots=3)
        assert sum(p.nbytes for p in stock(LLAMA, torch.float32).parameters()) > runtime.budget_bytes
        with runtime.open_session(model, max_length=32, batch_size=2) as session:
            session.forward(IDS, MASK, stop_after=4)
            session.pause(release=True)
            session.wait_until("released", 30)
            assert runtime.memory().kv_bytes == 0
            before = model.djinn.executed
            session.resume()
            ran = [after - b for after, b in zip(model.djinn.executed, before, strict=True)]
            assert ran == [0] * 4 + [1] * 6
            table = runtime.sessions()
            assert [info.id for info in table] == [session.id] and isinstance(table, tuple)
            header, row = str(table).splitlines()
            assert header.split()[:3] == ["session", "state", "length"]
            assert row.split()[:2] == [session.id, "running"] and f"{table[0].device_bytes:,}" in row
            assert len(header) == len(row)
            assert torch.equal(session.generate(6), want[:, IDS.shape[1] :])
        assert runtime.sessions() == () and str(runtime.sessions()).startswith("session")


def test_a_model_of_someone_else_opens_no_session():
    with pytest.raises(UsageError, match="not loaded by Djinn"):
        djinn.open_session(stock(LLAMA, torch.float32), max_length=8)


def test_load_makes_a_runtime_of_its_own():
    model = djinn.load(LLAMA, dtype="float32", device="cpu", budget_bytes=4 * MIB, **HOST)
    try:
        assert all(map(torch.equal, answers(model), answers(stock(LLAMA, torch.float32))))
    finally:
        model.djinn.runtime.close()
    with pytest.raises(SessionStateError, match="unloaded"):
        answers(model)
    with pytest.raises(ConfigError, match="does not know budget"):
        djinn.load(LLAMA, device="cpu", budget=4 * MIB)


def test_a_model_that_its_twin_cannot_prove_is_refused_before_any_copy(monkeypatch):
    monkeypatch.setattr("djinn_core.models.twin._verdicts", {})
    monkeypatch.setattr("djinn_core.weights.streamer.Streamer._copy_list", first_block_twice(Streamer._copy_list))
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        with pytest.raises(UnsupportedModel, match="two-layer twin, streamed"):
            runtime.load(LLAMA, dtype="float32")
        assert runtime.device.copied.h2d_bytes == runtime.device.used_bytes() == 0


def first_block_twice(original):
    """A streamer that brings the first layer's block for the second layer too; byte counts are as planned."""
    return lambda self, layer, slot: original(self, 0 if layer == 1 else layer, slot)


def test_swapped_blocks_show_in_the_logits():
    want = answers(stock(LLAMA, torch.float32))[0]
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none")
        blocks = model.djinn.provider._blocks
        blocks[3], blocks[4] = blocks[4], blocks[3]
        assert not torch.equal(answers(model)[0], want)


def test_the_model_looks_like_the_stock_model():
    reference = stock(LLAMA, torch.float32)
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32")
        assert type(model) is type(reference)
        assert inspect.signature(model.forward) == inspect.signature(reference.forward)
        assert inspect.signature(model.model.forward) == inspect.signature(reference.model.forward)
        assert str(model) == str(reference)
        assert set(model.state_dict()) == set(reference.state_dict())
        with torch.inference_mode():
            got, want = (m(IDS, output_hidden_states=True) for m in (model, reference))
        assert all(map(torch.equal, got.hidden_states, want.hidden_states))


def test_gradients_through_streamed_weights_are_refused():
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", resident_layers="none")
        embeds = torch.zeros(1, 4, 128, requires_grad=True)
        with pytest.raises(UsageError, match="gradients"):
            model(inputs_embeds=embeds)


def test_addresses_are_stable_exactly_when_the_plan_says_so():
    def addresses(model):
        return [layer.mlp.up_proj.weight.data_ptr() for layer in model.model.layers]

    with Runtime("cpu", budget_bytes=16 * MIB, **HOST) as runtime:
        for slots, stable in ((5, True), (3, False)):
            model = runtime.load(LLAMA, dtype="float32", resident_layers="none", slots=slots)
            answers(model)
            before = addresses(model)
            answers(model)
            assert model.djinn.plan.stable_addresses == stable == (addresses(model) == before)
            runtime.unload(model)


def test_progress_reaches_the_end_and_never_falls():
    seen = []
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        model = runtime.load(LLAMA, dtype="float32", progress=lambda done, total: seen.append((done, total)))
        assert seen[0][0] == 0 and seen[-1] == (model.djinn.parameter_bytes,) * 2
        assert seen == sorted(seen)


def test_keep_free_bytes_are_kept_free():
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as runtime:
        runtime.load(LLAMA, dtype="float32", keep_free_bytes=MIB)
        assert runtime.pool.free_bytes >= MIB


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs budget_bytes"),
        ({"budget_bytes": -1}, "budget_bytes is -1"),
        ({"budget_bytes": 1.5}, "budget_bytes is 1.5"),
        ({"budget_bytes": 1 << 63}, "budget_bytes is 9223372036854775808; .* from 0 to 2"),
        ({"budget_bytes": MIB, "host_bytes": 10**30}, "host_bytes is 10+;"),
        ({"budget_bytes": MIB, "disk_bytes": 5}, "needs both"),
        ({"budget_bytes": MIB, "pinning": "no"}, "pinning is 'no'; allowed are 'required' and 'optional'"),
        ({"budget_bytes": MIB, "device": "gpu"}, "device 'gpu' is unknown; allowed are"),
        ({"budget_bytes": MIB, "device": 0}, "device 0 is unknown; allowed are"),
    ],
)
def test_settings_of_a_runtime_are_checked(settings, words):
    with pytest.raises(ConfigError, match=words):
        Runtime(**{"device": "cpu"} | settings)


@pytest.mark.parametrize(("name", "there"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), (f"cuda:{10**20}", 2)])
def test_a_gpu_that_is_not_there_is_refused_with_what_is(name, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    sees = ("no GPU: it, or the NVIDIA driver, is missing", "1 GPU", "2 GPUs")[there]
    with pytest.raises(ConfigError, match=f"device '{name}' was asked for.* sees {sees}; device='cpu' is the emulated"):
        Runtime(name, budget_bytes=MIB)


def test_a_budget_that_the_activations_eat_is_refused():
    with pytest.raises(OutOfDeviceMemory, match="activations are given"):
        Runtime("cpu", budget_bytes=MIB, activation_bytes=MIB)


def test_a_model_of_another_runtime_is_not_unloaded():
    with Runtime("cpu", budget_bytes=4 * MIB, **HOST) as one, Runtime("cpu", budget_bytes=4 * MIB, **HOST) as other:
        model = one.load(LLAMA, dtype="float32")
        with pytest.raises(SessionStateError, match="not loaded in this runtime"):
            other.unload(model)
