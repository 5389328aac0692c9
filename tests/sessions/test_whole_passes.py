"""One-token passes in one launch: only where nothing happens between layers, and only what was proven."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from djinn_core.device.hostgraph import HostChain
from djinn_core.errors import DeviceError
from djinn_core.models.graphs import PROOFS, TRIES
from djinn_core.sessions.edits import Scale
from djinn_core.sessions.passes import Control
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, begun


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig(graphs=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The key of every whole pass from now on."""
    seen: list[object] = []
    plain = HostChain.replay

    def replay(self, stream, key, step, changing):
        seen.append(key)
        return plain(self, stream, key, step, changing)

    monkeypatch.setattr(HostChain, "replay", replay)
    return seen


def test_each_token_is_one_launch_at_its_length(rig, launches, replays) -> None:
    oracle, session, logits = begun(rig)
    launches.clear()
    replays.clear()
    length = session.length
    assert equal(speak(session, logits, 3), oracle.greedy(logits, 3))
    assert launches == [length + 1, length + 2, length + 3]
    assert len(replays) == 3 * 2 * LAYERS


def test_sessions_take_turns_at_other_lengths(rig, launches) -> None:
    begun(rig)[1].close()
    launches.clear()
    seeds = (1, 2, 3)
    oracles, sessions = [Oracle(rig.served) for _ in seeds], [rig.open(max_length=40 + seed) for seed in seeds]
    logits = [oracle.forward(prompt(tokens=4 + seed, seed=seed)) for oracle, seed in zip(oracles, seeds, strict=True)]
    for session, seed in zip(sessions, seeds, strict=True):
        session.forward(prompt(tokens=4 + seed, seed=seed))
    for _ in range(3):
        wanted = [oracle.forward(likely(each)) for oracle, each in zip(oracles, logits, strict=True)]
        assert equal([session.forward(likely(each)) for session, each in zip(sessions, logits, strict=True)], wanted)
        logits = wanted
    assert launches == [6, 7, 8, 7, 8, 9, 8, 9, 10]


@pytest.mark.parametrize("stop_after", range(1, LAYERS + 1))
def test_a_pass_that_stops_goes_layer_by_layer(rig, launches, stop_after) -> None:
    oracle, session, logits = begun(rig)
    launches.clear()
    session.forward(likely(logits), stop_after=stop_after)
    assert torch.equal(session.resume(), oracle.forward(likely(logits)))
    assert not launches


def test_an_edit_between_two_layers_is_seen(rig, make_rig, launches) -> None:
    said = []
    for each in (rig, make_rig()):
        session = each.open()
        logits = speak(session, session.forward(prompt()), 2 * PROOFS)[-1]
        launches.clear()
        said.append(session.forward(likely(logits), edits={2: [Scale(0.5)]}))
        assert not launches
    assert equal(*said)


def test_a_pass_whose_layers_are_still_coming_does_not_wait_for_the_last(rig, launches) -> None:
    oracle, session, logits = begun(rig)
    session.pause(release=True)
    session.wait_until("released", 10)
    launches.clear()
    rig.device.link_gbps = 1e-3
    wanted = oracle.greedy(logits, 2)
    session.resume()
    assert equal(speak(session, logits, 1), wanted[:1])
    assert not launches
    rig.device.link_gbps = None
    session.wait_until("restored", 10)
    assert equal(speak(session, wanted[0], 1), wanted[1:])
    assert len(launches) == 1


def test_other_parameters_are_recorded_and_proven_anew(rig, launches) -> None:
    oracle, session, logits = begun(rig)
    weight = rig.served.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data * 2
    launches.clear()
    wanted = oracle.greedy(logits, 4 * PROOFS)
    assert equal(speak(session, logits, 1), wanted[:1])
    assert not launches
    assert equal(speak(session, wanted[0], 4 * PROOFS - 1), wanted[1:])
    assert launches and rig.graphs.whole == 1


