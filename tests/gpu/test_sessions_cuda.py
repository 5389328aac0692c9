"""Sessions on a GPU: the oracle in fp16, a CUDA graph across a swap, and memory that NVML sees go."""

import threading
import time

import pynvml
import pytest
import torch
from transformers import PreTrainedModel

from djinn_core.sessions import Session, Sessions, SessionState
from tests.gpu.rigs import LAYERS, cuda_rig
from tests.sessions.oracle import Oracle, likely, prompt

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


def test_a_graph_of_a_decode_replays_right_after_a_swap(rig) -> None:
    """One token through the whole model, K and V written, captured once: its addresses are good after a resume.

    The stock model runs it, on the session's cache. Nothing waits on the host for the copies of the resume. Captured,
    transformers makes the mask that it leaves out otherwise, and attention with a mask rounds differently: so the bits
    are compared with a replay before the swap, and the stock pass in its last digits.
    """
    stock, served, device, sessions = rig
    ids, tokens = prompt(tokens=200).cuda(), 200
    oracle = Oracle(stock)
    token = likely(oracle.forward(ids))
    wanted = oracle.forward(token)
    session = sessions.open(served, max_length=512)
    session.forward(ids)

    def decode() -> torch.Tensor:
        session._cache.begin(tokens)
        out = stock(input_ids=token, position_ids=place, past_key_values=session._cache, use_cache=True)
        session._cache.end()
        return out.logits[:, -1]

    place = torch.full((1, 1), tokens, device="cuda")
    side = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(side):
        assert torch.equal(decode(), wanted)
    device.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = decode()
    graph.replay()
    before = out.clone()
    torch.testing.assert_close(before, wanted, rtol=0.01, atol=0.002)
    for _ in range(3):
        with torch.inference_mode():
            out.zero_()
        session.pause(release=True)
        session.wait_until("released", 10)
        other = sessions.open(served, max_length=512)  # takes the extents that were given up
        other.forward(prompt(tokens=300, seed=5).cuda())
        session.resume()
        session._holding.wait_issued()
        torch.cuda.current_stream().wait_event(session.trace.restored)
        graph.replay()
        assert torch.equal(out, before)
        other.close()
    assert torch.equal(session.forward(token), wanted)
    session.close()


def test_nvml_sees_a_released_session_go_within_200_ms_of_the_pause(rig) -> None:
    _, served, device, sessions = rig
    session = sessions.open(served, max_length=4096)
    session.forward(prompt(tokens=4000).cuda())
    device.synchronize()
    held = session.device_bytes
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")

    def used_bytes() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    before = used_bytes()
    until_s = time.monotonic() + 0.2
    session.pause(release=True)
    while (gone := before - used_bytes()) < held and time.monotonic() < until_s:
        time.sleep(0.005)
    pynvml.nvmlShutdown()
    assert gone >= held
    session.resume()
    session.close()
