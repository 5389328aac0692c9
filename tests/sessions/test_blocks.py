"""The arithmetic of a session's region: where tokens lie, and which blocks appending writes into."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_core.sessions import blocks
from djinn_core.sessions.blocks import Layout

GRANULARITY = 4096


@given(
    max_length=st.integers(1, 400),
    batch_size=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 24, 128]),
    block_granules=st.integers(1, 5),
    data=st.data(),
)
def test_blocks_hold_the_tokens_that_they_say(
    max_length: int, batch_size: int, kv_heads: int, head_dim: int, block_granules: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_BLOCK_BYTES", block_granules * GRANULARITY)
        layout = Layout(2, batch_size, max_length, kv_heads, head_dim, torch.float16, GRANULARITY)
        tokens = data.draw(st.integers(0, max_length))
        bytes_there = tokens * layout.token_bytes
        count = layout.count(max_length)
        assert layout.count(tokens) == math.ceil(bytes_there / layout.block_bytes)
        assert sum(layout.end_bytes(index, tokens) for index in range(count)) == bytes_there
        if tokens < max_length:
            written = [index for index in range(count) if layout.end_bytes(index, tokens) < layout.size_of(index)]
            assert written == list(range(layout.tail(tokens), count))
