"""Several layers in one launch: only where nothing happens between them, and only what was proven."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from djinn_core.device.hostgraph import HostChain
from djinn_core.errors import DeviceError
from djinn_core.models.graphs import FAULTS, PROOFS
from djinn_core.sessions.edits import Scale
from djinn_core.sessions.passes import Control
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, begun

PART = 2


@pytest.fixture
def rig(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr("djinn_core.models.graphs.PART", PART)
    return make_rig(graphs=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The length and the first layer of every launch from now on."""
    seen: list[tuple[int, int]] = []
    plain = HostChain.replay

    def replay(self, stream, key, step, changing, part):
        seen.append((key, part.start))
        return plain(self, stream, key, step, changing, part)

    monkeypatch.setattr(HostChain, "replay", replay)
    return seen


def test_a_token_takes_a_launch_for_each_part_at_its_length(rig, launches, replays) -> None:
    oracle, session, logits = begun(rig)
    launches.clear()
    replays.clear()
    length = session.length
    assert equal(speak(session, logits, 3), oracle.greedy(logits, 3))
    assert launches == [(length + token, first) for token in (1, 2, 3) for first in (0, PART)]
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
    assert launches == [(length, first) for length in (6, 7, 8, 7, 8, 9, 8, 9, 10) for first in (0, PART)]


@pytest.mark.parametrize("stop_after", range(1, LAYERS + 1))
def test_a_part_that_is_stopped_within_goes_layer_by_layer(rig, launches, stop_after) -> None:
    """Its layers are all that do, before the stop and behind."""
    oracle, session, logits = begun(rig)
    key = session.length + 1
    launches.clear()
    session.forward(likely(logits), stop_after=stop_after)
    before = [(key, first) for first in range(0, LAYERS, PART) if first + PART <= stop_after]
    assert launches == before
    assert torch.equal(session.resume(), oracle.forward(likely(logits)))
    assert launches == before + [(key, first) for first in range(0, LAYERS, PART) if first >= stop_after]


@pytest.mark.parametrize(("layer", "parts"), [(1, [PART]), (2, [0, PART]), (3, [0]), (4, [0, PART])])
def test_an_edit_between_two_layers_is_seen(rig, make_rig, launches, layer, parts) -> None:
    said = []
    for each in (rig, make_rig()):
        session = each.open()
        logits = speak(session, session.forward(prompt()), 2 * PROOFS)[-1]
        launches.clear()
        said.append(session.forward(likely(logits), edits={layer: [Scale(0.5)]}))
        if each is rig:
            assert [first for _, first in launches] == parts
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
    assert 0 not in [first for _, first in launches]  # layer 1 had not arrived by then
    launches.clear()
    rig.device.link_gbps = None
    session.wait_until("restored", 10)
    assert equal(speak(session, wanted[0], 1), wanted[1:])
    assert [first for _, first in launches] == [0, PART]


def test_other_parameters_are_recorded_and_proven_anew(rig, launches) -> None:
    oracle, session, logits = begun(rig)
    weight = rig.served.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data * 2
    launches.clear()
    wanted = oracle.greedy(logits, 4 * PROOFS)
    assert equal(speak(session, logits, 1), wanted[:1])
    assert [first for _, first in launches] == [0]  # the other part has another parameter
    assert equal(speak(session, wanted[0], 4 * PROOFS - 1), wanted[1:])
    assert rig.graphs.chained == 1
    assert [first for _, first in launches[-2:]] == [0, PART]


