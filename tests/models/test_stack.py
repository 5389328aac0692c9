"""A model without memory, its parts, and tensors bound into it: equal to the stock model to the bit."""

import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from djinn_core.errors import UnsupportedModel, WeightsError
from djinn_core.models.export import fill_model
from djinn_core.models.source import architectures, open_source
from djinn_core.models.stack import bind, build_meta_model, find_stack
from djinn_core.models.twin import shrink

FAMILIES = {
    "llama": LlamaConfig(),
    "llama3": "llama-3-8b",
    "mistral": "mistral-7b",
    "gpt2": "gpt2",
    "qwen2": Qwen2Config(),
    "qwen3": Qwen3Config(),
    "qwen2-tied": Qwen2Config(tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(),
    "opt": OPTConfig(),
    "gemma2": Gemma2Config(),
    "mixtral": MixtralConfig(),
    "yarn": LlamaConfig(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    ),
}


def read_all(source):
    tensors = {}
    for name in source.names():
        shape, dtype = source.meta(name)
        tensors[name] = torch.empty(shape, dtype=dtype)
        source.read_into(name, tensors[name])
    return tensors


def small(family):
    config = FAMILIES[family]
    return shrink(open_source(config).config if isinstance(config, str) else config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_model_equals_the_stock_one(family, dtype):
    source = open_source(small(family), dtype=dtype)
    model = build_meta_model(source.config, dtype)
    tensors = read_all(source)
    bind(model, tensors)
    stock = AutoModelForCausalLM.from_config(source.config, dtype=dtype).eval()
    fill_model(stock, source)
    ids = torch.arange(24)[None] * 5 % 128
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, stock(ids).logits)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    if family == "llama3":
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, tensor in tensors.items():
        assert model.state_dict()[name].data_ptr() == tensor.data_ptr(), f"{name} was copied"


@pytest.mark.parametrize("family", ["gpt2", "qwen2-tied"])
def test_tied_weights_are_kept_once(family):
    source = open_source(small(family), dtype=torch.float32)
    model = build_meta_model(source.config, torch.float32)
    stack = find_stack(model)
    assert list(stack.tied) == ["lm_head.weight"]
    assert "lm_head.weight" not in source.names()
    bind(model, read_all(source))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_holds_every_byte_once(family):
    model = build_meta_model(small(family), torch.float16)
    stack = find_stack(model)
    assert len(stack.layers) == len(stack.layer_tensors) == model.config.num_hidden_layers
    assert model.get_submodule(stack.decoder_name) is stack.decoder
    assert any(child is stack.layers for child in stack.decoder.children())
    names = [spec.name for spec in stack.resident + sum(stack.layer_tensors, ())]
    assert len(names) == len(set(names))
    assert set(names) | set(stack.tied) == set(model.state_dict())
    assert sum(stack.layer_bytes) + stack.resident_bytes == 2 * model.num_parameters()
    for index, specs in enumerate(stack.layer_tensors):
        own = {name: tensor.shape for name, tensor in stack.layers[index].state_dict().items()}
        assert sorted(own.values()) == sorted(spec.shape for spec in specs)
        assert all(f".{index}." in spec.name for spec in specs)


def test_sizes_of_the_true_architectures():
    sizes = {}
    for name in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "gpt2", "mistral-7b"):
        model = build_meta_model(open_source(name).config, torch.bfloat16)
        stack = find_stack(model)
        sizes[name] = sum(stack.layer_bytes) + stack.resident_bytes
    assert sizes == {
        "llama-2-7b": 13_476_831_232,
        "llama-2-13b": 26_031_728_640,
        "llama-2-70b": 137_953_296_384,
        "llama-3-8b": 16_060_522_496,
        "gpt2": 248_879_616,
        "mistral-7b": 14_483_464_192,
    }


def test_small_ones_are_there_for_tests():
    assert {"tiny-llama", "tiny-gpt2", "tiny-mistral", "tiny-llama-gqa", "small-llama"} <= set(architectures())
    source = open_source("small-llama", dtype=torch.float32)
    stack = find_stack(build_meta_model(source.config, torch.float32))
    assert 30e6 < sum(stack.layer_bytes) + stack.resident_bytes < 60e6


def test_a_70b_model_takes_no_time_without_memory():
    config = open_source("llama-2-70b").config
    began = time.process_time()
    find_stack(build_meta_model(config, torch.bfloat16))
    assert time.process_time() - began < 2


def test_bind_refuses_before_it_changes_anything():
    source = open_source("tiny-llama", dtype=torch.float32)
    tensors = read_all(source)
    model = build_meta_model(source.config, torch.float32)
    missing = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    other_shape = tensors | {"model.norm.weight": torch.ones(65)}
    other_dtype = tensors | {"model.norm.weight": torch.ones(64, dtype=torch.float16)}
    for wrong, what in [
        (missing, "missing model.norm.weight"),
        (tensors | {"model.nonsense": torch.ones(1)}, "unknown model.nonsense"),
        (other_shape, r"model.norm.weight is torch.float32 \(65,\)"),
        (other_dtype, "model.norm.weight is torch.float16"),
    ]:
        with pytest.raises(WeightsError, match=what):
            bind(model, wrong)
    assert all(p.is_meta for p in model.parameters())


def test_a_buffer_that_nothing_rebuilds_is_refused():
    source = open_source("tiny-llama", dtype=torch.float32)
    model = build_meta_model(source.config, torch.float32)
    model.model.register_buffer("mystery", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModel, match=r"model\.mystery"):
        bind(model, read_all(source))


def test_a_plain_tensor_left_on_meta_is_refused():
    source = open_source("tiny-llama", dtype=torch.float32)
    model = build_meta_model(source.config, torch.float32)
    model.model.layers[0].scale = torch.empty(3, device="meta")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.scale"):
        bind(model, read_all(source))


def test_rebuilding_buffers_leaves_the_weights_alone():
    """Gemma's embedding owns a buffer and a weight; rebuilding the one must not initialise the other."""
    source = open_source(small("gemma2"), dtype=torch.float32)
    tensors = read_all(source)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    bind(build_meta_model(source.config, torch.float32), tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_what_has_no_layers_is_refused():
    config = open_source("tiny-llama").config
    model = build_meta_model(config, torch.float32)
    model.config.num_hidden_layers = 9
    with pytest.raises(UnsupportedModel, match="one list of 9 equal decoder layers"):
        find_stack(model)
    with pytest.raises(UnsupportedModel, match="t5"):
        build_meta_model(T5Config(), torch.float32)


def test_layers_that_share_a_tensor_are_refused():
    model = build_meta_model(open_source("tiny-llama").config, torch.float32)
    layers = model.model.layers
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
    with pytest.raises(UnsupportedModel, match="layers share tensors"):
        find_stack(model)


def test_a_quantised_config_is_refused():
    config = open_source("tiny-llama").config
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModel, match="quantised"):
        build_meta_model(config, torch.float32)
