"""The wrappers: an ordinary pass is unchanged, layers can be skipped, edited and stopped at, and every pass ends."""

import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from djinn_core.errors import SessionStateError, UsageError
from djinn_core.models import boundary
from djinn_core.turn import Turn

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


class Recorder:
    """A provider that writes down what it is told."""

    inference_only = False

    def __init__(self):
        self.calls = []

    def begin_pass(self, first_layer):
        self.calls.append(("begin", first_layer))

    def acquire(self, layer):
        self.calls.append(("acquire", layer))

    def release(self, layer):
        self.calls.append(("release", layer))

    def end_pass(self):
        self.calls.append(("end", None))


class Control:
    """Enter at a layer with a given boundary, keep every boundary, stop after a layer."""

    def __init__(self, first_layer=0, hidden=None, stop_after=None):
        self.first_layer, self.hidden, self.stop_after = first_layer, hidden, stop_after
        self.stop_before = None if stop_after is None else stop_after + 1
        self.kept = {}

    ready = None

    def begins(self):
        return True

    def begin(self):
        assert not self.kept

    def enter(self, hidden):
        return hidden if self.hidden is None else self.hidden

    def before_layer(self, layer):
        self.kept.setdefault(layer, None)

    def after_layer(self, layer, hidden):
        self.kept[layer] = hidden
        return hidden

    def stop(self, hidden):
        assert torch.equal(hidden, self.kept[self.stop_after])
        raise boundary.PassStopped


def build(kind="llama", provider=None):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        decoder, layers = model.model, model.model.layers
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, n_positions=64)).eval()
        decoder, layers = model.transformer, model.transformer.h
    ids = torch.randint(0, 64, (2, 7))
    with torch.inference_mode():
        want = model(ids).logits.clone()
    provider = provider or Recorder()
    boundary.install(model, SimpleNamespace(decoder=decoder, layers=layers), provider, Turn())
    return model, ids, want, provider


def run(model, ids, control=None):
    token = boundary.RUNNING.set(control)
    try:
        with torch.inference_mode():
            return model(ids, use_cache=False).logits
    finally:
        boundary.RUNNING.reset(token)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_ordinary_pass_is_unchanged_and_ends(kind):
    model, ids, want, provider = build(kind)
    assert torch.equal(run(model, ids), want)
    assert provider.calls[0] == ("begin", 0) and provider.calls[-1] == ("end", None)
    assert [c for c in provider.calls if c[0] == "acquire"] == [("acquire", layer) for layer in range(4)]
    assert boundary.executed_layers(model) == (1, 1, 1, 1)
    assert next(
        iter(inspect.signature(model.model.forward if kind == "llama" else model.transformer.forward).parameters)
    ) == ("input_ids")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("first_layer", [0, 1, 2, 3, 4])
def test_entering_with_the_kept_boundary_gives_the_same_logits(kind, first_layer):
    model, ids, want, _provider = build(kind)
    whole = Control()
    run(model, ids, whole)
    before = boundary.executed_layers(model)
    kept = whole.kept.get(first_layer - 1)
    assert torch.equal(run(model, ids, Control(first_layer, kept)), want)
    ran = [after - b for after, b in zip(boundary.executed_layers(model), before, strict=True)]
    assert ran == [int(layer >= first_layer) for layer in range(4)]


def test_stopping_ends_the_pass_and_skips_the_rest():
    model, ids, want, provider = build()
    with pytest.raises(boundary.PassStopped):
        run(model, ids, Control(stop_after=1))
    assert boundary.executed_layers(model) == (1, 1, 0, 0)
    assert provider.calls[-2:] == [("release", 1), ("end", None)]
    assert torch.equal(run(model, ids), want)


def test_tuple_layers_keep_their_form():
    model, _ids, _, _ = build()
    state = model._djinn_boundary
    state.arity = 2
    hidden = torch.zeros(1)
    assert state._pack(hidden) == (hidden, None)


def test_a_failing_layer_is_released():
    model, ids, want, provider = build()
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    with pytest.raises(ValueError, match="boom"):
        run(model, ids)
    assert provider.calls[-2:] == [("release", 2), ("end", None)]
    handle.remove()
    assert torch.equal(run(model, ids), want)


def test_a_pass_inside_a_pass_is_refused():
    model, ids, want, _ = build()
    handle = model.model.layers[1].register_forward_hook(lambda *_: model(ids))
    with pytest.raises(SessionStateError, match="second one was begun inside"):
        run(model, ids)
    handle.remove()
    assert torch.equal(run(model, ids), want)


def test_a_layer_called_by_itself_is_a_pass_of_its_own():
    model, _ids, _, provider = build("gpt2")
    with torch.inference_mode():
        model.transformer.h[2](torch.zeros(1, 3, 32))
    assert provider.calls == [("begin", 2), ("acquire", 2), ("release", 2), ("end", None)]


def test_gradients_through_streamed_layers_are_refused():
    provider = Recorder()
    provider.inference_only = True
    model, ids, _, _ = build(provider=provider)
    with pytest.raises(UsageError, match="gradients"):
        model(ids)


def test_a_layer_beyond_the_model_is_refused():
    model, ids, _, provider = build()
    with pytest.raises(UsageError, match="has 4 layers"):
        run(model, ids, Control(first_layer=5))
    assert provider.calls == []


def test_another_model_inside_a_hook_is_a_plain_pass():
    model, ids, want, _ = build()
    inner, inner_ids, inner_want, _ = build("gpt2")
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(run_plain(inner, inner_ids)))
    control = Control()
    assert torch.equal(run(model, ids, control), want)
    assert torch.equal(seen[0], inner_want) and sorted(control.kept) == [0, 1, 2, 3]


def run_plain(model, ids):
    return model(ids, use_cache=False).logits


def test_turns_are_taken_in_order_of_arrival():
    turn, order = Turn(), []
    turn.acquire()
    threads = []
    for name in range(6):
        thread = threading.Thread(target=lambda name=name: (turn.acquire(), order.append(name), turn.release()))
        thread.start()
        threads.append(thread)
        while turn.waiting <= name:
            pass
    turn.acquire()
    turn.release()
    turn.release()
    for thread in threads:
        thread.join(10)
    assert order == list(range(6)) and not turn.held


def test_slices_of_the_layers_are_made_once_and_follow_a_change():
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    layers.__class__ = boundary._Layers
    first = layers[:2]
    assert type(first) is nn.ModuleList
    assert list(first) == [layers[0], layers[1]]
    assert layers[:2] is first
    assert layers[-1] is list(layers)[-1]
    layers[0] = nn.Linear(1, 1)
    assert layers[:2][0] is layers[0]
    assert list(layers.state_dict()) == [f"{i}.{name}" for i in range(3) for name in ("weight", "bias")]