def test_a_decoder_that_hands_on_something_else_is_followed(rig, monkeypatch, launches, replays) -> None:
    """All layers have been issued; those behind the change are, once more, on what they are given."""
    oracle, session, logits = begun(rig)
    plain = Control.after_layer

    def after_layer(self: Control, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        hidden = plain(self, layer, hidden)
        return hidden * 2 if layer == 1 else hidden

    with monkeypatch.context() as patched:
        patched.setattr(Control, "after_layer", after_layer)
        launches.clear()
        replays.clear()
        said = session.forward(likely(logits))
    assert len(launches) == 1 and len(replays) == 2 * (LAYERS + LAYERS - 2)
    layer = rig.served.model.layers[1]
    hook = layer.register_forward_hook(lambda _, __, out: out * 2)
    wanted = oracle.forward(likely(logits))
    hook.remove()
    assert torch.equal(said, wanted)
    assert equal(speak(session, said, 2), oracle.greedy(wanted, 2))


def test_a_chain_that_gives_something_else_is_not_used(rig, monkeypatch, caplog) -> None:
    plain = HostChain.replay

    def wrong(self, stream, key, step, changing):
        kind = plain(self, stream, key, step, changing)
        self._rows[1].behind._steps[-1][-1][-1].add_(1)
        return kind

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "it gives other values than the layers one by one")


def test_a_chain_that_writes_other_keys_is_not_used(rig, monkeypatch, caplog) -> None:
    """Here no layer's output depends on its attention, so that nothing but the cache tells."""
    for layer in rig.served.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    rig.use_graphs()
    plain = HostChain.replay

    def wrong(self, stream, key, step, changing):
        kind = plain(self, stream, key, step, changing)
        changing[-1][key - 1].add_(1)
        return kind

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "it gives other values than the layers one by one")


def test_a_chain_that_fails_every_time_is_given_up(rig, monkeypatch, caplog) -> None:
    calls = []

    def failing(self, stream, key, step, changing):
        calls.append(key)
        raise DeviceError("no launch")

    monkeypatch.setattr(HostChain, "replay", failing)
    assert_goes_on_layer_by_layer(rig, caplog, "DeviceError: no launch", tokens=PROOFS + TRIES + 2)
    assert len(calls) == TRIES


def assert_goes_on_layer_by_layer(rig: Rig, caplog: pytest.LogCaptureFixture, why: str, tokens: int = 8) -> None:
    oracle, session = Oracle(rig.served), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    with caplog.at_level(logging.WARNING, "djinn.graphs"):
        assert equal(speak(session, first, tokens), oracle.greedy(first, tokens))
    assert rig.graphs.recorded == LAYERS and rig.graphs.whole == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"passes go out layer by layer, each from its graphs: {why}"
    ]


def test_a_launch_that_fails_now_and_then_costs_that_pass(rig, monkeypatch) -> None:
    plain, calls = HostChain.replay, []

    def failing(self, stream, key, step, changing):
        calls.append(key)
        if len(calls) % TRIES:
            raise DeviceError("another thread waited for the whole device")
        return plain(self, stream, key, step, changing)

    oracle, session, logits = begun(rig)
    monkeypatch.setattr(HostChain, "replay", failing)
    assert equal(speak(session, logits, 3 * TRIES), oracle.greedy(logits, 3 * TRIES))
    assert len(calls) == 3 * TRIES


def test_layers_that_attend_in_different_ways_go_one_by_one(rig, caplog) -> None:
    rig.served.model.layers[1].self_attn.scaling = 0.5
    rig.use_graphs()
    assert_goes_on_layer_by_layer(rig, caplog, "NotRecorded: its layers call attention in different ways")


def test_a_switch_of_attention_is_noticed(rig, launches) -> None:
    """What a step consists of was recorded under torch's settings of then."""
    oracle, session, logits = begun(rig)
    launches.clear()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert equal(speak(session, logits, 1), oracle.greedy(logits, 1))
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert not launches


class InPlace(nn.Module):
    """A norm that changes what the layer before has returned."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.mul_(self.scale))


def test_layers_that_change_their_input_give_what_they_gave(rig) -> None:
    for layer in rig.served.model.layers:
        layer.input_layernorm = InPlace(layer.input_layernorm)
    rig.use_graphs()
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    assert equal(speak(session, first, 8), oracle.greedy(oracle.forward(prompt()), 8))
