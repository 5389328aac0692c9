"""What is closed while others use it waits for them, and lets nobody in any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig

from djinn_core import door as door_module
from djinn_core.door import Door
from djinn_core.errors import SessionStateError, UsageError
from djinn_core.runtime import Runtime
from djinn_core.turn import Turn

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=128,
    max_position_embeddings=256,
)
IDS = torch.tensor([[5, 6, 7]])
BUDGET = {"budget_bytes": 8 << 20, "host_bytes": 32 << 20}
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime("cpu", **BUDGET) as made:
        yield made


@pytest.fixture
def model(runtime: Runtime):
    return load(runtime)


def load(runtime: Runtime, **settings: object):
    return runtime.load(LLAMA, dtype="float32", prove=False, **settings)


class Thread(threading.Thread):
    """Keeps what its work returned, or raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.result = error

    def end(self) -> object:
        self.join(10)
        assert not self.is_alive()
        return self.result


@contextmanager
def held_in_head(model, call: Callable[[], object]) -> Iterator[Thread]:
    """`call` runs in a thread and stands in the model's head: its decoder has ended. It goes on behind the block."""
    standing, go = threading.Event(), threading.Event()

    def stand(*_: object) -> None:
        standing.set()
        go.wait(10)

    hook = model.lm_head.register_forward_pre_hook(stand)
    thread = Thread(call)
    try:
        assert standing.wait(10)
        yield thread
    finally:
        go.set()
        hook.remove()


def calls(runtime: Runtime, model) -> dict[str, Callable[[], torch.Tensor]]:
    session = runtime.open_session(model, max_length=32)
    return {"plain": lambda: model(IDS).logits.clone(), "session": lambda: session.forward(IDS).clone()}


@pytest.mark.parametrize("what", ["unload", "close"])
@pytest.mark.parametrize("how", ["plain", "session"])
def test_a_pass_reads_its_head_before_the_weights_go(runtime: Runtime, model, how: str, what: str) -> None:
    wanted = calls(runtime, model)[how]()
    with held_in_head(model, calls(runtime, model)[how]) as passing:
        ending = Thread(runtime.close if what == "close" else lambda: runtime.unload(model))
        ending.join(0.2)
        assert ending.is_alive() and not model.lm_head.weight.is_meta
    assert torch.equal(passing.end(), wanted)
    assert ending.end() is None
    with pytest.raises(SessionStateError, match="unloaded"):
        model(IDS)


@pytest.mark.parametrize("what", ["unload", "close"])
def test_who_would_wait_for_himself_is_told_and_goes_on(runtime: Runtime, model, what: str) -> None:
    told = []

    def inside(*_: object) -> None:
        with pytest.raises(SessionStateError, match="this thread"):
            runtime.close() if what == "close" else runtime.unload(model)
        told.append(True)

    wanted = model(IDS).logits
    hook = model.lm_head.register_forward_pre_hook(inside)
    assert torch.equal(model(IDS).logits, wanted)
    session = runtime.open_session(model, max_length=32)
    logits = session.forward(IDS)
    hook.remove()
    assert len(told) == 2
    assert torch.equal(runtime.open_session(model, max_length=32).forward(IDS), logits)
    assert torch.equal(model(IDS).logits, wanted), "nothing was closed"


@pytest.mark.parametrize("how", ["whole", "decoder"])
def test_nothing_is_unloaded_from_within_any_pass(runtime: Runtime, model, how: str) -> None:
    """Who is within the other's may be waiting for this one's turn."""
    other, told = load(runtime), []

    def inside(*_: object) -> None:
        for loaded in (model, other):
            with pytest.raises(SessionStateError, match="on this thread"):
                runtime.unload(loaded)
        told.append(True)

    hook = model.model.norm.register_forward_hook(inside)
    (model if how == "whole" else model.model)(IDS)
    hook.remove()
    assert told
    runtime.unload(other)


