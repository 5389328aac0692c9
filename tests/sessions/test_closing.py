"""Closing the runtime beside others; a broken disk; messages that name whose state it is and the next step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from djinn_core.errors import DjinnError, SessionStateError
from djinn_core.sessions import SessionState
from tests.sessions.alone import alone
from tests.sessions.oracle import prompt
from tests.sessions.rigs import MakeRig, Rig
from tests.sessions.test_tiers import corrupt

UNIT = 64 << 10
pytestmark = pytest.mark.timeout(60)

RUNTIME = """
import sys, threading, time
from pathlib import Path
import torch
from transformers import LlamaConfig
from djinn_core.errors import DjinnError, SessionStateError
from djinn_core.sessions import SessionState
from djinn_core.runtime import Runtime
UNIT = 64 << 10
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                     num_attention_heads=4, max_position_embeddings=256)
ids = torch.tensor([[5, 6, 7]])
def make(**settings):
    runtime = Runtime("cpu", budget_bytes=64 << 20, **{"host_bytes": 64 << 20, **settings})
    model = runtime.load(config, prove=False, dtype=torch.float32)
    return runtime, model, runtime.open_session(model, max_length=48)
"""

STOPPING = (
    RUNTIME
    + """
runtime, model, session = make()
told, closed = [], []
def run():
    try:
        session.forward(ids, stop_after=2)
    except DjinnError as error:
        told.append(error)
def close():
    try:
        runtime.close()
    except BaseException as error:
        closed.append(error)
with runtime.turn:                 # somebody computes
    closing = threading.Thread(target=close)
    closing.start()
    time.sleep(0.3)
    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
closing.join(10)
thread.join(10)
print("told", told, "closed", closed)
assert not closed
"""
)


def test_the_runtime_is_closed_while_a_stopping_pass_waits(tmp_path: Path) -> None:
    done = alone(STOPPING, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-300:])


SAVING = (
    RUNTIME
    + """
runtime, model, session = make()
session.forward(ids)
from djinn_core.sessions import snapshot
write, inside, closed = snapshot.write_tensors, threading.Event(), threading.Event()
def slow(*args):
    inside.set()
    closed.wait(3)                 # a disk that takes its time
    return write(*args)
snapshot.write_tensors = slow
def save():
    try:
        session.save(Path(sys.argv[1]) / "saved")
    except DjinnError as error:
        print("told", error)
saving = threading.Thread(target=save)
saving.start()
inside.wait(10)
runtime.close()
closed.set()
saving.join(10)
print("whole")
"""
)


def test_the_runtime_is_closed_while_a_session_is_saved(tmp_path: Path) -> None:
    done = alone(SAVING, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-300:])


FORKS = (
    RUNTIME
    + """
import djinn_core.sessions.tiers as tiers
tiers.PATIENCE_S = 0.2
runtime, model, session = make(host_bytes=5 * UNIT)   # enough to load the model
session.close()
session = runtime.open_session(model, max_length=200)  # eight units of KV on the device
session.forward(ids)
session.fork()
threads = threading.active_count()
try:
    runtime.close()
    failed = None
except DjinnError as error:
    failed = error
runtime.close()
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("djinn-")]
print(type(failed).__name__, failed, left, runtime.pool.held_bytes)
assert failed is None and not left and not runtime.pool.held_bytes
"""
)


def test_a_runtime_with_a_branch_and_little_host_memory_closes(tmp_path: Path) -> None:
    done = alone(FORKS, tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout[-700:], done.stderr[-300:])


@pytest.mark.parametrize("disk", [False, True])
def test_a_broken_disk_is_no_worse_than_none(make_rig: MakeRig, monkeypatch, disk: bool) -> None:
    rig = make_rig(host_bytes=8 * UNIT, disk_bytes=64 * UNIT if disk else 0)
    monkeypatch.setattr("djinn_core.sessions.tiers.PATIENCE_S", 0.2)
    away, here = rig.open(), rig.open()
    for seed, session in enumerate((away, here)):
        session.forward(prompt(seed=seed))
        session.pause(release=session is away)
        session.wait_until("released" if session is away else "clean", 10)
    assert rig.host.free_bytes == 0

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("djinn_core.memory.disktier.os.pwritev", fail)
        rig.sessions.pager.tiers.allocate(UNIT, "whoever must have room").free()


@pytest.mark.parametrize("what", ["kv", "boundary"])
def test_a_lost_block_says_whose_it_was(make_rig: MakeRig, what: str) -> None:
    rig = make_rig(disk_bytes=64 * UNIT)
    session = rig.open()
    session.forward(prompt(tokens=1), stop_after=2)
    pager = rig.sessions.pager
    with pager.lock:
        assert pager.lock.wait_for(lambda: session.stopped.boundary.settled, 10)
    session.pause(release=True)
    session.wait_until("released", 10)
    stored = session.stopped.boundary if what == "boundary" else next(iter(session._holding.table))
    assert pager.tiers._spill(session._holding, stored)
    corrupt(rig.disk, stored.disk.offset)
    with pytest.raises(DjinnError) as caught:
        session.resume()
        session.forward(torch.tensor([[5]]))
    print(caught.value, session.state)
    assert f"session {session.id}" in str(caught.value)


def test_waiting_for_what_was_not_asked_names_the_way(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt())
    session.pause()
    session.wait_until("clean", 10)
    with pytest.raises(DjinnError) as caught:
        session.wait_until("released", 2)
    assert "release=True" in str(caught.value), str(caught.value)


def test_waiting_for_a_write_back_of_a_session_that_runs_ends_at_once(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt())
    begun_s = time.monotonic()
    with pytest.raises(SessionStateError, match=f"session {session.id} cannot become clean.*pause it first"):
        session.wait_until("clean", 10)
    assert time.monotonic() - begun_s < 5


def test_closing_everything_from_ones_own_pass_is_refused(rig: Rig) -> None:
    session, other = rig.open(), rig.open()
    wanted = other.forward(prompt())
    told = []

    def close(*_) -> None:
        with pytest.raises(SessionStateError, match=f"session {session.id} is in use by this thread") as caught:
            rig.sessions.close()
        told.append(caught.value)

    hook = rig.served.model.layers[1].register_forward_pre_hook(close)
    logits = session.forward(prompt())
    hook.remove()
    assert told and torch.equal(logits, wanted)
    assert other.state is SessionState.RUNNING
