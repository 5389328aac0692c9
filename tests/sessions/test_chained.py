"""Several layers in one launch: only where nothing happens between them, and only what was proven."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from djinn_core.device.hostgraph import HostChain
from djinn_core.errors import DeviceError
from djinn_core.models import graphs
from djinn_core.models.graphs import PROOFS
from djinn_core.sessions.edits import Scale
from djinn_core.sessions.passes import Control
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, begun

PART, FAULTS = 2, 6
OTHERS = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION


@pytest.fixture
def rig(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr("djinn_core.models.graphs.PART", PART)
    monkeypatch.setattr("djinn_core.models.graphs.FAULTS", FAULTS)
    return make_rig(graphs=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every launch from now on, the length that its pass began at, and its first layer."""
    seen: list[tuple[int, int]] = []
    plain = HostChain.replay

    def replay(self, stream, key, step, changing, part):
        seen.append((key, part.start))
        plain(self, stream, key, step, changing, part)

    monkeypatch.setattr(HostChain, "replay", replay)
    return seen


def test_a_token_takes_a_launch_for_each_part_at_its_length(rig, launches, replays) -> None:
    oracle, session, logits = begun(rig)
    launches.clear()
    replays.clear()
    length = session.length
    assert equal(speak(session, logits, 3), oracle.greedy(logits, 3))
    assert launches == [(length + token, first) for token in range(3) for first in (0, PART)]
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
    assert launches == [(length, first) for length in (5, 6, 7, 6, 7, 8, 7, 8, 9) for first in (0, PART)]


@pytest.mark.parametrize("stop_after", range(1, LAYERS + 1))
def test_a_part_that_is_stopped_within_goes_layer_by_layer(rig, launches, stop_after) -> None:
    """Its layers are all that do, before the stop and behind."""
    oracle, session, logits = begun(rig)
    key = session.length
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
        plain(self, stream, key, step, changing, part)
        self._rows[part[-1]].behind._steps[-1][-1][-1].add_(1)

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "together they give other values than one by one")


def test_a_chain_that_writes_other_keys_is_not_used(rig, monkeypatch, caplog) -> None:
    """Here no layer's output depends on its attention, so that nothing but the cache tells."""
    for layer in rig.served.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    rig.use_graphs()
    plain = HostChain.replay

    def wrong(self, stream, key, step, changing, part):
        plain(self, stream, key, step, changing, part)
        changing[-1][key].add_(1)

    monkeypatch.setattr(HostChain, "replay", wrong)
    assert_goes_on_layer_by_layer(rig, caplog, "together they give other values than one by one")


def test_a_chain_that_fails_every_time_is_given_up(rig, monkeypatch, caplog) -> None:
    calls = []

    def failing(self, stream, key, step, changing, part):
        calls.append(key)
        raise DeviceError("no launch")

    monkeypatch.setattr(HostChain, "replay", failing)
    assert_goes_on_layer_by_layer(rig, caplog, "DeviceError: no launch", tokens=PROOFS + FAULTS)
    assert len(calls) == FAULTS * LAYERS // PART


def assert_goes_on_layer_by_layer(rig: Rig, caplog: pytest.LogCaptureFixture, why: str, tokens: int = 8) -> None:
    oracle, session = Oracle(rig.served), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    with caplog.at_level(logging.WARNING, "djinn.graphs"):
        assert equal(speak(session, first, tokens), oracle.greedy(first, tokens))
    assert rig.graphs.recorded == LAYERS and rig.graphs.chained == 0
    assert rig.graphs.unchained == {why: 0}
    assert [record.getMessage() for record in caplog.records] == [
        f"from layer 0 on layers go out one by one, each from its graphs: {why}"
    ]


def test_a_launch_that_fails_now_and_then_costs_that_pass(rig, monkeypatch) -> None:
    plain, calls = HostChain.replay, []

    def failing(self, stream, key, step, changing, part):
        calls.append(key)
        if len(calls) % 5:  # each part goes out now and then
            raise DeviceError("another thread waited for the whole device")
        plain(self, stream, key, step, changing, part)

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
    parts = LAYERS // PART
    assert keys == [key for now in range(length, 48) for key in (*[now] * parts, now + 1)][:-1]


def test_a_layers_cache_is_written_where_the_recorded_pass_will(rig) -> None:
    _, session, _ = begun(rig)
    layer = session._cache.layers[0]
    new = torch.full((1, 4, 16), 3.0), torch.full((1, 4, 16), 5.0)
    session._cache.begin(7)
    keys, values = layer.append(new, 2)
    session._cache.end()
    assert keys.shape[2] == values.shape[2] == 10
    assert torch.equal(keys[:, :, 9], new[0]) and torch.equal(values[:, :, 9], new[1])


