"""Inference mode belongs to a caller: a session that was opened in it is used outside, and the other way round."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from djinn_core.sessions.edits import Scale
from djinn_core.sessions.snapshot import load_session
from tests.sessions.oracle import Oracle, equal, likely, prompt
from tests.sessions.rigs import MakeRig


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("opened_inside", [False, True])
def test_each_step_may_be_in_the_other_mode(make_rig: MakeRig, tmp_path: Path, graphs, opened_inside) -> None:
    rig = make_rig(graphs=graphs)
    oracle = Oracle(rig.stock)
    wanted = [oracle.forward(prompt())]
    wanted += oracle.greedy(wanted[0], 5)
    inside = opened_inside

    def mode() -> AbstractContextManager:
        """The mode that the step before was not in."""
        nonlocal inside
        inside = not inside
        return torch.inference_mode() if not inside else nullcontext()

    with mode():
        session = rig.open()
    with mode():
        said = [session.forward(prompt())]
    for layer in (1, 3):
        with mode():
            session.forward(likely(said[-1]), stop_after=layer)
        with mode():
            session.pause(release=True)
            session.wait_until("released", 10)
        with mode():
            said.append(session.resume())
    with mode():
        said.append(session.forward(likely(said[-1])))
    with mode():
        stopped = session.forward(likely(said[-1]), stop_after=2)
    with mode():
        fork = session.fork()
    with mode():
        edited = fork.resume(edits=[Scale(0.5)])
    with mode():
        said.append(session.resume(stopped))
    assert not torch.equal(edited, said[-1])
    with mode():
        session.pause()
        session.save(tmp_path / "saved")
    with mode():
        loaded = load_session(tmp_path / "saved", rig.served, rig.sessions)
    with mode():
        loaded.resume()
        said.append(loaded.forward(likely(said[-1])))
    assert equal(said, wanted)
