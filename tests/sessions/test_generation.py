"""Generation by passes equals `model.generate`, sampled too, stopped and resumed too."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config

import djinn_core as djinn
from djinn_core.errors import BreakpointError, ConfigError, SessionStateError
from djinn_core.sessions import Breakpoint, Sampling
from tests.sessions.oracle import left_padded, prompt
from tests.sessions.rigs import MakeRig, Rig

COUNT = 10


def stock(rig: Rig, ids: torch.Tensor, mask: torch.Tensor | None = None, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    out = rig.stock.generate(ids, attention_mask=mask, max_new_tokens=COUNT, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(make_rig: MakeRig, family, batch) -> None:
    rig = make_rig(family)
    ids, mask = prompt(batch), left_padded(batch, 12)
    session = rig.open(batch_size=batch)
    session.forward(ids, mask)
    wanted = stock(rig, ids, mask, do_sample=False, eos_token_id=None)
    new = session.generate(4, sampling=Sampling(eos_token_id=()))
    new = torch.cat([new, session.generate(COUNT - 4, sampling=Sampling(eos_token_id=()))], dim=1)
    assert torch.equal(new, wanted)


def test_what_was_chosen_before_an_error_is_not_lost(rig: Rig) -> None:
    session, ids = rig.open(), prompt()
    assert session.ids.shape == (1, 0)
    session.forward(ids)
    passes = []

    def fail(*_: object) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise RuntimeError("in the fourth pass")

    hook = rig.served.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fourth"):
        session.generate(COUNT, sampling=Sampling(eos_token_id=()))
    hook.remove()
    wanted = stock(rig, ids, do_sample=False, eos_token_id=None)
    assert torch.equal(session.ids, torch.cat([ids, wanted[:, :4]], dim=1))
    session.generate(COUNT - 4, sampling=Sampling(eos_token_id=()))
    assert torch.equal(session.ids, torch.cat([ids, wanted], dim=1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3, "top_p": 0.8},
    ],
)
def test_sampled_with_a_seed(rig: Rig, options) -> None:
    ids = prompt()
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    wanted = stock(rig, ids, seed=11, do_sample=True, eos_token_id=None, **given)
    session = rig.open()
    session.forward(ids)
    before = torch.get_rng_state()
    first = session.generate(5, sampling=Sampling(do_sample=True, seed=11, eos_token_id=(), **options))
    session.pause(release=True)
    session.resume()
    rest = session.generate(COUNT - 5, sampling=Sampling(do_sample=True, eos_token_id=(), **options))
    assert torch.equal(torch.cat([first, rest], dim=1), wanted)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_remembers_the_random_stream(rig: Rig) -> None:
    draw = Sampling(do_sample=True, eos_token_id=())
    session = rig.open()
    session.forward(prompt())
    session.generate(3, stop_at=Breakpoint(2, 2), sampling=Sampling(do_sample=True, seed=3, eos_token_id=()))
    point = session.stopped
    session.resume()
    once = session.generate(5, sampling=draw)
    branch = session.fork()
    session.resume(point)
    assert torch.equal(session.generate(5, sampling=draw), once)
    branch.resume(point)
    assert torch.equal(branch.generate(5, sampling=draw), once)


def test_sequences_that_end(rig: Rig) -> None:
    ids = prompt(3)
    free = stock(rig, ids, do_sample=False, eos_token_id=None)
    ends = int(free[0, 3])
    wanted = stock(rig, ids, do_sample=False, eos_token_id=ends)
    session = rig.open(batch_size=3)
    session.forward(ids)
    sampling = Sampling(eos_token_id=ends, pad_token_id=0)
    new = torch.cat([session.generate(5, sampling=sampling), session.generate(COUNT - 5, sampling=sampling)], dim=1)
    assert torch.equal(new, wanted[:, : new.shape[1]]) and (wanted[:, new.shape[1] :] == 0).all()


def test_a_minimum_length_and_a_breakpoint_that_cannot_fire(rig: Rig) -> None:
    ids = prompt()
    ends = int(stock(rig, ids, do_sample=False, eos_token_id=None)[0, 1])
    wanted = stock(rig, ids, do_sample=False, eos_token_id=ends, min_new_tokens=6)
    session = rig.open()
    session.forward(ids)
    assert torch.equal(session.generate(COUNT, sampling=Sampling(eos_token_id=ends, min_new_tokens=6)), wanted)
    session = rig.open()
    session.forward(ids)
    with pytest.raises(BreakpointError, match="did not fire: every sequence had ended"):
        session.generate(COUNT, stop_at=Breakpoint(2, 7), sampling=Sampling(eos_token_id=ends))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; allowed is greater than 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 5}, "no effect without do_sample"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ],
)
def test_settings_out_of_range(options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**options)


def test_a_chat_goes_on_behind_the_last_token(rig: Rig) -> None:
    """The token that `generate` chose last is run before the ids that follow."""
    session = rig.open()
    session.forward(prompt())
    new = session.generate(3, sampling=Sampling(eos_token_id=()))
    more = prompt(seed=9, tokens=4)
    logits = session.forward(more)
    assert session.length == 12 + 3 + 4
    other = rig.open()
    other.forward(prompt())
    other.generate(2, sampling=Sampling(eos_token_id=()))
    other.generate(1, sampling=Sampling(eos_token_id=()))
    assert torch.equal(other.forward(more), logits) and new.shape == (1, 3)


def test_a_longrope_model_is_not_taken_past_where_its_keys_would_have_to_be_turned_anew() -> None:
    """Stock `generate` computes them anew there; a prompt that is longer from the start is right."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"original_max_position_embeddings": 40, "partial_rotary_factor": 1.0}
    config = Phi3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=256,
        pad_token_id=0,
        original_max_position_embeddings=40,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = djinn.load(config, device="cpu", budget_bytes=64 << 20, host_bytes=64 << 20, dtype="float32")
    ids = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(1))
    try:
        for prompt_tokens, new in ((30, 10), (60, 12)):
            wanted = model.generate(ids[:, :prompt_tokens], max_new_tokens=new, do_sample=False)[:, prompt_tokens:]
            session = djinn.open_session(model, max_length=100)
            session.forward(ids[:, :prompt_tokens])
            assert torch.equal(session.generate(new), wanted)
            if prompt_tokens == 30:
                with pytest.raises(SessionStateError, match="beyond 40 this model's longrope"):
                    session.generate(2)
                assert session.length <= 40
    finally:
        model.djinn.runtime.close()