@pytest.mark.parametrize("error", [DeviceError("not now"), KeyboardInterrupt()])
def test_what_cannot_be_recorded_ahead_is_recorded_in_time(rig, monkeypatch, error) -> None:
    plain, keys = HostChain.record, []

    def failing(self, key, step, changing):
        if not keys or key > keys[-1]:  # another length than the pass's
            keys.append(key)
            if len(keys) > 1:
                raise error
        return plain(self, key, step, changing)

    oracle, session, logits = begun(rig)
    monkeypatch.setattr(HostChain, "record", failing)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            speak(session, logits, 1)
        monkeypatch.undo()
    wanted = oracle.greedy(logits, 2)
    assert equal(speak(session, logits, 1), wanted[:1])
    assert equal(speak(session, wanted[0], 1), wanted[1:])


def test_layers_that_attend_in_different_ways_go_one_by_one(rig, caplog) -> None:
    rig.served.model.layers[1].self_attn.scaling = 0.5
    rig.use_graphs()
    assert_goes_on_layer_by_layer(rig, caplog, "its layers call attention in different ways")


@contextmanager
def reduced_math() -> Iterator[None]:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not before)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
        lambda: sdpa_kernel([SDPBackend.MATH, *OTHERS], set_priority=True),
        lambda: torch.backends.cudnn.flags(enabled=False),
        lambda: reduced_math(),
    ],
)
def test_a_switch_of_attention_is_noticed(rig, launches, settings) -> None:
    """What a step consists of was recorded under torch's settings of then."""
    oracle, session, logits = begun(rig)
    launches.clear()
    with settings():
        assert equal(speak(session, logits, 1), oracle.greedy(logits, 1))
    assert not launches


