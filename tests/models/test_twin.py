"""The twin keeps what decides the computation, and catches a runner that is wrong anywhere."""

import math

import pytest
import torch
from transformers import (
    BambaConfig,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from djinn_core.errors import OutOfDeviceMemory, UnsupportedModel
from djinn_core.models import twin as twin_module
from djinn_core.models.source import open_source
from djinn_core.models.twin import PROMPT_TOKENS, make_twin, prove, shrink, stock_logits


class Runner:
    """A runner that is the stock model, but for what `spoil(logits, what)` does to one of its runs."""

    def __init__(self, spoil=lambda logits, what: logits):
        self.spoil = spoil
        self.runs = []

    def _run(self, twin, what):
        self.runs.append(what)
        return self.spoil(stock_logits(twin), what)

    def stream(self, twin):
        return self._run(twin, "stream")

    def stop(self, twin, *, at_pass, after_layer):
        return self._run(twin, (at_pass, after_layer))


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(twin_module, "_verdicts", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-2-13b", "gpt2", "mistral-7b"])
def test_a_right_runner_is_proved_at_every_layer_once(name, dtype):
    config, runner = open_source(name).config, Runner()
    verdict = prove(config, dtype, runner)
    assert runner.runs == ["stream", (0, 1), (0, 2), (3, 1), (3, 2)]
    assert verdict.comparisons == 5 * 4
    assert prove(config, dtype, runner) is verdict
    assert len(runner.runs) == 5, "the verdict is kept"
    prove(config, torch.float32 if dtype != torch.float32 else torch.float16, runner)
    assert len(runner.runs) == 10, "another dtype is another proof"


@pytest.mark.parametrize("at", ["stream", (0, 1), (0, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("index", [0, 2])
def test_one_bit_anywhere_is_refused_with_its_place(at, index):
    def spoil(logits, what):
        if what == at:
            logits[index] = logits[index].clone()
            logits[index][1, 7] = torch.nextafter(logits[index][1, 7], torch.tensor(torch.inf))
        return logits

    with pytest.raises(UnsupportedModel) as caught:
        prove(open_source("tiny-llama").config, torch.float32, Runner(spoil))
    where = "the prefill" if at[0] == 0 else "decode step 3"
    place = "streamed" if at == "stream" else f"after layer {at[1]} of {where}"
    assert place in str(caught.value)
    assert f"differs from the stock model in pass {index}: 1 of 256 logits" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda logits, _: logits[:-1], "ran 3 of 4 passes"),
        (lambda logits, _: [x[:1] for x in logits], "not"),
        (lambda logits, _: [x.half() for x in logits], "float16"),
    ],
)
def test_a_wrong_number_shape_or_dtype_is_refused(spoil, what):
    with pytest.raises(UnsupportedModel, match=what):
        prove(open_source("tiny-llama").config, torch.float32, Runner(spoil))


def test_a_refusal_is_kept_too():
    runner = Runner(lambda logits, _: logits[:-1])
    for _ in range(2):
        with pytest.raises(UnsupportedModel):
            prove(open_source("tiny-llama").config, torch.float32, runner)
    assert len(runner.runs) == 1


def test_a_runner_that_cannot_run_it_is_a_refusal_but_a_full_device_is_not():
    def broken(logits, what):
        raise AttributeError("no such cache layer")

    def full(logits, what):
        raise OutOfDeviceMemory("twin", needed_bytes=2, free_bytes=1)

    config = open_source("tiny-llama").config
    with pytest.raises(OutOfDeviceMemory):
        prove(config, torch.float32, Runner(full))
    with pytest.raises(UnsupportedModel, match="streamed, fails: no such cache layer"):
        prove(config, torch.float32, Runner(broken))


@pytest.mark.parametrize("config", [MambaConfig, RwkvConfig, JambaConfig, RecurrentGemmaConfig, BambaConfig])
def test_recurrent_state_is_refused_by_name_without_a_run(config):
    config, runner = config(), Runner()
    with pytest.raises(UnsupportedModel, match=rf"^{config.model_type}: .*recurrent"):
        prove(config, torch.float32, runner)
    assert runner.runs == []


def test_dynamic_rotary_scaling_is_refused():
    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedModel, match="dynamic rotary scaling"):
        prove(config, torch.float32, Runner())


@pytest.mark.parametrize("odd", [{"rms_norm_eps": math.nan}, {"rms_norm_eps": -9.0}, {"rope_theta": -1.0}], ids=str)
def test_a_number_that_cannot_be_is_said_to_give_nan(odd):
    config = LlamaConfig(**{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2} | odd)
    with pytest.raises(UnsupportedModel, match="llama: the stock twin answers NaN; look for a number in its config"):
        prove(config, torch.float32, Runner())


def test_the_window_is_exceeded_and_decides_the_logits():
    config = open_source("mistral-7b").config
    small = shrink(config)
    assert (config.sliding_window, small.sliding_window) == (4096, 8)
    twin = make_twin(config, torch.float32)
    assert small.sliding_window < PROMPT_TOKENS
    windowed = stock_logits(twin)
    twin.source.config.sliding_window = None
    assert not torch.equal(windowed[0], stock_logits(twin)[0])


def test_heads_keep_their_ratio_and_rope_its_scaling():
    big = open_source("llama-2-70b").config
    small = shrink(big)
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert small.num_hidden_layers == 2 and big.num_hidden_layers == 80
    tiny = open_source("tiny-llama-gqa").config
    assert shrink(tiny).rope_parameters == tiny.rope_parameters


def test_both_kinds_of_attention_are_in_the_twin():
    config = Gemma2Config()
    config.layer_types = ["full_attention"] * 25 + ["sliding_attention"]
    assert shrink(config).layer_types == ["full_attention", "sliding_attention"]


def test_padding_and_positions_are_those_of_generate():
    twin = make_twin(open_source("tiny-llama").config, torch.float32)
    first = twin.pass_inputs(0)
    assert first["position_ids"][1].tolist() == [0] * 5 + list(range(15))
    third = twin.pass_inputs(3)
    assert third["input_ids"].shape == (2, 1)
    assert third["attention_mask"].shape == (2, PROMPT_TOKENS + 3)
    assert third["position_ids"].tolist() == [[22], [17]]


OTHER_FAMILIES = [OPTConfig(), GPTJConfig(), FalconConfig(), Gemma2Config()]


@pytest.mark.parametrize("config", OTHER_FAMILIES, ids=lambda config: config.model_type)
def test_other_families_have_a_twin(config):
    assert prove(config, torch.float32, Runner()).comparisons == 20


def test_the_original_config_is_left_alone():
    config = open_source("mistral-7b").config
    before = config.to_dict()
    make_twin(config, torch.float16)
    assert config.to_dict() == before
