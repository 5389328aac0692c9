"""The sessions' table and the memory's say the same."""

from __future__ import annotations

import torch

from djinn_core import Runtime
from djinn_core.memory import Ledger
from djinn_core.sessions import SessionTable
from tests.sessions.oracle import likely, prompt
from tests.sessions.rigs import MakeRig, Rig, config_of, wait_for

SESSION_BYTES = 4 * (64 << 10)


def in_all(table: SessionTable, where: str) -> int:
    return sum(getattr(info, f"{where}_bytes") - getattr(info, f"shared_{where}_bytes") for info in table)


def adds_up(rig: Rig) -> bool:
    memory, table = Ledger(rig.pool, rig.host, rig.disk).snapshot(), rig.sessions.infos()
    held = (memory.kv_bytes, memory.host_held_bytes, memory.disk_held_bytes)
    return held == tuple(in_all(table, where) for where in ("device", "host", "disk"))


def check(rig: Rig) -> SessionTable:
    """The rows, which add up as soon as nothing is on its way from one tier to another."""
    wait_for(lambda: adds_up(rig))
    return rig.sessions.infos()


def test_the_rows_add_up(make_rig: MakeRig) -> None:
    """With boundaries, branches, and what lies on each tier."""
    rig = make_rig(device_bytes=4 * SESSION_BYTES, host_bytes=4 * SESSION_BYTES, disk_bytes=32 * SESSION_BYTES)
    sessions = [rig.open() for _ in range(6)]
    for seed, session in enumerate(sessions):
        stopped = session.forward(prompt(seed=seed), stop_after=2)
        check(rig)
        logits = session.resume()
        session.forward(likely(logits))
        if seed % 2:
            session.resume(stopped)
        session.pause(release=seed == 2)
    twin = sessions[-1].fork()
    table = check(rig)
    assert table[-1].id == twin.id and table[-1].host_bytes == table[-1].shared_host_bytes
    assert rig.disk.held_bytes and rig.kv_bytes
    last = str(table).splitlines()[-1].split()
    assert last == ["all", *(f"{in_all(table, where):,}" for where in ("device", "host", "disk"))]
    twin.resume()
    twin.forward(torch.tensor([[5]]))
    sessions[-1].close()
    assert check(rig)[-1].shared_host_bytes == 0


def test_beside_a_models_weights() -> None:
    with Runtime("cpu", budget_bytes=8 << 20, host_bytes=64 << 20, pinning="optional") as runtime:
        model = runtime.load(config_of("llama"), dtype="float32", resident_layers="none", prove=False)
        weights = runtime.memory().host_held_bytes
        assert weights
        with runtime.open_session(model, max_length=48) as session:
            session.forward(prompt(), stop_after=3)
            session.pause(release=True)
            session.wait_until("released", 10)
            (row,) = runtime.sessions()
            assert row.host_bytes == runtime.memory().host_held_bytes - weights > 0
