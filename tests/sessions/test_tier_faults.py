"""A disk or a host that fails under paused sessions: each stays whole where it was, and everyone else goes on."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from djinn_core.errors import DeviceError, DjinnError, OutOfDeviceMemory, OutOfDisk, OutOfHostMemory, PinningRefused
from djinn_core.memory import disktier, hostmapping
from djinn_core.sessions import Session, SessionState, tiers
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import MakeRig, Rig

BLOCK_BYTES = 64 << 10
SESSION_BYTES = 4 * BLOCK_BYTES

pytestmark = pytest.mark.timeout(90)


class Broken:
    """Replaces a call by a failure from its `nth` on, until it is healed."""

    def __init__(self, monkeypatch, owner: object, name: str, fail: Callable, nth: int = 1) -> None:
        self.on, self.fired, self.calls = True, 0, 0
        call = getattr(owner, name)

        def either(*args):
            self.calls += 1
            if not self.on or self.calls < nth:
                return call(*args)
            self.fired += 1
            return fail(call, *args)

        monkeypatch.setattr(owner, name, either)


class Story:
    """A session and its oracle, a token at a time."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._oracle = Oracle(rig.stock)
        self.session: Session = rig.open()
        self._ids = prompt(seed=seed)
        self._wanted = self._oracle.forward(self._ids)

    def step(self) -> None:
        """One pass more, equal to the bit, from whatever state; it can be tried again when it raises."""
        if self.session.state is not SessionState.RUNNING:
            self.session.resume()
        assert torch.equal(self.session.forward(self._ids), self._wanted)
        self._ids = self._wanted.float().argmax(-1)[:, None]
        self._wanted = self._oracle.forward(self._ids)

    def pause(self) -> None:
        if self.session.state in (SessionState.RUNNING, SessionState.RESUMING):
            self.session.pause()


def raising(code: int) -> Callable:
    def fail(call, *args):
        raise OSError(code, os.strerror(code))

    return fail


def half_a_write(call, fd: int, buffers: list, offset: int) -> int:
    """The file system takes one unit, and then it is full."""
    if len(buffers[0]) <= disktier.UNIT_BYTES:
        raise OSError(errno.ENOSPC, "no space left")
    return call(fd, [buffers[0][: disktier.UNIT_BYTES]], offset)


DISK_FAULTS = {
    "full in the middle of a block": (disktier.os, "pwritev", half_a_write, OutOfDisk),
    "writes fail": (disktier.os, "pwritev", raising(errno.EIO), DeviceError),
    "reads fail": (disktier.os, "preadv", raising(errno.EIO), DeviceError),
    "room is not taken back": (disktier.libc, "punch_hole", raising(errno.EIO), DeviceError),
}


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_a_disk_that_fails_under_paused_sessions(make_rig: MakeRig, monkeypatch, fault) -> None:
    """Host and device are full, so that every turn needs the disk. What fails is told, and lost is nothing."""
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.2)
    rig = make_rig(device_bytes=4 * SESSION_BYTES, host_bytes=4 * SESSION_BYTES, disk_bytes=32 * SESSION_BYTES)
    stories = [Story(rig, seed) for seed in range(9)]
    for story in stories:
        story.step()
        story.pause()
    assert rig.disk.held_bytes
    owner, name, fail, kind = DISK_FAULTS[fault]
    broken = Broken(monkeypatch, owner, name, fail)
    told: list[DjinnError] = []
    done = 0
    for story in stories:
        try:
            story.step()
            done += 1
        except DjinnError as error:
            told.append(error)
        story.pause()
    assert broken.fired and done, "the fault was not met, or it stopped everyone"
    causes = [cause for error in told for cause in chain(error)]
    logged = [event.event for event in rig.sessions.pager.events if "stays" in event.event or "not b" in event.event]
    assert any(isinstance(cause, kind) for cause in causes) or logged, (told, logged)
    assert not any(story.session.state is SessionState.FAILED for story in stories)
    broken.on = False
    for _ in range(2):
        for story in reversed(stories):
            story.step()
            story.pause()


def chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *chain(error.__cause__)]


def no_addresses(call, size_bytes: int, alignment: int, *protection: int) -> int:
    if protection:  # a region's, on the emulated device
        return call(size_bytes, alignment, *protection)
    raise OSError(errno.ENOMEM, "no addresses")


