"""Long days: threads that open, run, stop, edit, branch, save, load and close sessions on a device too small for them.

Every pass is compared with the stock model's, bit for bit; a watchdog fails a thread that gets nothing done, and one
that stays in a single call; the rig fails on a byte that is still held when all is closed. On an ample day nothing is
refused, on a tight one much, and what is refused is tried again. `--long S` says for how many seconds, `--seed N` with
what.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

from djinn_core.errors import CapacityError
from djinn_core.sessions import SessionState
from djinn_core.sessions.snapshot import load_session
from tests.sessions.lives import HALF, SESSION_BYTES, Life, replay
from tests.sessions.rigs import LAYERS, MakeRig, Rig

if TYPE_CHECKING:
    from tests.conftest import Long

THREADS = 6
LIVES = 4  # of one thread
MAX_LENGTH = 48
WATCHDOG_S = 60.0
CALL_S = 4.0  # of one call; who waits in a circle is let go after `tiers.PATIENCE_S`, which is more
ALL_HAPPENS_S = 30.0  # by then every kind of move has been made, on a slow machine too
AWAY = (SessionState.PAUSED, SessionState.SWAPPED)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Day:
    """What there is room for.

    Attributes:
        device, host, disk: in sessions; the slots for boundaries take one of the device's.
        points: of one session; saving it takes all of their blocks on the host at once, and more would not fit there.
        refusals: there may be some; what is refused is tried again.
    """

    device: int
    host: int
    disk: int
    points: int
    refusals: bool


AMPLE = Day(9, 20, 80, points=12, refusals=False)
TIGHT = Day(4, 4, 80, points=2, refusals=True)


class Person(threading.Thread):
    """One caller with a few sessions, one of them running at a time.

    Attributes:
        did: how often each operation was done, and `refused` where a tier had no room.
        moved_s: when it last did something.
        called_s: when the call began that it is in, None between two.
        end_s: when it stops.
    """

    def __init__(self, rig: Rig, day: Day, number: int, seed: int, folder: Path, end_s: float) -> None:
        super().__init__(name=f"person-{number}", daemon=True)
        self.rig = rig
        self.day = day
        self.draw = random.Random(f"{seed} {number}")
        self.folder = folder / self.name
        self.lives: list[Life] = []
        self.did: Counter[str] = Counter()
        self.moved_s = time.monotonic()
        self.called_s: float | None = None
        self.doing = "nothing yet"
        self.error: BaseException | None = None
        self.end_s = end_s

    def run(self) -> None:
        operations = [
            (self.forward, 6),
            (self.stop, 5),
            (self.pause, 5),
            (self.resume, 5),
            (self.go_back, 4),
            (self.checkpoint, 2),
            (self.forget, 1),
            (self.fork, 2),
            (self.evict, 2),
            (self.prefetch, 1),
            (self.wait, 1),
            (self.save_and_load, 1),
            (self.close, 1),
        ]
        chosen, weights = zip(*operations, strict=True)
        try:
            while time.monotonic() < self.end_s:
                if not self.lives:
                    self.open()
                    continue
                operation = self.draw.choices([*chosen, self.open], [*weights, 2])[0]
                self.doing = operation.__name__
                operation()
                self.did[self.doing] += 1
                self.moved_s = time.monotonic()
            for life in self.lives:
                self.insist(life.session.close, life)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error = error

    # how it goes about it

    def some(self) -> Life:
        return self.draw.choice(self.lives)

    def only(self, life: Life) -> Life:
        """All others of this thread's are paused, so that nobody waits while holding what another one needs."""
        for other in self.lives:
            if other is not life and other.session.state not in AWAY:
                self.leave(other, 0.3)
        return life

    def hint(self) -> float | None:
        return self.draw.choice([None, None, 0.0, 0.02, 0.3])

    def timed(self, call: Callable[[], Result]) -> Result:
        """One call, which `watch` has an eye on."""
        self.called_s = time.monotonic()
        try:
            return call()
        finally:
            self.called_s = None

    def insist(self, call: Callable[[], Result], life: Life | None = None) -> Result:
        """Until there is room. What was refused is whole, and gives its own memory up before the next try."""
        while True:
            try:
                return self.timed(call)
            except CapacityError:
                self.did["refused"] += 1
                if not self.day.refusals or time.monotonic() - self.moved_s > WATCHDOG_S / 2:
                    raise
                if life is not None and life.session.state not in AWAY:
                    self.timed(life.session.pause)
                time.sleep(0.02 * self.draw.random())

    def leave(self, life: Life, released: float) -> None:
        release, hint = self.draw.random() < released, self.hint()
        self.timed(lambda: life.session.pause(release=release, expected_resume_s=hint))

    def awake(self) -> Life:
        """A session that stands between two passes. It need not be on the device any more."""
        life = self.only(self.some())
        if life.stopped:
            self.wake(life)
        return life

    def wake(self, life: Life) -> None:
        edit = life.stopped is not None and self.draw.random() < 0.5
        life.resumed(self.insist(lambda: life.session.resume(edits=[HALF] if edit else []), life), edit)

    def ids(self, life: Life) -> tuple[int, ...]:
        room = MAX_LENGTH - life.session.length
        return tuple(self.draw.randrange(3, 128) for _ in range(min(room, self.draw.randint(1, 5))))

    def run_pass(self, life: Life, ids: tuple[int, ...], **options: int) -> object:
        def call() -> object:
            if life.session.state in AWAY:
                life.session.resume()
            return life.session.forward(torch.tensor([ids]), **options)

        return self.insist(call, life)

    # what it does

    def open(self) -> None:
        if len(self.lives) < LIVES:
            self.lives.append(Life(self.insist(lambda: self.rig.open(MAX_LENGTH)), (), None, {}))

    def forward(self) -> None:
        life = self.awake()
        if ids := self.ids(life):
            life.passes = (*life.passes, (ids, 0))
            assert torch.equal(self.run_pass(life, ids), replay(life.passes))

    def stop(self) -> None:
        life = self.awake()
        if (ids := self.ids(life)) and len(life.points) < self.day.points:
            layer = self.draw.randint(1, LAYERS)
            point = self.run_pass(life, ids, stop_after=layer)
            life.stopped = (ids, layer)
            life.points[point.id] = (life.passes, life.stopped)
            if self.draw.random() < 0.7:
                self.leave(life, 0.5)

    def pause(self) -> None:
        life = self.some()
        if life.session.state is SessionState.RUNNING:
            self.leave(life, 0.5)
            time.sleep(0.01 * self.draw.random())

    def resume(self) -> None:
        life = self.only(self.some())
        if life.stopped or life.session.state in AWAY:
            self.wake(life)

    def go_back(self) -> None:
        life = self.only(self.some())
        if life.points:
            name = self.draw.choice(sorted(life.points))
            life.passes, life.stopped = life.points[name]
            edit = life.stopped is not None and self.draw.random() < 0.5
            point = next(p for p in life.session.checkpoints if p.id == name)
            out = self.insist(lambda: life.session.resume(point, edits=[HALF] if edit else []), life)
            life.resumed(out, edit)

    def checkpoint(self) -> None:
        life = self.some()
        if len(life.points) < max(1, self.day.points // 3):
            life.points[self.timed(life.session.checkpoint).id] = (life.passes, life.stopped)

    def forget(self) -> None:
        life = self.some()
        for point in life.session.checkpoints:
            if point is not life.session.stopped:
                self.timed(partial(life.session.drop, point))
                life.points.pop(point.id)
                return

    def fork(self) -> None:
        life = self.some()
        if len(self.lives) < LIVES:
            self.lives.append(Life(self.insist(life.session.fork), life.passes, life.stopped, dict(life.points)))

    def evict(self) -> None:
        holding = self.some().session._holding
        with contextlib.suppress(CapacityError):  # it stays where it is
            self.timed(lambda: self.rig.sessions.pager.evict(holding))

    def prefetch(self) -> None:
        self.timed(self.some().session.prefetch)

    def wait(self) -> None:
        """Until someone is clean, which others may prevent."""
        life = self.some()
        if life.session.state in AWAY:
            with contextlib.suppress(CapacityError, TimeoutError):
                self.timed(lambda: life.session.wait_until("clean", 0.5))

    def save_and_load(self) -> None:
        life = self.some()
        folder = self.folder / "saved"
        old = [point.id for point in life.session.checkpoints]
        self.insist(lambda: life.session.save(folder), life)
        self.insist(life.session.close, life)
        self.lives.remove(life)  # others may take its room
        life.reloaded(self.insist(lambda: load_session(folder, self.rig.served, self.rig.sessions)), old)
        self.lives.append(life)
        shutil.rmtree(folder)

    def close(self) -> None:
        life = self.some()
        self.insist(life.session.close, life)
        self.lives.remove(life)


def watch(people: list[Person], seed: int) -> None:
    """Return when all have ended well; fail as soon as one has not, or gets nothing done, or waits in a call."""
    while any(person.is_alive() for person in people):
        for person in people:
            person.join(0.1)
            if person.error is not None:
                break
            now_s, called_s = time.monotonic(), person.called_s
            slow = called_s is not None and now_s - called_s > CALL_S
            if person.is_alive() and (slow or now_s - person.moved_s > WATCHDOG_S):
                faulthandler.dump_traceback(sys.__stderr__)
                raise AssertionError(f"{person.name} hangs in {person.doing}, with --seed {seed}")
        else:
            continue
        break
    for person in people:
        person.end_s = 0.0  # whoever still works stops, before all is taken down
    for person in people:
        person.join(WATCHDOG_S)
    for person in people:
        if person.error is not None:
            raise AssertionError(f"{person.name}, in {person.doing}, with --seed {seed}") from person.error


def spend(day: Day, make_rig: MakeRig, tmp_path: Path, long: Long) -> tuple[Counter[str], set[str]]:
    """What was done how often, and the kinds of events."""
    sizes = {"device_bytes": day.device, "host_bytes": day.host, "disk_bytes": day.disk}
    rig = make_rig(**{name: size * SESSION_BYTES for name, size in sizes.items()})
    end_s = time.monotonic() + long.seconds
    people = [Person(rig, day, number, long.seed, tmp_path, end_s) for number in range(THREADS)]
    for person in people:
        person.folder.mkdir()
        person.start()
    watch(people, long.seed)
    did = sum((person.did for person in people), Counter())
    print(dict(did))
    assert not rig.sessions.pager.holdings and rig.kv_bytes == 0
    return did, {event.event for event in rig.sessions.pager.events}


@pytest.mark.long
def test_a_long_day(make_rig: MakeRig, tmp_path: Path, long: Long) -> None:
    did, kinds = spend(AMPLE, make_rig, tmp_path, long)
    if long.seconds >= ALL_HAPPENS_S:
        assert {"swap_in", "swap_out", "evict", "disk_write", "disk_read", "prefetched"} <= kinds
    assert not did["refused"]


@pytest.mark.long
def test_a_tight_day(make_rig: MakeRig, tmp_path: Path, long: Long) -> None:
    did, kinds = spend(TIGHT, make_rig, tmp_path, long)
    assert {"swap_in", "swap_out", "evict", "disk_write", "disk_read"} <= kinds
    assert did["refused"], "it was not tight"
