"""One-token passes from CUDA graphs: what the emulated device cannot show, streams, other threads, a failed capture."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, PhiConfig

from djinn_core.device.cudagraphs import CudaChain
from djinn_core.models.boundary import NullProvider, install
from djinn_core.models.graphs import PROOFS, LayerGraphs
from djinn_core.models.stack import find_stack
from djinn_core.sessions.edits import Edit
from djinn_core.turn import Turn
from tests.gpu.rigs import CONFIG, LAYERS, MIB, cuda_rig
from tests.sessions.oracle import Oracle, equal, likely, prompt, speak

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def rig():
    with cuda_rig(graphs=True) as (stock, served, device, sessions):
        yield stock, served, device, sessions


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_the_stock_models_over_many_lengths(rig, batch) -> None:
    stock, served, _, sessions = rig
    oracle, session = Oracle(stock), sessions.open(served, max_length=600, batch_size=batch)
    first = oracle.forward(prompt(batch, tokens=200).cuda())
    assert torch.equal(session.forward(prompt(batch, tokens=200).cuda()), first)
    assert equal(speak(session, first, 150), oracle.greedy(first, 150))
    graphs = served._djinn_boundary.graphs
    assert graphs.recorded == LAYERS and graphs.chained == 1 and not graphs.refused
    session.close()


def chain_of(served) -> CudaChain:
    [call] = [call for call in served._djinn_boundary.graphs._calls.values() if call.chained is not None]
    return call.chained._chain


def test_launches_for_sessions_at_other_lengths_and_addresses(rig) -> None:
    """Each length is recorded once, in whichever session comes to it first, also where attention is split anew."""
    stock, served, _, sessions = rig
    lengths = (120, 121, 500, 1000)
    oracles = [Oracle(stock) for _ in lengths]
    opened = [sessions.open(served, max_length=length + 80) for length in lengths]
    last = []
    for oracle, session, length in zip(oracles, opened, lengths, strict=True):
        last.append(oracle.forward(prompt(tokens=length, seed=length).cuda()))
        session.forward(prompt(tokens=length, seed=length).cuda())
    for _ in range(40):
        wanted = [oracle.forward(likely(each)) for oracle, each in zip(oracles, last, strict=True)]
        assert equal([session.forward(likely(each)) for session, each in zip(opened, last, strict=True)], wanted)
        last = wanted
    chain = chain_of(served)
    assert served._djinn_boundary.graphs.chained == 1
    seen = {length + token for length in lengths for token in range(40)}
    assert seen - set(chain._steps) <= set(range(120, 130))  # those before all layers were proven
    grids = {step.nodes["grid"].tobytes() for step in chain._steps.values()}
    assert len(grids) > 1, "attention is split alike at all of these lengths: the test says less than it wants to"
    for session in opened:
        session.close()


def test_a_launch_follows_a_session_that_left_and_a_fork(rig) -> None:
    stock, served, _, sessions = rig
    oracle, session = Oracle(stock), sessions.open(served, max_length=600)
    logits = oracle.forward(prompt(tokens=300).cuda())
    session.forward(prompt(tokens=300).cuda())
    wanted = oracle.greedy(logits, 10)
    logits = speak(session, logits, 5)[-1]
    session.pause(release=True)
    session.wait_until("released", 10)
    with sessions.open(served, max_length=600) as other:
        speak(other, other.forward(prompt(tokens=100, seed=5).cuda()), 5)
    fork = session.fork()
    session.resume()
    fork.resume()
    assert equal(speak(session, logits, 5), wanted[5:])
    assert equal(speak(fork, logits, 5), wanted[5:])
    assert served._djinn_boundary.graphs.chained == 1
    fork.close()
    session.close()


def test_a_thread_that_waits_for_the_whole_device_costs_a_pass_its_launch(rig) -> None:
    """While a length is recorded nobody can; the session goes on, one way or the other, with the same logits."""
    stock, served, device, sessions = rig
    oracle, session = Oracle(stock), sessions.open(served, max_length=900)
    first = oracle.forward(prompt(tokens=100).cuda())
    session.forward(prompt(tokens=100).cuda())
    wanted = oracle.greedy(first, 300)
    said = speak(session, first, 8)
    assert served._djinn_boundary.graphs.chained == 1
    stop, failed = threading.Event(), []

    def waits() -> None:
        device.bind_thread()
        while not stop.is_set():
            try:
                device.synchronize()
            except BaseException as error:  # noqa: BLE001 - raised by the test
                failed.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    try:
        said += speak(session, said[-1], 292)
    finally:
        stop.set()
        thread.join()
    assert not failed and equal(said, wanted)
    session.close()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION])
def test_whatever_kernels_attention_has(backend) -> None:
    """Also such as the driver does not tell everything about; then layers go one by one."""
    config = LlamaConfig(**{**CONFIG.to_dict(), "num_key_value_heads": CONFIG.num_attention_heads})
    with cuda_rig(graphs=True, config=config) as (stock, served, _, sessions), sdpa_kernel(backend):
        oracle, session = Oracle(stock), sessions.open(served, max_length=400)
        first = oracle.forward(prompt(tokens=100).cuda())
        session.forward(prompt(tokens=100).cuda())
        assert equal(speak(session, first, 40), oracle.greedy(first, 40))
        graphs = served._djinn_boundary.graphs
        assert graphs.recorded == LAYERS
        assert graphs.chained == 1 or backend is not SDPBackend.FLASH_ATTENTION
        session.close()


PARALLEL = PhiConfig(
    vocab_size=128,
    hidden_size=320,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=4096,
)


def test_what_a_layer_keeps_across_its_attention_is_not_overwritten() -> None:
    """Here the norm before attention is read behind it; what attention needs meanwhile grows with the length."""
    with cuda_rig(graphs=True, config=PARALLEL) as (stock, served, _, sessions):
        oracles, opened, last = [], [], []
        for length, batch in ((200, 1), (1000, 1), (600, 2)):
            ids = prompt(batch, tokens=length, seed=length).cuda()
            oracles.append(Oracle(stock))
            opened.append(sessions.open(served, max_length=length + 120, batch_size=batch))
            last.append(oracles[-1].forward(ids))
            opened[-1].forward(ids)
        for _ in range(100):
            wanted = [oracle.forward(likely(each)) for oracle, each in zip(oracles, last, strict=True)]
            assert equal([session.forward(likely(each)) for session, each in zip(opened, last, strict=True)], wanted)
            last = wanted
        graphs = served._djinn_boundary.graphs
        assert graphs.recorded == 2 * LAYERS and graphs.chained == 2 and not graphs.refused
        for session in opened:
            session.close()


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_a_token_that_was_stopped_goes_on_after_a_swap(rig, layer) -> None:
    stock, served, _, sessions = rig
    oracle, session = Oracle(stock), sessions.open(served, max_length=400)
    logits = oracle.forward(prompt(tokens=300).cuda())
    session.forward(prompt(tokens=300).cuda())
    for want in oracle.greedy(logits, 6):
        session.forward(likely(logits), stop_after=layer)
        session.pause(release=True)
        session.wait_until("released", 10)
        with sessions.open(served, max_length=400) as other:  # its passes write where the stopped one's did
            speak(other, other.forward(prompt(tokens=100, seed=5).cuda()), 2)
        logits = session.resume()
        assert torch.equal(logits, want)
    assert served._djinn_boundary.graphs.recorded == LAYERS
    session.close()


@dataclass(frozen=True, eq=False)
class Sleeps(Edit):
    """Keeps the stream busy between two layers, and leaves the boundary as it is."""

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None: ...

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(200_000_000)
        return hidden


def test_passes_on_two_streams_do_not_meet(rig) -> None:
    """Graphs read and write the same tensors in every pass, so a pass waits for the one before on another stream."""
    stock, served, device, sessions = rig
    seeds = (1, 2)
    oracles = [Oracle(stock) for _ in seeds]
    opened = [sessions.open(served, max_length=400) for _ in seeds]
    last = []
    for oracle, session, seed in zip(oracles, opened, seeds, strict=True):
        ids = prompt(tokens=100, seed=seed).cuda()
        first = oracle.forward(ids)
        session.forward(ids)
        wanted = oracle.greedy(first, PROOFS)
        assert equal(speak(session, first, PROOFS), wanted)
        last.append(likely(wanted[-1]))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    device.synchronize()
    with torch.cuda.stream(streams[0]):
        one = opened[0].forward(last[0], edits={1: [Sleeps()]})
    assert not streams[0].query()
    with torch.cuda.stream(streams[1]):
        other = opened[1].forward(last[1])
    device.synchronize()
    assert torch.equal(one, oracles[0].forward(last[0])) and torch.equal(other, oracles[1].forward(last[1]))
    for session in opened:
        session.close()


def test_two_models_do_not_share_what_their_graphs_write(rig) -> None:
    """Each on a stream of its own, at the same time."""
    stock, served, device, sessions = rig
    second = copy.deepcopy(stock)
    for layer in second.model.layers:
        layer.mlp.down_proj.weight.mul_(1.5)
    own = copy.deepcopy(second)
    stack = find_stack(second)
    boundary = install(second, stack, NullProvider(), Turn())
    boundary.graphs = LayerGraphs(device, stack.layers, range(LAYERS))
    one, own_graphs = (each._graphs for each in (served._djinn_boundary.graphs, boundary.graphs))
    assert one.pool.id != own_graphs.pool.id and one.stream.cuda_stream != own_graphs.stream.cuda_stream
    oracles = [Oracle(stock), Oracle(own)]
    opened = [sessions.open(model, max_length=400) for model in (served, second)]
    ids = prompt(tokens=100).cuda()
    first = [oracle.forward(ids) for oracle in oracles]
    for session in opened:
        session.forward(ids)
    wanted = [oracle.greedy(logits, 20) for oracle, logits in zip(oracles, first, strict=True)]
    tokens = [[likely(each) for each in (logits, *rest[:-1])] for logits, rest in zip(first, wanted, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    device.synchronize()
    said: list[list[torch.Tensor]] = [[], []]
    for token in range(20):
        for number, session in enumerate(opened):
            with torch.cuda.stream(streams[number]):
                said[number].append(session.forward(tokens[number][token]))
    device.synchronize()
    assert equal(said[0], wanted[0]) and equal(said[1], wanted[1])
    for session in opened:
        session.close()
    boundary.graphs.close()


def test_other_threads_use_the_device_while_layers_are_recorded(rig) -> None:
    stock, served, device, sessions = rig
    stop = threading.Event()
    failed: list[BaseException] = []

    def busy() -> None:
        try:
            device.bind_thread()
            address = device.reserve(2 * MIB)
            while not stop.is_set():
                handle = device.create(2 * MIB)
                device.map(address, handle, 2 * MIB)
                device.grant(address, 2 * MIB)
                event = device.event(blocking=True)
                made = torch.ones(1 << 20, device="cuda") + 1
                event.record(device.current_stream())
                event.synchronize()
                assert int(made[-1]) == 2
                device.unmap(address, 2 * MIB)
                device.destroy(handle)
                torch.cuda.empty_cache()
            device.release(address, 2 * MIB)
        except BaseException as error:  # noqa: BLE001 - raised by the test
            failed.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        oracle, session = Oracle(stock), sessions.open(served, max_length=400)
        first = oracle.forward(prompt(tokens=100).cuda())
        session.forward(prompt(tokens=100).cuda())
        wanted = oracle.greedy(first, 8)
        time.sleep(0.05)
        said = speak(session, first, 8)
    finally:
        stop.set()
        thread.join()
    assert not failed and equal(said, wanted)
    assert served._djinn_boundary.graphs.recorded == LAYERS and not served._djinn_boundary.graphs.refused
    session.close()


class Asks(nn.Module):
    """An activation that asks the device for a value, which cannot be recorded."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(hidden) * (1 if float(hidden.sum()) == float(hidden.sum()) else 2)


def test_a_layer_that_cannot_be_captured_runs_as_it_is(rig) -> None:
    stock, served, device, sessions = rig
    layers = served.model.layers
    layers[1].mlp.act_fn = Asks().eval()
    graphs = served._djinn_boundary.graphs = LayerGraphs(device, layers, range(LAYERS))
    oracle, session = Oracle(stock), sessions.open(served, max_length=400)
    first = oracle.forward(prompt(tokens=100).cuda())
    session.forward(prompt(tokens=100).cuda())
    assert equal(speak(session, first, 6), oracle.greedy(first, 6))
    assert set(graphs.refused.values()) == {1} and graphs.recorded == LAYERS - 1
    assert torch.rand(4, device="cuda").isfinite().all()  # torch's random numbers are in no capture any more
    torch.cuda.empty_cache()
    session.close()
