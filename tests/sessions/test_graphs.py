"""One-token passes from graphs: the logits of the stock model, and its own code wherever a graph would be wrong."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from djinn_core.device.base import Stream
from djinn_core.device.hostgraph import HostGraph
from djinn_core.models import graphs
from djinn_core.models.graphs import PROOFS
from djinn_core.models.recording import NotRecorded
from djinn_core.sessions.edits import Scale
from tests.sessions.oracle import Oracle, equal, left_padded, likely, prompt, speak
from tests.sessions.rigs import LAYERS, MakeRig, Rig, begun

TOKENS = 6


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig(graphs=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gqa", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_the_stock_models(make_rig, replays, family, dtype, batch) -> None:
    rig = make_rig(family=family, dtype=dtype, graphs=True)
    oracle, session = Oracle(rig.stock), rig.open(batch_size=batch)
    first = oracle.forward(prompt(batch))
    assert torch.equal(session.forward(prompt(batch)), first)
    assert rig.graphs.recorded == 0  # a prefill is no one-token pass
    wanted = oracle.greedy(first, TOKENS)
    assert equal(speak(session, first, PROOFS), wanted[:PROOFS])
    assert rig.graphs.recorded == LAYERS and not rig.graphs.refused
    replays.clear()
    assert equal(speak(session, wanted[PROOFS - 1], TOKENS - PROOFS), wanted[PROOFS:])
    chained = TOKENS - 2 * PROOFS
    assert rig.graphs.chained == 1 and chained > 0
    assert len(replays) == 2 * LAYERS * (chained + 2 * PROOFS)  # until that is proven, at once and one by one
    assert rig.executed == (1 + TOKENS,) * LAYERS  # each counted once, recorded or not


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(rig, mode) -> None:
    """Graphs that were recorded in one mode are used in the other."""
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    wanted = oracle.greedy(first, 4)
    with mode():
        said = [*speak(session, session.forward(prompt()), 2)]
    said += speak(session, said[-1], 1)
    with torch.inference_mode():
        said += speak(session, said[-1], 1)
    assert equal(said, wanted)


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_a_stop_keeps_its_boundary_beyond_the_next_pass(rig, layer) -> None:
    """What a layer returns is overwritten when the layer runs again, for whatever session."""
    oracle, session, other = Oracle(rig.stock), rig.open(), rig.open()
    first = oracle.forward(prompt())
    wanted = oracle.greedy(first, 3)
    session.forward(prompt())
    said = speak(session, first, 1)
    speak(other, other.forward(prompt(seed=5)), 1)
    rig.device.link_gbps = 1e-6  # while the boundary's copy is on its way to the host, a resume takes the tensor itself
    stopped = session.forward(likely(said[0]), stop_after=layer)
    speak(other, first, 2)
    said.append(session.resume())
    rig.device.link_gbps = None
    assert equal(said, wanted[:2])
    speak(other, other.forward(prompt(seed=6)), 1)
    assert torch.equal(session.resume(stopped), wanted[1])
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    assert equal(speak(session, wanted[1], 1), wanted[2:])


def test_an_edit_between_two_layers_is_seen(rig, make_rig) -> None:
    said = []
    for each in (rig, make_rig()):
        session = each.open()
        logits = speak(session, session.forward(prompt()), 2)[-1]
        session.forward(likely(logits), stop_after=2)
        edited = session.resume(edits=[Scale(0.5)])
        said.append([edited, session.forward(likely(logits))])
    assert equal(*said)
    assert not torch.equal(said[0][0], said[0][1])
    assert rig.graphs.recorded == LAYERS


def test_sessions_take_turns(rig) -> None:
    seeds = (1, 2, 3)
    oracles = [Oracle(rig.stock) for _ in seeds]
    sessions = [rig.open() for _ in seeds]
    logits = [oracle.forward(prompt(tokens=4 + seed, seed=seed)) for oracle, seed in zip(oracles, seeds, strict=True)]
    for session, seed in zip(sessions, seeds, strict=True):
        session.forward(prompt(tokens=4 + seed, seed=seed))
    for _ in range(3):
        wanted = [oracle.forward(likely(each)) for oracle, each in zip(oracles, logits, strict=True)]
        said = [session.forward(likely(each)) for session, each in zip(sessions, logits, strict=True)]
        assert equal(said, wanted)
        logits = wanted
    assert rig.graphs.recorded == LAYERS


def test_a_scale_that_depends_on_the_length_is_noticed(rig) -> None:
    """Two proofs, at two lengths: what Python works out from the length is taken as it was when it was recorded."""

    def by_length(module, query, key, value, mask, **_):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=1 / key.shape[2]
        )
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("by_length", by_length)
    rig.served.config._attn_implementation = "by_length"
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    assert equal(speak(session, first, 5), oracle.greedy(oracle.forward(prompt()), 5))
    assert set(rig.graphs.refused) == {"its graphs give other values than its own code"}


class Asks(nn.Module):
    """An activation that asks the device for a value, which cannot be recorded."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(hidden) * (2 if float(hidden.sum()) > 0 else 1)