def test_a_close_that_was_interrupted_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waited for a pass: models and new sessions go on meanwhile."""
    runtime = Runtime("cpu", **BUDGET)
    models, waits, wait_for = [load(runtime), load(runtime)], [], door_module.wait_for
    runtime.open_session(models[0], max_length=32).forward(IDS)

    def interrupted(*given: object) -> object:
        waits.append(given)
        if len(waits) == 3:  # the runtime's door and the first model's are shut
            raise KeyboardInterrupt
        return wait_for(*given)

    with monkeypatch.context() as patch:
        patch.setattr(door_module, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.close()
    for model in models:
        model(IDS)
        runtime.open_session(model, max_length=32).forward(IDS)
    runtime.close()
    assert runtime.pool.held_bytes == runtime.host.held_bytes == 0


@pytest.mark.parametrize("what", ["unload", "close"])
def test_who_is_interrupted_while_he_waits_for_the_turn_has_unloaded_nothing(
    runtime: Runtime, model, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.open_session(model, max_length=32).forward(IDS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Turn, "__enter__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.close() if what == "close" else runtime.unload(model)
    model(IDS)
    runtime.open_session(model, max_length=32).forward(IDS)
    runtime.unload(model)


def test_two_unload_a_model_at_once(runtime: Runtime, model) -> None:
    with held_in_head(model, lambda: model(IDS)):
        both = [Thread(lambda: runtime.unload(model)) for _ in range(2)]
    assert [thread.end() for thread in both] == [None, None] and runtime.models == ()


def test_close_waits_for_a_load_and_unloads_it() -> None:
    runtime, loading, go = Runtime("cpu", **BUDGET), threading.Event(), threading.Event()
    begun = Thread(lambda: load(runtime, progress=lambda *_: (loading.set(), go.wait(10))))
    assert loading.wait(10)
    closing = Thread(runtime.close)
    closing.join(0.2)
    assert closing.is_alive()
    for late in (lambda: load(runtime), lambda: runtime.resize(4 << 20), lambda: runtime.events):
        with pytest.raises(SessionStateError, match="closed"):
            late()
    go.set()
    assert closing.end() is None
    assert all(parameter.is_meta for parameter in begun.end().parameters())
    assert runtime.pool.held_bytes == runtime.host.held_bytes == 0


def test_a_callback_of_a_load_cannot_close_the_runtime(runtime: Runtime) -> None:
    told = []

    def progress(*_: object) -> None:
        with pytest.raises(SessionStateError, match="under way on this thread"):
            runtime.close()
        told.append(True)

    load(runtime, progress=progress)
    assert told and len(runtime.models) == 1


def test_nothing_stays_where_sessions_are_opened_beside_a_close() -> None:
    """Whoever comes before the door is shut is closed with the others, and whoever comes later is refused."""
    for _ in range(10):
        runtime = Runtime("cpu", **BUDGET)
        model = load(runtime)
        begun = threading.Barrier(3)

        def use(runtime=runtime, model=model, begun=begun) -> object:
            begun.wait()
            while True:
                session = runtime.open_session(model, max_length=32)
                session.forward(IDS)
                session.close()

        users = [Thread(use) for _ in range(2)]
        begun.wait()
        runtime.close()
        assert all(isinstance(user.end(), UsageError) for user in users)
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0
        assert not [each.name for each in threading.enumerate() if each.name in ("djinn-link", "djinn-writer")]


def test_only_open_sessions_of_a_runtime_are_evicted_there(runtime: Runtime, model) -> None:
    session = runtime.open_session(model, max_length=32)
    session.forward(IDS)
    with Runtime("cpu", **BUDGET) as other:
        foreign = other.open_session(load(other), max_length=32)
        foreign.forward(IDS)
        foreign.pause()
        for wrong in (foreign, None):
            with pytest.raises(SessionStateError, match="not an open session of this runtime"):
                runtime.evict(wrong)
        assert other.evict(foreign), "a session that is dirty is written back"
    assert not runtime.evict(session), "it runs"
    session.pause()
    session.close()
    with pytest.raises(SessionStateError, match=f"{session.id}.*not an open session"):
        runtime.evict(session)


def test_a_door_that_nobody_waits_for_any_more_is_open_again(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(lambda: SessionStateError("shut"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(door_module, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            door.shut()
    with door, door, pytest.raises(SessionStateError, match="on this thread"):
        door.shut()
    door.shut()
    with pytest.raises(SessionStateError, match="shut"), door:
        pass
    door.open()
    with door:
        pass