def test_a_decoder_that_hands_on_something_else_is_followed(rig, monkeypatch, launches, replays) -> None:
    """A part has been issued; what is behind the change is, once more, on what it is given."""
    oracle, session, logits = begun(rig)
    plain = Control.after_layer

    def after_layer(self: Control, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        hidden = plain(self, layer, hidden)
        return hidden * 2 if layer == PART else hidden

    with monkeypatch.context() as patched:
        patched.setattr(Control, "after_layer", after_layer)
        launches.clear()
        replays.clear()
        said = session.forward(likely(logits))
    assert len(launches) == 2 and len(replays) == 2 * (LAYERS + LAYERS - PART - 1)
    layer = rig.served.model.layers[PART]
    hook = layer.register_forward_hook(lambda _, __, out: out * 2)
    wanted = oracle.forward(likely(logits))
    hook.remove()
    assert torch.equal(said, wanted)
    assert equal(speak(session, said, 2), oracle.greedy(wanted, 2))


def test_a_chain_that_gives_something_else_is_not_used(rig, monkeypatch, caplog) -> None:
    plain = HostChain.replay

    def wrong(self, stream, key, step, changing, part):
        kind = plain(self, stream, key, step, changing, part)
        self._rows[part[-1]].behind._steps[-1][-1][-1].add_(1)
        return kind

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "together they give other values than one by one")


def test_a_chain_that_writes_other_keys_is_not_used(rig, monkeypatch, caplog) -> None:
    """Here no layer's output depends on its attention, so that nothing but the cache tells."""
    for layer in rig.served.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    rig.use_graphs()
    plain = HostChain.replay

    def wrong(self, stream, key, step, changing, part):
        kind = plain(self, stream, key, step, changing, part)
        changing[part[-1]][key - 1].add_(1)
        return kind

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "together they give other values than one by one")


def test_a_chain_that_fails_every_time_is_given_up(rig, monkeypatch, caplog) -> None:
    calls = []

    def failing(self, stream, key, step, changing, part):
        calls.append(key)
        raise DeviceError("no launch")

    monkeypatch.setattr(HostChain, "replay", failing)
    assert_goes_on_layer_by_layer(rig, caplog, "DeviceError: no launch", tokens=PROOFS + FAULTS)
    assert len(calls) == FAULTS


def assert_goes_on_layer_by_layer(rig: Rig, caplog: pytest.LogCaptureFixture, why: str, tokens: int = 8) -> None:
    oracle, session = Oracle(rig.served), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    with caplog.at_level(logging.WARNING, "djinn.graphs"):
        assert equal(speak(session, first, tokens), oracle.greedy(first, tokens))
    assert rig.graphs.recorded == LAYERS and rig.graphs.chained == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"layers go out one by one, each from its graphs: {why}"
    ]


def test_a_launch_that_fails_now_and_then_costs_that_pass(rig, monkeypatch) -> None:
    plain, calls = HostChain.replay, []

    def failing(self, stream, key, step, changing, part):
        calls.append(key)
        if len(calls) % FAULTS:
            raise DeviceError("another thread waited for the whole device")
        return plain(self, stream, key, step, changing, part)

    oracle, session, logits = begun(rig)
    monkeypatch.setattr(HostChain, "replay", failing)
    assert equal(speak(session, logits, 24), oracle.greedy(logits, 24))
    assert len(calls) == 24 * LAYERS // PART


def test_the_next_length_is_recorded_ahead_while_the_session_has_room(rig, monkeypatch) -> None:
    keys = []
    monkeypatch.setattr(HostChain, "record", lambda self, key, step, changing: keys.append(key))
    _, session, logits = begun(rig)
    keys.clear()
    length = session.length
    speak(session, logits, 48 - length)
    assert keys == list(range(length + 2, 49))


@pytest.mark.parametrize("error", [DeviceError("not now"), KeyboardInterrupt()])
def test_what_cannot_be_recorded_ahead_is_recorded_in_time(rig, monkeypatch, error) -> None:
    def failing(self, key, step, changing):
        raise error

    oracle, session, logits = begun(rig)
    monkeypatch.setattr(HostChain, "record", failing)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            speak(session, logits, 1)
        monkeypatch.undo()
    assert equal(speak(session, logits, 2), oracle.greedy(logits, 2))


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
