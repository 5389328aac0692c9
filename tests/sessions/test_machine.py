"""Random lives of sessions against a reference that replays every pass on the stock model."""

from __future__ import annotations

import shutil
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from djinn_core.errors import SessionStateError
from djinn_core.sessions import SessionState
from djinn_core.sessions.snapshot import load_session
from tests.sessions.lives import HALF, SESSION_BYTES, Life, replay
from tests.sessions.rigs import LAYERS, make_rig

if TYPE_CHECKING:
    from tests.conftest import Long

IDS = st.lists(st.integers(3, 127), min_size=1, max_size=5).map(tuple)
WHICH = st.integers(0, 3)
HINT = st.sampled_from([None, None, 0.0, 0.02, 5.0])  # seconds until it is expected back


class Lives(RuleBasedStateMachine):
    """Up to four sessions on a device that holds about three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        sizes = {"device_bytes": 4 * SESSION_BYTES, "host_bytes": 12 * SESSION_BYTES, "disk_bytes": 24 * SESSION_BYTES}
        self.rig = make_rig(self.folder, **sizes)
        self.lives: list[Life] = []
        self.saved = 0

    def teardown(self) -> None:
        self.rig.close()
        shutil.rmtree(self.folder)

    def pick(self, which: int) -> Life:
        return self.lives[which % len(self.lives)]

    def awake(self, which: int) -> Life:
        """A running one; at most one is, so that memory always suffices."""
        life = self.pick(which)
        for other in self.lives:
            if other is not life and other.session.state in (SessionState.RUNNING, SessionState.RESUMING):
                other.session.pause()
        if life.session.state is not SessionState.RUNNING or life.stopped:
            self.wake(life, False)
        return life

    def wake(self, life: Life, edit: bool) -> None:
        try:
            out = life.session.resume(edits=[HALF] if edit and life.stopped else [])
        except SessionStateError:
            if life.stopped or life.session.state is not SessionState.RUNNING:
                raise
            out = None  # it was on its way, and has come meanwhile
        life.resumed(out, edit)

    @precondition(lambda self: len(self.lives) < 4)
    @rule()
    def open(self) -> None:
        self.lives.append(Life(self.rig.open(), (), None, {}))

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, ids=IDS)
    def run(self, which: int, ids: tuple[int, ...]) -> None:
        life = self.awake(which)
        if life.session.length + len(ids) <= 48:
            life.passes = (*life.passes, (ids, 0))
            assert torch.equal(life.session.forward(torch.tensor([ids])), replay(life.passes))

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, ids=IDS, layer=st.integers(1, LAYERS), pause=st.booleans(), release=st.booleans())
    def stop(self, which: int, ids: tuple[int, ...], layer: int, pause: bool, release: bool) -> None:
        life = self.awake(which)
        if life.session.length + len(ids) <= 48:
            point = life.session.forward(torch.tensor([ids]), stop_after=layer)
            life.stopped = (ids, layer)
            life.points[point.id] = (life.passes, life.stopped)
            if pause:
                life.session.pause(release=release)

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, release=st.booleans(), hint=HINT)
    def pause(self, which: int, release: bool, hint: float | None) -> None:
        self.pick(which).session.pause(release=release, expected_resume_s=hint)  # again, if it is paused already

    @precondition(lambda self: self.lives)
    @rule(which=WHICH)
    def prefetch(self, which: int) -> None:
        self.pick(which).session.prefetch()

    @precondition(lambda self: self.lives)
    @rule(which=WHICH)
    def evict(self, which: int) -> None:
        life = self.pick(which)
        if life.session.state is SessionState.PAUSED:
            assert self.rig.sessions.pager.evict(life.session._holding)  # a hint may bring it back at once

    @precondition(lambda self: self.lives)
    @rule(which=WHICH, edit=st.booleans())
    def resume(self, which: int, edit: bool) -> None:
        life = self.pick(which)
        if life.stopped or life.session.state is not SessionState.RUNNING:
            for other in self.lives:
                if other is not life and other.session.state in (SessionState.RUNNING, SessionState.RESUMING):
                    other.session.pause()
            self.wake(life, edit)

    @precondition(lambda self: self.lives)
    @rule(which=WHICH)
    def checkpoint(self, which: int) -> None:
        life = self.pick(which)
        if len(life.points) < 4:
            point = life.session.checkpoint()
            life.points[point.id] = (life.passes, life.stopped)

    @precondition(lambda self: any(life.points for life in self.lives))
    @rule(which=WHICH, number=WHICH, edit=st.booleans())
    def go_back(self, which: int, number: int, edit: bool) -> None:
        life = self.awake(which)
        if life.points:
            name = sorted(life.points)[number % len(life.points)]
            life.passes, life.stopped = life.points[name]
            point = next(p for p in life.session.checkpoints if p.id == name)
            life.resumed(life.session.resume(point, edits=[HALF] if edit and life.stopped else []), edit)

    @precondition(lambda self: self.lives and len(self.lives) < 4)
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        life = self.pick(which)
        self.lives.append(Life(life.session.fork(), life.passes, life.stopped, dict(life.points)))

    @precondition(lambda self: self.lives)
    @rule(which=WHICH)
    def save_and_load(self, which: int) -> None:
        life = self.pick(which)
        self.saved += 1
        folder = self.folder / f"saved{self.saved}"
        old = [point.id for point in life.session.checkpoints]
        life.session.save(folder)
        life.session.close()
        life.reloaded(load_session(folder, self.rig.served, self.rig.sessions), old)
        shutil.rmtree(folder)

    @precondition(lambda self: self.lives)
    @rule(which=WHICH)
    def close(self, which: int) -> None:
        life = self.pick(which)
        self.lives.remove(life)
        life.session.close()

    @invariant()
    def adds_up(self) -> None:
        for life in self.lives:
            assert life.session.length == sum(len(ids) for ids, _ in life.passes) + (
                len(life.stopped[0]) if life.stopped and life.stopped[1] == LAYERS else 0
            )
            if life.session.state is SessionState.SWAPPED:
                assert life.session.device_bytes == 0 or life.session._holding.jobs

    @invariant()
    def remembers_right(self) -> None:
        """What was remembered of a session's bytes is what they are."""
        for life in self.lives:
            holding = life.session._holding
            with self.rig.sessions.pager.lock:
                if holding.being_brought or holding.moving:
                    continue
                if holding.state is SessionState.PAUSED:
                    assert holding.seems_to_free() == holding.own_device_bytes
                elif holding.state is SessionState.SWAPPED:
                    assert holding.seems_to_miss() == holding.missing_bytes


SETTINGS = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
Lives.TestCase.settings = SETTINGS
TestLives = Lives.TestCase


@pytest.mark.long
def test_long_lives(long: Long) -> None:
    """Random lives of a hundred steps each, for half of the time that was asked for."""
    end_s = time.monotonic() + long.seconds / 2
    longer = settings(SETTINGS, max_examples=5, stateful_step_count=100, derandomize=False, database=None)
    for number in count(long.seed):
        run_state_machine_as_test(seed(number)(Lives), settings=longer)
        if time.monotonic() > end_s:
            return
