"""Long work shows a bar on a terminal, and is quiet everywhere else."""

from __future__ import annotations

import io
import logging

import pytest

from workflow.lib import progress
from workflow.lib.progress import Progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal whose text is kept."""
    written, console = io.StringIO(), progress.Console
    monkeypatch.setattr(progress, "Console", lambda **_: console(file=written, force_terminal=True, width=100))
    return written


def test_a_terminal_gets_bars_also_one_inside_another(screen: io.StringIO) -> None:
    shown = Progress("streaming/x", terminal=True)
    with shown.task("load"), shown.loading("read the weights") as reached:
        reached(0, 1000)
        reached(400, 1000)
        shown._shown.refresh()
    assert "streaming/x: load" in screen.getvalue()
    assert "streaming/x: read the weights" in screen.getvalue() and "400/1000" in screen.getvalue()
    assert list(shown.track([1, 2], "again")) == [1, 2]  # the display was given back


def test_a_failure_gives_the_terminal_back(screen: io.StringIO) -> None:
    shown = Progress("x", terminal=True)
    with pytest.raises(ValueError, match="boom"), shown.task("outer"), shown.task("inner"):
        raise ValueError("boom")
    assert shown._shown is None


def test_elsewhere_there_is_a_line_at_the_start_and_one_at_the_end(
    screen: io.StringIO, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("x", terminal=False).loading("load") as reached:
        for done in range(100):
            reached(done, 99)
    assert [record.getMessage()[:12] for record in caplog.records] == ["x: load", "x: load: don"]
    assert screen.getvalue() == ""
    monkeypatch.setattr(progress, "QUIET_INTERVAL_S", -1.0)
    with Progress("x", terminal=False).loading("load") as reached:
        reached(40, 99)
    assert "x: load: 40 of 99" in caplog.text