HOST_FAULTS = {
    "no addresses": (hostmapping.libc, "map_aligned", no_addresses, OutOfHostMemory),
    "no pages": (hostmapping.libc, "advise", raising(errno.ENOMEM), OutOfHostMemory),
    "not pinned": (None, "pin", None, PinningRefused),
}


def refuse(call, address: int, size_bytes: int) -> None:
    raise PinningRefused("refused by the test", needed_bytes=size_bytes, free_bytes=0)


@pytest.mark.parametrize("slabs", [0, 1], ids=["none", "one slab"])
@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_host_that_gives_nothing_under_paused_sessions(make_rig: MakeRig, monkeypatch, fault, slabs) -> None:
    """A slab is half a session: with one, write-backs end in the middle. Nobody leaves, and everyone goes on."""
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.2)
    rig = make_rig(device_bytes=4 * SESSION_BYTES, host_bytes=8 * SESSION_BYTES)
    owner, name, fail, kind = HOST_FAULTS[fault]
    rig.host.prepare(slabs * 2 * BLOCK_BYTES)
    broken = Broken(monkeypatch, owner or rig.device, name, fail or refuse)
    stories = [Story(rig, seed) for seed in range(4)]
    for story in stories[:3]:
        story.step()
        story.pause()
        with pytest.raises(kind):
            story.session.wait_until("clean", 10)
    with pytest.raises(OutOfDeviceMemory, match="no other paused session can leave"):
        stories[3].step()
    assert broken.fired
    for story in stories[:3]:
        assert story.session.state is SessionState.PAUSED and story.session.device_bytes
        story.step()
        story.pause()
    broken.on = False
    for story in (stories[3], *stories[:3]):
        story.step()
        story.pause()
        story.session.wait_until("clean", 10)
        rig.sessions.pager.evict(story.session._holding)
        assert story.session.device_bytes == 0
    for story in stories:
        story.step()
        story.pause()


def test_a_resume_without_room_anywhere_does_not_wait_for_itself(make_rig: MakeRig) -> None:
    """Whoever should leave for it finds the host full; what would free some there is the resume that waits."""
    rig = make_rig(device_bytes=2 * SESSION_BYTES, host_bytes=2 * SESSION_BYTES)
    away, here = Story(rig, 1), Story(rig, 2)
    others = rig.host.allocate(2 * BLOCK_BYTES, "others")
    away.step()
    away.session.pause(release=True)
    away.session.wait_until("released", 10)
    here.step()
    here.pause()
    began_s = time.monotonic()
    with pytest.raises(OutOfDeviceMemory):
        away.step()
    assert time.monotonic() - began_s < tiers.PATIENCE_S / 2
    here.session.close()
    away.step()
    others.free()


def test_resumes_at_once_beside_a_full_host_use_the_disk(make_rig: MakeRig) -> None:
    """Who waits for the thread that makes room is not waited for, and what he has on the host may be spilled."""
    rig = make_rig(device_bytes=3 * SESSION_BYTES, host_bytes=2 * SESSION_BYTES, disk_bytes=100 * SESSION_BYTES)
    away = [Story(rig, seed) for seed in range(2)]
    for story in away:
        story.step()
        story.session.pause(release=True)
        story.session.wait_until("released", 10)
    here = [Story(rig, seed) for seed in (2, 3)]
    for story in here:
        story.step()
    gate, took_s, refused = threading.Barrier(3), [], []

    def come_back(story: Story) -> None:
        gate.wait()
        began_s = time.monotonic()
        while time.monotonic() - began_s < 8:
            try:
                story.step()
                break
            except (OutOfDeviceMemory, OutOfHostMemory) as error:
                refused.append(error)  # the others had not paused yet
                time.sleep(0.01)
        took_s.append(time.monotonic() - began_s)
        story.pause()

    threads = [threading.Thread(target=come_back, args=(story,)) for story in away]
    for thread in threads:
        thread.start()
    gate.wait()
    for story in here:
        story.pause()
    for thread in threads:
        thread.join()
    assert max(took_s) < tiers.PATIENCE_S / 2, (took_s, refused[-1:])