def test_a_layer_that_asks_for_a_value_is_not_recorded(rig) -> None:
    rig.served.model.layers[1].mlp.act_fn = Asks().eval()
    rig.use_graphs()
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    assert equal(speak(session, first, 6), oracle.greedy(oracle.forward(prompt()), 6))
    assert rig.graphs.recorded == LAYERS - 1
    assert any("needs a value from the device" in why for why in rig.graphs.refused)
    assert set(rig.graphs.refused.values()) == {1}


def test_graphs_that_fail_are_not_used(rig, monkeypatch) -> None:
    plain, calls = HostGraph.replay, []

    def failing(self: HostGraph, stream: Stream) -> None:
        calls.append(self)
        if len(calls) == 3:  # the second graph of layer 0, in its first proof
            raise RuntimeError("launch failed")
        plain(self, stream)

    monkeypatch.setattr(HostGraph, "replay", failing)
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    assert equal(speak(session, first, 4), oracle.greedy(first, 4))
    assert rig.graphs.recorded == LAYERS - 1
    assert rig.graphs.refused == {"RuntimeError: launch failed": 0}


def test_a_layer_that_changes_its_input_is_run_once_on_it(rig) -> None:
    for layer in rig.served.model.layers:
        norm, plain = layer.input_layernorm, layer.input_layernorm.forward
        norm.register_buffer("scale", torch.tensor(1.5))

        class InPlace(type(norm)):
            def forward(self, hidden, plain=plain):
                return plain(hidden.mul_(self.scale))

        norm.__class__ = InPlace
    rig.use_graphs()
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    said, wanted = speak(session, first, 5), oracle.greedy(oracle.forward(prompt()), 5)
    assert equal(said, wanted)
    weight = rig.served.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data * 2  # now it is recorded again, behind a layer that hands over what its graphs wrote
    assert equal(speak(session, said[-1], 3), oracle.greedy(wanted[-1], 3))


def test_one_strange_value_does_not_end_it(rig) -> None:
    """NaN equals NaN."""
    other = rig.open()
    other.forward(prompt())
    weight = rig.served.model.layers[0].mlp.down_proj.weight
    before = weight[0, 0].item()
    weight[0, 0] = torch.nan
    rig.use_graphs()
    speak(other, torch.zeros(1, 128), 3)
    weight[0, 0] = before
    assert rig.graphs.recorded == LAYERS and not rig.graphs.refused


def test_a_mask_is_left_to_the_models_own_code(rig, replays) -> None:
    """And takes none of the places of what can be recorded."""
    oracle, session = Oracle(rig.stock), rig.open(batch_size=3)
    mask = left_padded(3, 12)
    first = oracle.forward(prompt(3), mask)
    assert torch.equal(session.forward(prompt(3), mask), first)
    assert equal(speak(session, first, 10), oracle.greedy(first, 10))
    assert list(rig.graphs.refused) == ["it is given a tensor of 4 dimensions on cpu, such as a mask"]  # told once
    assert not replays
    begun(rig)


