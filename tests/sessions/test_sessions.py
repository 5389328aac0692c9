"""What a session promises besides equal bits: memory that leaves, addresses that stay, checkpoints, forks, refusals."""

from __future__ import annotations

import copy
import gc
import threading
import time
import tracemalloc
import weakref
from collections import deque

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    WhisperConfig,
)

from djinn_core.errors import BreakpointError, DjinnError, OutOfDeviceMemory, SessionStateError, UsageError
from djinn_core.models.boundary import NullProvider, install
from djinn_core.models.stack import find_stack
from djinn_core.sessions import Breakpoint, Scale, SessionState
from djinn_core.sessions.kvcache import positions_in_table
from djinn_core.turn import Turn
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import LAYERS, MakeRig, Rig, stock_model, wait_for


def step(session, logits: torch.Tensor) -> torch.Tensor:
    return session.forward(logits.float().argmax(-1)[:, None])


def test_memory_leaves_and_addresses_stay(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    addresses = [layer._all_keys.data_ptr() for layer in session._cache.layers]
    held = rig.kv_bytes
    assert held > 0
    session.pause(release=True)
    session.wait_until("released", 10)
    assert (rig.kv_bytes, session.device_bytes, session.state) == (0, 0, SessionState.SWAPPED)
    session.resume()
    assert [layer._all_keys.data_ptr() for layer in session._cache.layers] == addresses
    assert rig.kv_bytes >= held


def test_an_unreleased_pause_keeps_the_memory_until_someone_needs_it(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    assert session.state is SessionState.PAUSED and session.device_bytes > 0
    copied = rig.device.copied
    session.resume()
    assert (rig.device.copied - copied).h2d_bytes == 0


def test_a_second_pause_writes_only_what_is_new(rig: Rig) -> None:
    session = rig.open()
    logits = session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    first = rig.device.copied.d2h_bytes
    token_bytes = session._holding.layout.token_bytes
    assert first == 12 * token_bytes * LAYERS
    session.resume()
    step(session, logits)
    session.pause()
    session.wait_until("clean", 10)
    assert rig.device.copied.d2h_bytes - first == token_bytes * LAYERS


def test_pause_returns_at_once(rig: Rig) -> None:
    rig.device.link_gbps = 0.001
    session = rig.open()
    session.forward(prompt())
    begun = time.perf_counter()
    session.pause(release=True)
    assert time.perf_counter() - begun < 0.02  # the write-back alone takes longer
    assert session.state is SessionState.PAUSED
    session.wait_until("released", 10)


def test_a_slow_link_is_waited_for(make_rig: MakeRig) -> None:
    """Layers that are not behind their own event would read what is not there yet."""
    rig = make_rig()
    oracle = Oracle(rig.stock)
    wanted = oracle.forward(prompt(tokens=40))
    following = oracle.greedy(wanted, 1)[0]
    rig.device.link_gbps = 0.002
    session = rig.open()
    logits = session.forward(prompt(tokens=40), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    logits = session.resume()
    assert torch.equal(logits, wanted)
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    assert torch.equal(step(session, logits), following)
    session.wait_until("restored", 10)


def test_checkpoints_can_be_resumed_again_and_again(rig: Rig) -> None:
    oracle = Oracle(rig.stock)
    wanted = oracle.forward(prompt())
    following = oracle.greedy(wanted, 3)
    session = rig.open()
    first = session.forward(prompt(), stop_after=2)
    for round_ in range(3):
        logits = session.resume(first)
        assert torch.equal(logits, wanted)
        for further in following:
            logits = step(session, logits)
            assert torch.equal(logits, further)
        if round_ == 1:
            session.pause(release=True)
    between = session.checkpoint()
    assert between.layer is None
    session.resume(first)
    assert session.resume(between) is None
    assert session.length == 15
    session.drop(first)
    assert session.checkpoints == (between,)


def test_going_back_past_a_kept_checkpoint_copies_the_tail(rig: Rig) -> None:
    session = rig.open()
    logits = session.forward(prompt())
    early = session.checkpoint()
    after = step(session, logits)
    late = session.checkpoint()
    session.resume(early)
    other = session.forward(torch.tensor([[5]]))
    session.resume(late)
    follow = step(session, after)
    oracle = Oracle(rig.stock)
    assert torch.equal(follow, oracle.greedy(oracle.forward(prompt()), 2)[1])
    oracle = Oracle(rig.stock)
    oracle.forward(prompt())
    assert torch.equal(other, oracle.forward(torch.tensor([[5]])))


@pytest.mark.parametrize("paused", [False, True])
def test_branches_of_a_fork_do_not_see_each_other(rig: Rig, paused) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    held = rig.kv_bytes
    if paused:
        session.pause(release=True)
        session.wait_until("released", 10)
    branch = session.fork()
    if not paused:
        assert rig.kv_bytes == held
    steered = branch.resume(edits=[Scale(0.5)])
    plain = session.resume()
    oracle = Oracle(rig.stock)
    wanted = oracle.forward(prompt())
    assert torch.equal(plain, wanted) and not torch.equal(steered, wanted)
    for further in oracle.greedy(wanted, 3):
        steered = step(branch, steered)
        plain = step(session, plain)
        assert torch.equal(plain, further)
    again = branch.resume(branch.checkpoints[0])
    assert torch.equal(again, wanted)


def test_closing_in_any_order(rig: Rig) -> None:
    parent = rig.open()
    logits = parent.forward(prompt())
    child = parent.fork()
    grandchild = child.fork()
    logits = step(parent, logits)
    parent.close()
    child.resume()
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    second = oracle.greedy(first, 1)[0]
    assert torch.equal(step(child, child.logits), second)
    child.close()
    child.close()
    grandchild.resume()
    assert torch.equal(step(grandchild, grandchild.logits), second)
    grandchild.close()
    assert rig.kv_bytes == 0 and rig.host.held_bytes == 0


def test_a_resumed_pass_can_stop_again(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=1)
    later = session.resume(stop_after=3)
    assert later.layer == 3
    assert torch.equal(session.resume(), Oracle(rig.stock).forward(prompt()))
    with pytest.raises(BreakpointError, match="executed to layer 3"):
        session.resume(later, stop_after=3)
    assert torch.equal(session.resume(later), Oracle(rig.stock).forward(prompt()))


def test_refusals_say_what_to_do(rig: Rig) -> None:
    session = rig.open(max_length=16)
    with pytest.raises(SessionStateError, match="running already; pause it first"):
        session.resume()
    with pytest.raises(BreakpointError, match="layers 1 to 4"):
        session.forward(prompt(), stop_after=5)
    with pytest.raises(SessionStateError, match="opened for 16; 17 more"):
        session.forward(prompt(tokens=17))
    with pytest.raises(SessionStateError, match="no prompt"):
        session.generate(2)
    session.forward(prompt(), stop_after=2)
    with pytest.raises(SessionStateError, match="stopped after layer 2"):
        session.forward(prompt())
    session.pause()
    with pytest.raises(SessionStateError, match="paused"):
        session.forward(prompt())
    with pytest.raises(UsageError, match=r"\[1, T\]"):
        session.resume()
        session.forward(prompt(batch=2))
    other = rig.open()
    with pytest.raises(SessionStateError, match="has no checkpoint"):
        other.resume(session.checkpoints[0])
    session.close()
    with pytest.raises(SessionStateError, match="closed"):
        session.resume()


@pytest.mark.parametrize("wrong", [-1, 128])
def test_an_id_that_would_end_a_gpus_context_is_refused(rig: Rig, wrong: int) -> None:
    session = rig.open()
    ids = prompt()
    ids[0, 5] = wrong
    with pytest.raises(UsageError, match=f"{wrong} is among the input_ids; the model's go from 0 to 127"):
        session.forward(ids)
    assert torch.equal(session.forward(prompt()), Oracle(rig.stock).forward(prompt()))


def test_a_session_longer_than_the_models_table_of_positions_is_refused(make_rig: MakeRig) -> None:
    with pytest.raises(UsageError, match="max_length is 257; this model has a table of 256 positions"):
        make_rig("gpt2").open(max_length=257)
    make_rig("llama").open(max_length=257)  # computes them


def test_the_cache_is_the_sessions_own(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt())
    with pytest.raises(SessionStateError, match=r"session\.forward"):
        rig.served(prompt(tokens=1), past_key_values=session._cache)
    assert session.length == 12


def test_one_caller_at_a_time(rig: Rig) -> None:
    session = rig.open()
    entered, leave = threading.Event(), threading.Event()

    def hook(*args) -> None:
        entered.set()
        leave.wait(10)

    handle = rig.served.model.layers[0].register_forward_hook(hook)
    thread = threading.Thread(target=session.forward, args=(prompt(),))
    thread.start()
    entered.wait(10)
    with pytest.raises(SessionStateError, match="another thread"):
        session.pause()
    leave.set()
    thread.join()
    handle.remove()
    session.pause()


def test_different_sessions_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=6 << 20)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            ids = prompt(seed=seed)
            oracle = Oracle(rig.stock)
            wanted = [oracle.forward(ids)]
            wanted += oracle.greedy(wanted[0], 4)
            with rig.open() as session:
                session.forward(ids, stop_after=1 + seed % LAYERS)
                session.pause(release=seed % 2 == 0)
                logits = session.resume()
                for want, further in zip(wanted, [*wanted[1:], None], strict=True):
                    assert torch.equal(logits, want)
                    session.pause(release=seed % 3 == 0)
                    session.resume()
                    if further is not None:
                        logits = step(session, logits)
        except (AssertionError, DjinnError, RuntimeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures


def test_a_thousand_cycles_do_not_drift(rig: Rig) -> None:
    rig.sessions.pager.events = deque(maxlen=100)  # what is logged stays, up to a bound
    session = rig.open()
    checkpoint = session.forward(prompt(), stop_after=2)
    marks, python_bytes = [], []
    tracemalloc.start()
    for cycle in range(1000):
        session.pause(release=cycle % 2 == 0)
        if cycle % 2 == 0:
            session.wait_until("released", 10)
        logits = session.resume(checkpoint)
        if cycle in (99, 999):
            session.pause(release=True)
            wait_for(lambda: session.state is SessionState.SWAPPED and rig.device.used_bytes() == rig.pool.held_bytes)
            gc.collect()
            python_bytes.append(tracemalloc.get_traced_memory()[0])
            marks.append((rig.pool.held_bytes, rig.host.held_bytes, rig.host.pinned_bytes))
            session.resume(checkpoint)
    tracemalloc.stop()
    assert marks[0] == marks[1]
    assert python_bytes[1] - python_bytes[0] < 100_000, python_bytes
    assert torch.equal(logits, Oracle(rig.stock).forward(prompt()))


def test_pressure_evicts_paused_sessions_and_never_running_ones(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=2 << 20)
    sessions, wanted = [], []
    for seed in range(20):
        session = rig.open()
        session.forward(prompt(seed=seed), stop_after=2)
        session.pause()
        sessions.append(session)
        wanted.append(Oracle(rig.stock).forward(prompt(seed=seed)))
    assert any(session.state is SessionState.SWAPPED for session in sessions)
    for session, want in zip(sessions, wanted, strict=True):
        assert torch.equal(session.resume(), want)
        session.pause()
    running = []
    with pytest.raises(OutOfDeviceMemory, match="pause or close one"):
        for session in sessions:
            session.resume()
            step(session, session.logits)
            running.append(session)
    assert all(session.state is SessionState.RUNNING for session in running) and len(running) > 2
    for session in running:
        session.pause()
    for seed, session in enumerate(sessions):
        if session not in running:
            assert session.resume() is None
            oracle = Oracle(rig.stock)
            assert torch.equal(step(session, session.logits), oracle.greedy(oracle.forward(prompt(seed=seed)), 1)[0])
            session.pause()


def fill(device, leave_bytes: int) -> list[int]:
    """What another tenant would take of the device, in units: all but `leave_bytes`."""
    unit = device.granularity_bytes
    return [device.create(unit) for _ in range((device.capacity_bytes - device.used_bytes() - leave_bytes) // unit)]


def test_a_paused_session_leaves_when_others_fill_the_device_within_the_budget(make_rig: MakeRig) -> None:
    rig = make_rig(device_bytes=8 << 20)
    first, second = rig.open(), rig.open()
    first.forward(prompt(), stop_after=2)
    first.pause()
    others = fill(rig.device, 2 * rig.device.granularity_bytes)
    wanted = Oracle(rig.stock).forward(prompt(seed=1))
    assert torch.equal(second.forward(prompt(seed=1)), wanted)
    assert first.state is SessionState.SWAPPED
    second.pause()
    assert torch.equal(first.resume(), Oracle(rig.stock).forward(prompt()))
    for handle in others:
        rig.device.destroy(handle)


@pytest.mark.parametrize("doing", ["forward", "resume"])
def test_a_device_that_others_fill_in_the_middle_of_a_pass_leaves_the_session_whole(make_rig: MakeRig, doing) -> None:
    rig = make_rig(device_bytes=8 << 20)
    session, others = rig.open(), []
    wanted = Oracle(rig.stock).forward(prompt())
    if doing == "resume":
        session.forward(prompt(), stop_after=1)
        session.pause(release=True)
        session.wait_until("released", 10)
        rig.pool.trim()

    def fill_now(*_: object) -> None:
        others.extend(fill(rig.device, 0))

    hook = rig.served.model.layers[2].register_forward_pre_hook(fill_now)
    before = rig.executed
    with pytest.raises(
        OutOfDeviceMemory, match=rf"session {session.id} was promised .* whole; free some of the device"
    ):
        getattr(session, doing)(*(() if doing == "resume" else (prompt(),)))
    hook.remove()
    assert sum(rig.executed) > sum(before), "it ran out behind a layer"
    for handle in others:
        rig.device.destroy(handle)
    if doing == "resume":
        assert torch.equal(session.resume(), wanted)
    else:
        assert session.length == 0
        assert torch.equal(session.forward(prompt()), wanted)


def done(job) -> None:
    """Wait for a bring-in's end; `wait_issued` would cancel a prefetch."""
    with job.changed:
        assert job.changed.wait_for(lambda: job.done, 10)


def test_a_prefetch_is_promised_nothing(make_rig: MakeRig) -> None:
    """What others have filled is found out before its first layer, so that it leaves nothing half-way."""
    rig = make_rig(device_bytes=8 << 20)
    session = rig.open()
    session.forward(prompt())
    session.pause(release=True)
    session.wait_until("released", 10)
    rig.pool.trim()
    others = fill(rig.device, 2 * rig.device.granularity_bytes)
    session.prefetch()
    (job,) = session._holding.jobs
    done(job)
    assert job.error is not None and session.state is SessionState.SWAPPED and session.device_bytes == 0
    for handle in others:
        rig.device.destroy(handle)
    session.prefetch()
    (job,) = session._holding.jobs
    done(job)
    assert job.error is None and session.state is SessionState.PAUSED
    assert session.device_bytes == 4 * rig.device.granularity_bytes


def test_breakpoints_in_generation(rig: Rig) -> None:
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    tokens = [first, *oracle.greedy(first, 5)]
    wanted = torch.stack([logits.argmax(-1) for logits in tokens], dim=1)
    session = rig.open()
    session.forward(prompt())
    new = session.generate(6, stop_at=Breakpoint(layer=2, token=2))
    assert torch.equal(new, wanted[:, :3]) and session.stopped.layer == 2
    session.pause(release=True)
    logits = session.resume()
    assert torch.equal(logits, tokens[3])
    assert torch.equal(session.generate(3), wanted[:, 3:])
    with pytest.raises(BreakpointError, match="never run"):
        session.generate(2, stop_at=Breakpoint(layer=2, token=2))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(**SIZES, max_position_embeddings=32), None),
        (GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32), 32),
        (GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32), 32),
        (OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32), 32),
        (RobertaConfig(**SIZES, max_position_embeddings=34, is_decoder=True), 32),
        (WhisperConfig(d_model=16, decoder_layers=2, decoder_attention_heads=2, max_target_positions=32), 32),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_how_many_positions_a_model_has(config: PretrainedConfig, positions: int | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert positions_in_table(model) == positions


def test_a_model_is_asked_once_how_many_positions_it_has(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("djinn_core.sessions.rooms.positions_in_table", lambda model: asked.append(model))
    for _ in range(2):
        rig.open()
    assert len(asked) == 1


def test_each_model_has_its_own_number_of_positions_and_goes_when_its_user_lets_go(rig: Rig) -> None:
    served = copy.deepcopy(stock_model("gpt2", torch.float32))
    install(served, find_stack(served), NullProvider(), Turn())
    rig.open(max_length=300)
    rig.sessions.open(served, max_length=256).close()
    with pytest.raises(UsageError, match="256 positions"):
        rig.sessions.open(served, max_length=300)
    rig.open(max_length=300)
    gone = weakref.ref(served)
    del served
    gc.collect()
    assert gone() is None
