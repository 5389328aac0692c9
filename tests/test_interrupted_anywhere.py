"""Ctrl-C before any line in a life: everything can be closed, nothing is left behind, and answers stay the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from djinn_core.models.graphs import PROOFS
from djinn_core.runtime import Runtime
from djinn_core.sessions import Session
from djinn_core.sessions.snapshot import load_session
from tests.ctrl_c import Lines
from tests.sessions.oracle import Oracle, equal, prompt, speak
from tests.sessions.rigs import LAYERS, Rig, make_rig
from tests.test_runtime import IDS, LLAMA, stock

UNIT = 64 << 10
SESSION_BYTES = LAYERS * UNIT
PLACES = 60  # of each life, drawn anew when `--seed` is given
CLOSES_IN_S = 20

pytestmark = pytest.mark.timeout(120)


def alone(rig: Rig, sessions: list[Session], _: Path) -> None:
    """A session stops, leaves, comes back, generates, goes back, and branches."""
    session = rig.open()
    sessions.append(session)
    session.forward(prompt(), stop_after=2)
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    session.generate(2)
    point = session.checkpoint()
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume(point)
    session.forward(prompt(tokens=1))
    branch = session.fork()
    sessions.append(branch)
    branch.resume(session.checkpoints[0])
    branch.pause()
    session.resume(point)
    session.drop(point)
    branch.close()


def crowded(rig: Rig, sessions: list[Session], folder: Path) -> None:
    """Four sessions where the device and the host have room for three; one is saved and loaded."""
    for seed in range(4):
        session = rig.open()
        sessions.append(session)
        session.forward(prompt(seed=seed))
        session.forward(prompt(tokens=1), stop_after=2)
        session.pause()
    for index in (2, 0, 3, 1):
        sessions[index].resume()
        sessions[index].forward(prompt(tokens=1))
        sessions[index].pause()
    sessions[0].save(folder / "saved")
    sessions[1].close()
    sessions.append(load_session(folder / "saved", rig.served, rig.sessions))
    sessions[-1].resume()
    sessions[-1].pause()


def loaded(rig: Rig, sessions: list[Session], folder: Path) -> None:
    """A session was saved, and is loaded three times."""
    session = rig.open()
    sessions.append(session)
    session.forward(prompt(), stop_after=2)
    session.save(folder / "saved")
    for _ in range(3):
        sessions.append(load_session(folder / "saved", rig.served, rig.sessions))


def lived(life: Callable[..., None], folder: Path, at: int) -> Lines:
    """`life`, with Ctrl-C before line `at`; then everything is closed, and the rig looks at what is left."""
    crowd = {"device_bytes": 3 * SESSION_BYTES, "host_bytes": 4 * SESSION_BYTES, "disk_bytes": 16 * SESSION_BYTES}
    rig = make_rig(folder, **(crowd if life is crowded else {}))
    sessions: list[Session] = []
    lines, told = Lines(at), False
    try:
        with lines.watched():
            life(rig, sessions, folder)
    except KeyboardInterrupt:
        told = True
    assert told == bool(lines.where), f"Ctrl-C at {lines.where or 'no place'}, and the caller was told: {told}"
    ended: list[object] = []

    def end() -> None:
        try:
            if sessions and sessions[0].checkpoints and sessions[0].checkpoints[0].layer == 2 and life is alone:
                again = sessions[0].resume(sessions[0].checkpoints[0])
                assert torch.equal(again, Oracle(rig.stock).forward(prompt())), "another answer"
            for session in sessions:
                session.close()
            assert lines.on_the_way_out or not rig.sessions.infos(), "a session that nobody was given"
            rig.close()
            assert not list(folder.glob("*.partial-*"))
            ended.append(True)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            ended.append(error)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(CLOSES_IN_S)
    assert ended == [True], f"after Ctrl-C at {lines.where}: {ended or 'it cannot be closed'}"
    return lines


@pytest.mark.parametrize("life", [alone, crowded, loaded], ids=lambda life: life.__name__)
def test_anywhere_in_the_life_of_sessions(life: Callable[..., None], tmp_path: Path, long) -> None:
    lived(life, tmp_path, 0)
    (tmp_path / "all").mkdir()
    count = lived(life, tmp_path / "all", 0).count
    draw = random.Random(long.seed)
    for at in draw.sample(range(1, count), PLACES):
        (tmp_path / str(at)).mkdir()
        lived(life, tmp_path / str(at), at)


def test_anywhere_while_layers_are_recorded_proven_and_chained(tmp_path: Path, monkeypatch, long) -> None:
    """Whoever speaks afterwards says the same, from the same graphs."""
    monkeypatch.setattr("djinn_core.models.graphs.PART", 2)
    tokens = 2 * PROOFS + 2

    def life(at: int, folder: Path) -> Lines:
        folder.mkdir()
        rig, lines = make_rig(folder, graphs=True), Lines(at)
        first = Oracle(rig.stock).forward(prompt())
        session = rig.open()
        session.forward(prompt())
        try:
            with lines.watched():
                speak(session, first, tokens)
        except KeyboardInterrupt:
            assert lines.where
        session.close()
        assert torch.ones(1).add(1).item() == 2, f"a recording was left open by Ctrl-C at {lines.where}"
        assert equal(speak_all(rig, first, tokens), spoken), f"other answers, after Ctrl-C at {lines.where}"
        assert rig.graphs.chained == 1 and not rig.graphs.refused and not rig.graphs.unchained, lines.where
        rig.close()
        return lines

    rig = make_rig(tmp_path, graphs=False)
    oracle = Oracle(rig.stock)
    spoken = oracle.greedy(oracle.forward(prompt()), tokens)
    rig.close()
    count = life(0, tmp_path / "all").count
    for at in random.Random(long.seed).sample(range(1, count), PLACES):
        life(at, tmp_path / str(at))


def speak_all(rig: Rig, first: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """What a session says to the prompt."""
    with rig.open() as session:
        session.forward(prompt())
        return speak(session, first, tokens)


def test_anywhere_while_a_model_is_loaded_and_streams(long) -> None:
    with torch.inference_mode():
        wanted = stock(LLAMA, torch.float32)(IDS).logits

    def life(at: int) -> Lines:
        lines, models, told = Lines(at), [], False
        runtime = Runtime("cpu", budget_bytes=4 << 20, host_bytes=32 << 20)
        try:
            with lines.watched(), torch.inference_mode():
                models.append(runtime.load(LLAMA, dtype="float32", resident_layers="none", slots=3, prove=False))
                models[0](IDS)
                models[0](IDS)
        except KeyboardInterrupt:
            told = True
        assert told == bool(lines.where), lines.where
        for model in models:
            with torch.inference_mode():
                assert torch.equal(model(IDS).logits, wanted), f"other weights, after Ctrl-C at {lines.where}"
        runtime.close()
        assert runtime.pool.held_bytes == runtime.host.held_bytes == 0, lines.where
        return lines

    life(0)
    count = life(0).count
    for at in random.Random(long.seed).sample(range(1, count), PLACES):
        life(at)