def test_a_sliding_window_is_left_to_the_models_own_code(make_rig) -> None:
    rig = make_rig(family="mistral", graphs=True)
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    assert equal(speak(session, first, TOKENS), oracle.greedy(first, TOKENS))
    assert rig.graphs.recorded == 0 and rig.graphs.refused


def test_no_more_kinds_of_call_are_recorded_than_are_kept(rig, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "KINDS", 2)
    for batch in (1, 2, 3):
        oracle, session = Oracle(rig.stock), rig.open(batch_size=batch)
        first = oracle.forward(prompt(batch))
        session.forward(prompt(batch))
        assert equal(speak(session, first, 4), oracle.greedy(first, 4))
        session.close()
    assert rig.graphs.recorded == 2 * LAYERS
    assert set(rig.graphs.refused) == {"it is called in more than 2 ways, by shapes and settings"}


def test_graphs_that_say_something_else_are_not_used(rig, monkeypatch) -> None:
    plain = HostGraph.replay

    def wrong(self: HostGraph, stream: Stream) -> None:
        plain(self, stream)
        self._steps[-1][-1][-1].add_(1)

    monkeypatch.setattr(HostGraph, "replay", wrong)
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    assert equal(speak(session, first, 3), oracle.greedy(first, 3))
    assert rig.graphs.recorded == 0
    assert set(rig.graphs.refused) == {"its graphs give other values than its own code"}


def test_graphs_that_write_other_keys_are_not_used(rig, monkeypatch) -> None:
    """Here no layer's output depends on its attention, so that nothing but the cache tells."""
    for layer in rig.served.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    plain = HostGraph.replay

    def wrong(self: HostGraph, stream: Stream) -> None:
        plain(self, stream)
        last = self._steps[-1][-1][-1]
        if last.dim() == 4:  # K with its positions ends the first graph
            last.add_(1)

    monkeypatch.setattr(HostGraph, "replay", wrong)
    oracle, session = Oracle(rig.served), rig.open()
    first = session.forward(prompt())
    said = speak(session, first, 3)
    assert equal(said, oracle.greedy(oracle.forward(prompt()), 3))
    assert set(rig.graphs.refused) == {"its graphs give other values than its own code"}


@pytest.mark.parametrize("error", [RuntimeError("no room"), NotRecorded("no room"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", range(1, 3))
def test_a_recording_that_fails_leaves_nothing_open(rig, monkeypatch, error, place) -> None:
    """The layer's own code has run by then, and the next pass finds torch as it was."""
    plain, ends = HostGraph.end, []

    def end(self: HostGraph) -> None:
        ends.append(self)
        if len(ends) == place:
            plain(self)
            raise error
        plain(self)

    monkeypatch.setattr(HostGraph, "end", end)
    oracle, session = Oracle(rig.stock), rig.open()
    first = oracle.forward(prompt())
    session.forward(prompt())
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            speak(session, first, 1)
        assert torch.ones(1).add(1).item() == 2
    assert equal(speak(session, first, 3), oracle.greedy(first, 3))
    again = isinstance(error, NotRecorded)  # anything else may go better the next time
    assert rig.graphs.recorded == LAYERS - again
    assert [why.removeprefix("RuntimeError: ") for why in rig.graphs.refused] == (
        [] if isinstance(error, KeyboardInterrupt) else ["no room"]
    )


def test_a_closed_session_is_not_kept(rig) -> None:
    _, session, _ = begun(rig)
    cache = weakref.ref(session._cache)
    session.close()
    del session
    gc.collect()
    assert cache() is None


def test_streamed_layers_are_not_recorded() -> None:
    import djinn_core as djinn

    said = {}
    for wanted in (False, True):
        model = djinn.load(
            "tiny-llama", device="cpu", budget_bytes=4 << 20, resident_layers=2, graphs=wanted, prove=False
        )
        with djinn.open_session(model, max_length=48) as session:
            said[wanted] = speak(session, session.forward(prompt()), 3)
        if wanted:
            assert model.djinn.graphs.recorded == len(model.djinn.plan.resident) == 2
        model.djinn.runtime.close()
    assert equal(*said.values())
