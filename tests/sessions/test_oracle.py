"""Pause and resume without an edit equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.sessions.oracle import Oracle, left_padded, prompt
from tests.sessions.rigs import LAYERS, MakeRig

FAMILIES = ("llama", "gqa", "gpt2", "mistral")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_breakpoints_at_every_layer(make_rig: MakeRig, family, dtype, padded, release) -> None:
    rig = make_rig(family, dtype)
    batch = 3 if padded else 1
    ids, mask = prompt(batch), left_padded(batch, 12) if padded else None
    oracle = Oracle(rig.stock)
    first = oracle.forward(ids, mask)
    rest = oracle.greedy(first, 2)
    for layer in range(1, LAYERS + 1):
        with rig.open(batch_size=batch) as session:
            before = rig.executed
            session.forward(ids, mask, stop_after=layer)
            assert [b - a for a, b in zip(before, rig.executed, strict=True)] == [1] * layer + [0] * (LAYERS - layer)
            session.pause(release=release)
            if release:
                session.wait_until("released", 10)
                assert session.device_bytes == 0 and rig.kv_bytes == 0
            logits = session.resume()
            assert [b - a for a, b in zip(before, rig.executed, strict=True)] == [1] * LAYERS
            same(logits, first)
            for wanted in rest:
                logits = session.forward(logits.float().argmax(-1)[:, None])
                same(logits, wanted)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_breakpoints_at_every_layer(make_rig: MakeRig, family, dtype, padded) -> None:
    rig = make_rig(family, dtype)
    batch = 2 if padded else 1
    ids, mask = prompt(batch), left_padded(batch, 12) if padded else None
    oracle = Oracle(rig.stock)
    logits = oracle.forward(ids, mask)
    token = logits.float().argmax(-1)[:, None]
    wanted = [oracle.forward(token, None)]
    wanted += oracle.greedy(wanted[0], 2)
    for layer in range(1, LAYERS + 1):
        with rig.open(batch_size=batch) as session:
            session.forward(ids, mask)
            before = rig.executed
            session.forward(token, stop_after=layer)
            session.pause(release=True)
            session.wait_until("released", 10)
            logits = session.resume()
            assert [b - a for a, b in zip(before, rig.executed, strict=True)] == [1] * LAYERS
            same(logits, wanted[0])
            for further in wanted[1:]:
                session.pause(release=layer % 2 == 0)
                assert session.resume() is None
                logits = session.forward(logits.float().argmax(-1)[:, None])
                same(logits, further)
