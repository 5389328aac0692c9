"""Rigs as fixtures: each is closed after its test, and must hold nothing then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from djinn_core.device.base import Stream
from djinn_core.device.hostgraph import HostGraph
from tests.sessions import rigs


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[rigs.MakeRig]:
    """A factory of rigs."""
    made: list[rigs.Rig] = []

    def make(*args, **options) -> rigs.Rig:
        made.append(rigs.make_rig(tmp_path, *args, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: rigs.MakeRig) -> rigs.Rig:
    return make_rig()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[HostGraph]:
    """Every replay from now on."""
    seen: list[HostGraph] = []
    plain = HostGraph.replay

    def replay(self: HostGraph, stream: Stream) -> None:
        seen.append(self)
        plain(self, stream)

    monkeypatch.setattr(HostGraph, "replay", replay)
    return seen
