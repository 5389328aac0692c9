"""Graphs of a model that is altered after its layers were recorded; of who looks in; of torch's own settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from djinn_core.models.graphs import PROOFS
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, begun


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig(graphs=True)


def test_a_hook_inside_is_called(rig, replays) -> None:
    oracle, session, logits = begun(rig)
    seen = []
    hook = rig.served.model.layers[1].mlp.register_forward_hook(lambda _, __, out: seen.append(out) or out * 2)
    replays.clear()
    wanted = oracle.greedy(logits, 1)
    seen.clear()
    assert equal(speak(session, logits, 1), wanted)
    assert len(seen) == 1 and len(replays) == 2 * (LAYERS - 1)
    hook.remove()
    replays.clear()
    assert equal(speak(session, wanted[0], 1), oracle.greedy(wanted[0], 1))
    assert len(replays) == 2 * LAYERS


def test_a_hook_that_came_while_a_pass_was_stopped_is_called(rig) -> None:
    _, session, logits = begun(rig)
    session.forward(likely(logits), stop_after=2)
    seen = []
    hook = rig.served.model.layers[2].mlp.register_forward_hook(lambda _, __, out: seen.append(out))
    session.resume()
    hook.remove()
    assert len(seen) == 1


def test_a_hook_for_all_modules_is_called(rig, replays) -> None:
    oracle, session, logits = begun(rig)
    replays.clear()
    hook = nn.modules.module.register_module_forward_hook(lambda module, _, out: None)
    try:
        assert equal(speak(session, logits, 1), oracle.greedy(logits, 1))
    finally:
        hook.remove()
    assert not replays


def test_what_hooks_collect_is_theirs(rig) -> None:
    """A hook before one layer, and one before the norm, are given what the layer before has returned."""
    _, session, logits = begun(rig)
    seen: dict[str, list[torch.Tensor]] = {"layer": [], "norm": []}
    hooks = [
        rig.served.model.layers[2].register_forward_pre_hook(lambda _, args: seen["layer"].append(args[0])),
        rig.served.model.norm.register_forward_pre_hook(lambda _, args: seen["norm"].append(args[0])),
    ]
    speak(session, logits, 3)
    kept = {name: [tensor.clone() for tensor in tensors] for name, tensors in seen.items()}
    for hook in hooks:
        hook.remove()
    speak(session, logits, 2)
    for name, tensors in seen.items():
        assert len({tensor.data_ptr() for tensor in tensors}) == 3
        assert equal(tensors, kept[name])


def another_parameter(attention: nn.Module) -> None:
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach() * 2, requires_grad=False)


def other_memory(attention: nn.Module) -> None:
    attention.o_proj.weight.data = attention.o_proj.weight.detach() * 2


def another_module(attention: nn.Module) -> None:
    attention.o_proj = nn.Sequential(attention.o_proj, nn.ReLU())


def another_forward(attention: nn.Module) -> None:
    plain = attention.o_proj.forward
    attention.o_proj.forward = lambda hidden: plain(hidden) * 2


def a_bias(attention: nn.Module) -> None:
    attention.o_proj.bias = nn.Parameter(torch.ones(64), requires_grad=False)


def a_parametrization(attention: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(attention.o_proj, "weight", Twice())


class Doubled(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 2


def another_class(attention: nn.Module) -> None:
    attention.o_proj.__class__ = Doubled


def another_shape(attention: nn.Module) -> None:
    attention.o_proj.weight.data = attention.o_proj.weight.data.t()


ALTER = [
    another_shape,
    another_parameter,
    other_memory,
    another_module,
    another_forward,
    a_bias,
    a_parametrization,
    another_class,
]


@pytest.mark.parametrize("alter", ALTER)
def test_a_layer_that_was_altered_runs_as_it_is(rig, alter) -> None:
    oracle, session, logits = begun(rig)
    alter(rig.served.model.layers[2].self_attn)
    wanted = oracle.greedy(logits, 2)
    assert equal(speak(session, logits, 2), wanted)
    assert not torch.equal(wanted[0], unaltered(rig, logits))


def unaltered(rig: Rig, logits: torch.Tensor) -> torch.Tensor:
    """What the stock model says, which was not altered."""
    oracle = Oracle(rig.stock)
    oracle.greedy(oracle.forward(prompt()), PROOFS)
    return oracle.forward(likely(logits))


class Sequence(nn.Sequential):
    """A place where modules may be added."""


def test_a_layer_that_is_trained_runs_its_own_code(rig, replays) -> None:
    oracle, session, logits = begun(rig)
    rig.served.model.layers[1].mlp.train()
    replays.clear()
    wanted = oracle.greedy(logits, 1)
    assert equal(speak(session, logits, 1), wanted)
    assert len(replays) == 2 * (LAYERS - 1)
    rig.served.eval()
    replays.clear()
    assert equal(speak(session, wanted[0], 1), oracle.greedy(wanted[0], 1))
    assert len(replays) == 2 * LAYERS


class Alike(nn.Module):
    """An activation that says it is equal to every other one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(hidden) * self.scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    __hash__ = nn.Module.__hash__


