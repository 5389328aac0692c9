"""Sessions on a GPU: the oracle in fp16, a CUDA graph across a swap, and memory that the driver sees go."""

import threading
import time

import pytest
import torch
from transformers import PreTrainedModel

from djinn_core.sessions import Session, Sessions, SessionState
from tests.gpu.rigs import LAYERS, cuda_rig
from tests.sessions.oracle import Oracle, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MIB = 1 << 20


@pytest.fixture
def rig():
    with cuda_rig() as (stock, served, device, sessions):
        yield stock, served, device, sessions


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_resume_equals_the_uninterrupted_run(rig, layer, release) -> None:
    stock, served, _, sessions = rig
    ids = prompt(tokens=300).cuda()
    oracle = Oracle(stock)
    first = oracle.forward(ids)
    wanted = [first, *oracle.greedy(first, 3)]
    session = sessions.open(served, max_length=400)
    session.forward(ids, stop_after=layer)
    session.pause(release=release)
    if release:
        session.wait_until("released", 10)
    logits = session.resume()
    assert torch.equal(logits, wanted[0])
    for want in wanted[1:]:
        stopped = session.forward(logits.float().argmax(-1)[:, None], stop_after=layer)
        session.pause(release=release)
        logits = session.resume(stopped)
        assert torch.equal(logits, want)
    session.close()


def open_with_room_at_hand(sessions: Sessions, served: PreTrainedModel, ids: torch.Tensor) -> Session:
    """A session that can write behind itself: the host has pinned memory that another one gave back."""
    with sessions.open(served, max_length=400) as before:
        before.forward(ids, stop_after=3)
    return sessions.open(served, max_length=400)


def test_what_a_prefill_writes_behind_itself_waits_for_its_layers(rig) -> None:
    """All copies are issued long before the first layer has run."""
    stock, served, device, sessions = rig
    ids = prompt(tokens=300).cuda()
    wanted = Oracle(stock).forward(ids)
    session = open_with_room_at_hand(sessions, served, ids)
    torch.cuda._sleep(400_000_000)
    session.forward(ids, stop_after=3)
    busy = not torch.cuda.current_stream().query()
    before = device.copied.d2h_bytes
    session.pause(release=True)
    session.wait_until("released", 10)
    assert busy and device.copied.d2h_bytes == before
    assert torch.equal(session.resume(), wanted)
    session.close()


def test_a_pause_that_has_little_to_do_has_done_it_when_it_returns(rig) -> None:
    """On a thread that has not touched the device before, too."""
    stock, served, device, sessions = rig
    ids = prompt(tokens=300).cuda()
    wanted = Oracle(stock).forward(ids)
    session = open_with_room_at_hand(sessions, served, ids)
    session.forward(ids, stop_after=3)
    device.synchronize()
    caller = threading.Thread(target=session.pause, kwargs={"release": True})
    caller.start()
    caller.join()
    assert session.state is SessionState.SWAPPED and session.device_bytes == 0
    assert torch.equal(session.resume(), wanted)
    session.close()


def test_a_smaller_budget_gives_memory_back_to_the_driver(rig) -> None:
    stock, served, device, sessions = rig
    wanted, opened = [], []
    for number in range(6):
        ids = (prompt(tokens=300) + number).cuda() % 128
        wanted.append(Oracle(stock).forward(ids))
        session = sessions.open(served, max_length=400)
        session.forward(ids, stop_after=2)
        session.pause()
        session.wait_until("clean", 10)
        opened.append(session)
    pool, before = sessions.pager.pool, device.used_bytes()
    half = pool.held_bytes // 2
    sessions.pager.resize(half)
    assert pool.held_bytes + pool.pooled_bytes <= half
    assert device.used_bytes() <= before - half + 2 * MIB
    for session, logits in zip(opened, wanted, strict=True):
        assert torch.equal(session.resume(), logits)
        assert pool.held_bytes + pool.pooled_bytes <= half
        session.pause()
        session.close()


def test_a_graph_replays_across_a_swap(rig) -> None:
    """Attention over a session's KV, captured once: the addresses that it holds are good after the memory came back."""
    _, served, device, sessions = rig
    session = sessions.open(served, max_length=512)
    session.forward(prompt(tokens=200).cuda())
    keys = [layer._all_keys[:, :, :200] for layer in session._cache.layers]
    values = [layer._all_values[:, :, :200] for layer in session._cache.layers]
    query = torch.randn((1, 2, 1, 64), dtype=torch.float16, device="cuda")

    def attend() -> torch.Tensor:
        return torch.stack(
            [torch.softmax(query @ k.transpose(-1, -2), -1) @ v for k, v in zip(keys, values, strict=True)]
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = attend()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for _ in range(3):
        session.pause(release=True)
        session.wait_until("released", 10)
        other = sessions.open(served, max_length=512)  # takes the extents that were given up
        other.forward(prompt(tokens=300, seed=5).cuda())
        session.resume()
        session.wait_until("restored", 10)
        out.zero_()
        graph.replay()
        device.synchronize()
        assert torch.equal(out, wanted)
        other.close()
    session.close()


def test_the_driver_sees_a_paused_session_go(rig) -> None:
    _, served, device, sessions = rig
    session = sessions.open(served, max_length=4096)
    session.forward(prompt(tokens=4000).cuda())
    device.synchronize()
    held = session.device_bytes
    before = device.used_bytes()
    session.pause(release=True)
    session.wait_until("released", 10)
    deadline = time.monotonic() + 0.2
    while before - device.used_bytes() < held and time.monotonic() < deadline:
        time.sleep(0.005)
    assert before - device.used_bytes() >= held
    session.resume()
    session.close()