class InPlace(nn.Module):
    """A norm that changes what the layer before has returned."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.mul_(self.scale))


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("changed", [(0,), (1,), (PART,), (PART + 1,), tuple(range(LAYERS))])
def test_layers_that_change_their_input_go_one_by_one(rig, launches, changed, scale) -> None:
    """Also where the change is none, as yet."""
    for index in changed:
        layer = rig.served.model.layers[index]
        layer.input_layernorm = InPlace(layer.input_layernorm)
        layer.input_layernorm.scale.fill_(scale)
    rig.served.eval()
    rig.use_graphs()
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    said, wanted = speak(session, first, 6), oracle.greedy(oracle.forward(prompt()), 6)
    assert equal(said, wanted)
    for index in changed:
        rig.served.model.layers[index].input_layernorm.scale.fill_(2.0)
    assert equal(speak(session, said[-1], 4), oracle.greedy(wanted[-1], 4))
    assert rig.graphs.recorded == LAYERS and not rig.graphs.refused and not launches
    assert rig.graphs.unchained == {"a layer writes into what the one before has returned": 0}


def test_a_window_is_left_to_the_layers_one_by_one(make_rig, monkeypatch, launches) -> None:
    """Where it begins changes with every token, and the length does not."""
    from transformers.masking_utils import create_causal_mask
    from transformers.models.mistral import modeling_mistral

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", create_causal_mask)
    rig = make_rig(family="mistral", graphs=True)
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    assert equal(speak(session, first, 12), oracle.greedy(first, 12))
    assert rig.graphs.recorded == LAYERS and not launches


def test_arguments_of_each_layers_own_end_it(rig, monkeypatch, caplog, replays) -> None:
    """Equal in value, which the proofs find; but that is not known before they are there."""
    plain = graphs.LayerGraphs.run

    def run(self, index, original, args, kwargs, *rest):
        own = {name: tuple(map(torch.clone, each)) if type(each) is tuple else each for name, each in kwargs.items()}
        return plain(self, index, original, args, own, *rest)

    monkeypatch.setattr(graphs.LayerGraphs, "run", run)
    oracle, session = Oracle(rig.served), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    with caplog.at_level(logging.WARNING, "djinn.graphs"):
        said = speak(session, first, 12)
    replays.clear()
    assert equal([*said, *speak(session, said[-1], 1)], oracle.greedy(first, 13))
    assert len(replays) == 2 * LAYERS
    assert rig.graphs.unchained == {"the decoder does something else between them": 0} and len(caplog.records) == 1


def test_a_part_that_never_comes_to_its_end_is_given_up_alone(rig, monkeypatch, replays, launches) -> None:
    """The decoder hands on a copy behind one layer: equal, so that the proofs do not see it."""
    plain = Control.after_layer

    def after_layer(self: Control, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        hidden = plain(self, layer, hidden)
        return hidden.clone() if layer == PART else hidden

    monkeypatch.setattr(Control, "after_layer", after_layer)
    oracle, session, logits = begun(rig)
    said = speak(session, logits, FAULTS)
    launches.clear()
    replays.clear()
    assert equal([*said, *speak(session, said[-1], 2)], oracle.greedy(logits, FAULTS + 2))
    assert [first for _, first in launches] == [0, 0] and len(replays) == 2 * 2 * LAYERS
    assert rig.graphs.unchained == {"the decoder does something else between them": PART}


def test_other_kernels_behind_the_same_name_are_noticed(rig, monkeypatch, launches) -> None:
    """As after `torch.nn.attention.activate_flash_attention_impl`."""
    oracle, session, logits = begun(rig)
    monkeypatch.setattr(graphs, "_flash_kind", lambda: "FA9")
    launches.clear()
    assert equal(speak(session, logits, 1), oracle.greedy(logits, 1))
    assert not launches


@pytest.mark.parametrize("replaced", [(0,), (1, 2), (0, 1, 2, 3), (1,) * 5])
def test_layers_are_chained_again_soon_after_parameters_were_replaced(rig, launches, replaced) -> None:
    """Once or again and again, and none of them loses its graphs because its neighbours were recorded again."""
    oracle, session, logits = begun(rig)
    for index in replaced:
        weight = rig.served.model.layers[index].mlp.up_proj.weight
        weight.data = weight.data * 2
        wanted = oracle.greedy(logits, 2 * PROOFS + 1)
        assert equal(speak(session, logits, 2 * PROOFS + 1), wanted)
        assert launches[-1] == (session.length - 1, PART)
        logits = wanted[-1]
    assert rig.graphs.recorded == LAYERS and rig.graphs.chained == 1 and not rig.graphs.refused


def test_layers_that_were_recorded_behind_nothing_are_recorded_again(rig, launches) -> None:
    """The first that graphs see is the end of a pass; what its layers read is not what the ones before will write."""
    oracle, session = Oracle(rig.served), rig.open()
    logits = oracle.forward(prompt())
    session.forward(prompt())
    session.forward(likely(logits), stop_after=PART)
    rig.use_graphs()
    wanted = oracle.greedy(logits, 6 * PROOFS)
    assert torch.equal(session.resume(), wanted[0])
    assert equal(speak(session, wanted[0], 6 * PROOFS - 1), wanted[1:])
    assert rig.graphs.chained == 1 and launches[-1] == (session.length - 1, PART)


def test_where_one_layer_has_no_graphs_nobody_tries_to_chain_them(rig, caplog, launches) -> None:
    rig.served.model.layers[1].self_attn.config = copy.deepcopy(rig.served.config)
    rig.served.model.layers[1].self_attn.config._attn_implementation = "eager"
    oracle, session = Oracle(rig.served), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    with caplog.at_level(logging.WARNING, "djinn.graphs"):
        assert equal(speak(session, first, 6), oracle.greedy(first, 6))
    assert rig.graphs.recorded == LAYERS - 1 and not launches
    assert rig.graphs.unchained == {"not all of them have graphs": 0} and len(caplog.records) == 2


def test_layers_that_all_move_with_every_token_are_given_up_together(rig, monkeypatch) -> None:
    """And not one after the other, each recorded again for the sake of all before."""
    records, plain = [], graphs.LayerGraphs._record
    monkeypatch.setattr(
        graphs.LayerGraphs, "_record", lambda self, *given: records.append(given[0]) or plain(self, *given)
    )
    oracle, session, logits = begun(rig)
    records.clear()
    for _ in range(8):
        for layer in rig.served.model.layers:
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()
        wanted = oracle.greedy(logits, 1)
        assert equal(speak(session, logits, 1), wanted)
        logits = wanted[0]
    assert len(records) == graphs.TRIES * LAYERS and rig.graphs.recorded == 0


def test_closing_lets_go_of_the_layers(rig) -> None:
    _, session, _ = begun(rig)
    watched = weakref.ref(rig.graphs._parts[0][1])
    session.close()
    rig.graphs.close()
    gc.collect()
    assert watched() is None


class Job:
    """What a bring-in has issued, and what of it has arrived."""

    def __init__(self, issued: bytes, arrived: tuple[bool | None, ...]) -> None:
        self.issued = bytearray(issued)
        self.arrival = [None if each is None else SimpleNamespace(query=lambda each=each: each) for each in arrived]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [True, True]),
        ({"jobs": [Job(b"\1\1\1\1", (True, None, False, None))]}, [True, False]),
        ({"jobs": [Job(b"\1\1\1\0", (None,) * 4)]}, [True, False]),
        ({"jobs": [Job(b"\0\1\1\1", (None,) * 4), Job(b"\1\1\1\1", (True,) * 4)]}, [False, True]),
        ({"edits": {1: [Scale(2)]}}, [False, True]),
        ({"edits": {2: [Scale(2)], 4: [Scale(2)]}}, [True, True]),
        ({"stop": 2}, [True, True]),
        ({"stop": 3}, [True, False]),
        ({"behind": object()}, [False, False]),
    ],
)
def test_a_part_is_undisturbed_when_nothing_happens_within(given, wanted) -> None:
    control = Control(
        *(0, given.get("stop"), given.get("jobs", ()), None, None),
        enter=None,
        edits=given.get("edits", {}),
        keep=None,
        layers=4,
        behind=given.get("behind"),
    )
    assert [control.undisturbed(first, first + 2) for first in (0, 2)] == wanted