def test_another_module_is_seen_whatever_it_says_of_itself(rig) -> None:
    def scaled(scale: float) -> None:
        for layer in rig.served.model.layers:
            layer.mlp.act_fn = Alike(scale).eval()

    scaled(1.0)
    rig.use_graphs()
    oracle, session, logits = begun(rig)
    scaled(3.0)
    assert equal(speak(session, logits, 1), oracle.greedy(logits, 1))


def test_what_other_kinds_of_call_recorded_of_old_weights_is_let_go(rig) -> None:
    _, session, logits = begun(rig)
    other = rig.open(batch_size=2)
    speak(other, other.forward(prompt(2)), PROOFS + 1)
    assert rig.graphs.recorded == 2 * LAYERS
    another_parameter(rig.served.model.layers[1].self_attn)
    speak(session, logits, 1)
    assert rig.graphs.recorded == LAYERS + 1, "layer 1 and those behind it: anew for this kind, forgotten for the other"


def test_a_module_that_is_added_is_seen(rig) -> None:
    for layer in rig.served.model.layers:
        layer.mlp.act_fn = Sequence(nn.SiLU()).eval()
    rig.use_graphs()
    oracle, session, logits = begun(rig)
    rig.served.model.layers[1].mlp.act_fn.append(nn.Tanh().eval())
    assert equal(speak(session, logits, 2), oracle.greedy(logits, 2))


def test_who_wraps_a_layer_gets_tensors_of_his_own(rig) -> None:
    _, session, logits = begun(rig)
    layer, seen = rig.served.model.layers[1], []
    plain = layer.forward

    def wrapper(*args, **kwargs):
        seen.append(plain(*args, **kwargs))
        return seen[-1]

    layer.forward = wrapper
    speak(session, logits, 3)
    assert len({tensor.data_ptr() for tensor in seen}) == 3


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
)
def test_other_kernels_are_recorded_anew(rig, owner, name, value) -> None:
    oracle, session, logits = begun(rig)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        assert equal(speak(session, logits, 3), oracle.greedy(logits, 3))
    finally:
        setattr(owner, name, before)
    assert rig.graphs.recorded == 2 * LAYERS


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is nn.functional.silu else out


def test_a_mode_sees_every_operation(rig) -> None:
    oracle, session, logits = begun(rig)
    with Doubling():
        assert torch.equal(session.forward(likely(logits)), oracle.forward(likely(logits)))
    assert set(rig.graphs.refused) == {"it runs in torch's mode Doubling"}


def test_what_a_class_computes_may_change(rig, monkeypatch) -> None:
    oracle, session, logits = begun(rig)
    kind = type(rig.served.model.layers[0].mlp)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden: plain(self, hidden) * 2)
    assert equal(speak(session, logits, 2), oracle.greedy(logits, 2))


def test_autocast_is_left_to_the_models_own_code(rig, replays) -> None:
    oracle, session, logits = begun(rig)
    replays.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(session.forward(likely(logits)), oracle.forward(likely(logits)))
    assert not replays
    assert set(rig.graphs.refused) == {"it runs under autocast, which keeps casted weights for a while"}


def test_weights_that_move_with_every_token_are_not_recorded_for_ever(rig) -> None:
    oracle, session, logits = begun(rig)
    layer = rig.served.model.layers[1]
    weights = [layer.mlp.up_proj.weight.detach().clone() * scale for scale in (1.0, 2.0)]
    for token in range(8):
        layer.mlp.up_proj.weight.data = weights[token % 2]
        wanted = oracle.greedy(logits, 1)
        assert equal(speak(session, logits, 1), wanted)
        logits = wanted[0]
    assert rig.graphs.recorded == LAYERS - 1
    assert list(rig.graphs.refused.values()) == [1]


def test_weights_written_in_place_are_seen(rig, replays) -> None:
    oracle, session, logits = begun(rig)
    rig.served.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    replays.clear()
    assert equal(speak(session, logits, 2), oracle.greedy(logits, 2))
    assert len(replays) == 2 * LAYERS * 2
