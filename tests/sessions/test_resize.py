"""A budget that changes while sessions are open: who is paused leaves, who runs stays, and every token stays right."""

import pytest
import torch

from djinn_core.errors import ConfigError, OutOfDeviceMemory
from djinn_core.memory.ledger import Kind
from djinn_core.runtime import Runtime
from djinn_core.sessions.state import SessionState

BUDGET = 64 << 20
IDS = torch.arange(1, 25)[None]


@pytest.fixture
def runtime():
    with Runtime("cpu", budget_bytes=BUDGET, host_bytes=64 << 20) as made:
        yield made


@pytest.fixture
def model(runtime):
    return runtime.load("tiny-llama", prove=False, resident_layers="all")


def paused(runtime, model, number):
    """Sessions that have prefilled, and what each says next."""
    sessions, wanted = [], []
    for shift in range(number):
        session = runtime.open_session(model, max_length=64)
        token = session.forward((IDS + shift) % 200).argmax(-1, keepdim=True)
        branch = session.fork()
        branch.resume()
        wanted.append(branch.forward(token))
        branch.close()
        session.forward(token, stop_after=2)
        session.pause()
        session.wait_until("clean", 10)
        sessions.append(session)
    return sessions, wanted


def kv_bytes(runtime):
    return sum(size for (kind, _), size in runtime.pool.usage().held.items() if kind is Kind.KV)


def test_paused_sessions_leave_for_a_smaller_budget_and_come_back_with_the_same_tokens(runtime, model):
    sessions, wanted = paused(runtime, model, 6)
    others = runtime.pool.held_bytes - kv_bytes(runtime)
    smaller = others + kv_bytes(runtime) // 3
    runtime.resize(smaller)
    assert runtime.budget_bytes == runtime.memory().budget_bytes == smaller
    assert runtime.pool.held_bytes + runtime.pool.pooled_bytes <= smaller
    assert runtime.device.used_bytes() <= smaller
    assert any(session.state is SessionState.SWAPPED for session in sessions)
    for session, logits in zip(sessions, wanted, strict=True):
        assert torch.equal(session.resume(), logits)
        assert runtime.device.used_bytes() <= smaller
        session.pause()


def test_a_larger_budget_holds_at_once(runtime, model):
    sessions, _ = paused(runtime, model, 6)
    all_bytes = kv_bytes(runtime)
    runtime.resize(runtime.pool.held_bytes - all_bytes // 2)
    runtime.resize(BUDGET)
    for session in sessions:
        session.resume()
        session.pause()
    assert kv_bytes(runtime) >= all_bytes
    assert runtime.memory().free_bytes == runtime.pool.free_bytes > 0


def test_what_runs_stays_and_the_budget_too(runtime, model):
    session = runtime.open_session(model, max_length=64)
    logits = session.forward(IDS)
    held = runtime.pool.held_bytes
    with pytest.raises(OutOfDeviceMemory, match="pause or close one") as refused:
        runtime.resize(held - (64 << 10))
    assert (refused.value.needed_bytes, refused.value.free_bytes) == (held, held - (64 << 10))
    assert runtime.budget_bytes == runtime.memory().budget_bytes == BUDGET
    assert runtime.pool.budget_bytes == BUDGET
    session.forward(logits.argmax(-1, keepdim=True))


def test_paused_sessions_that_have_left_stay_away_and_whole_when_it_is_refused(runtime, model):
    (session, *_), (logits, *_) = paused(runtime, model, 1)
    with pytest.raises(OutOfDeviceMemory):
        runtime.resize(runtime.pool.held_bytes - kv_bytes(runtime) - (64 << 10))
    assert session.state is SessionState.SWAPPED
    assert runtime.budget_bytes == BUDGET
    assert torch.equal(session.resume(), logits)


@pytest.mark.parametrize("size", [-1, 1.5, True, "8GB", 1 << 40])
def test_what_is_no_budget_is_refused(runtime, size):
    with pytest.raises(ConfigError, match="budget_bytes"):
        runtime.resize(size)
    assert runtime.budget_bytes == BUDGET


def test_a_budget_below_the_activations_is_refused():
    with Runtime("cpu", budget_bytes=BUDGET, activation_bytes=8 << 20, host_bytes=8 << 20) as runtime:
        with pytest.raises(OutOfDeviceMemory, match="activations"):
            runtime.resize(8 << 20)
        runtime.resize(16 << 20)
        assert runtime.pool.budget_bytes == 8 << 20


def test_a_budget_need_not_be_in_whole_units():
    with Runtime("cpu", budget_bytes=BUDGET + 1, host_bytes=64 << 20) as runtime:
        paused(runtime, runtime.load("tiny-llama", prove=False, resident_layers="all"), 2)
        runtime.resize(runtime.pool.held_bytes - 1)
        assert runtime.pool.held_bytes <= runtime.budget_bytes
        runtime.resize(BUDGET + 1)
        assert runtime.budget_bytes == BUDGET + 1
