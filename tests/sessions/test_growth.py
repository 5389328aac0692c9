"""A session grows block by block: a decode that finds no room has someone leave, or ends for this session alone."""

from __future__ import annotations

import pytest
import torch

from djinn_core.errors import OutOfDeviceMemory
from djinn_core.sessions import SessionState, blocks
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import MakeRig, Rig

UNIT = 64 << 10  # a block here; 100 tokens of a layer take one, 160 two
TOKENS = 60


@pytest.fixture
def grown(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Room for a session of two blocks a layer, or for two of one, and not for one of each."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", UNIT)
    return make_rig(device_bytes=12 * UNIT)


def wanted_from(rig: Rig) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of 100 tokens, and the 60 behind it."""
    ids = torch.randint(3, 127, (1, 100), generator=torch.Generator().manual_seed(1))
    oracle = Oracle(rig.stock)
    first = oracle.forward(ids)
    return ids, torch.stack([logits.argmax(-1) for logits in [first, *oracle.greedy(first, TOKENS - 1)]], dim=1)


def test_blocks_are_mapped_as_tokens_arrive(grown: Rig) -> None:
    ids, wanted = wanted_from(grown)
    session = grown.open(max_length=250)
    session.forward(ids)
    before = session.device_bytes
    assert torch.equal(session.generate(TOKENS), wanted)
    assert session.device_bytes == 2 * before


def test_a_paused_session_leaves_in_the_middle_of_a_decode(grown: Rig) -> None:
    ids, wanted = wanted_from(grown)
    session, other = grown.open(max_length=250), grown.open(max_length=100)
    session.forward(ids)
    said = other.forward(prompt())
    other.pause()
    assert torch.equal(session.generate(TOKENS), wanted)
    assert other.state is SessionState.SWAPPED
    session.pause()
    oracle = Oracle(grown.stock)
    oracle.forward(prompt())
    token = said.argmax(-1)[:, None]
    other.resume()
    assert torch.equal(other.forward(token), oracle.forward(token))


def test_without_room_the_decode_ends_for_this_session_alone(grown: Rig) -> None:
    ids, wanted = wanted_from(grown)
    session, other = grown.open(max_length=250), grown.open(max_length=100)
    session.forward(ids)
    other.forward(prompt())
    with pytest.raises(OutOfDeviceMemory, match=f"session {session.id} needs"):
        session.generate(TOKENS)
    assert session.state is SessionState.RUNNING and other.state is SessionState.RUNNING
    said = session.ids.shape[1] - 100
    assert 0 < said < TOKENS and torch.equal(session.ids[:, 100:], wanted[:, :said])
    other.pause()
    session.generate(TOKENS - said)
    assert torch.equal(session.ids[:, 100:], wanted), "nothing was lost"
