"""How long swaps ran alone and together, against intervals whose answer can be seen; and the log of events."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from workflow.scripts.pressure_systems.swaps import overlap, record


@pytest.mark.parametrize(
    ("first", "second", "spans"),
    [
        ([], [], (0, 0, 0)),
        ([(0, 10)], [], (10, 0, 0)),
        ([(0, 10)], [(4, 6)], (8, 0, 2)),
        ([(0, 4), (2, 8)], [(6, 10)], (6, 2, 2)),
        ([(0, 1), (5, 6)], [(1, 5)], (2, 4, 0)),
    ],
)
def test_overlap(first, second, spans):
    assert overlap(first, second) == pytest.approx(spans)


def test_the_rate_of_swaps_is_held_against_the_link_around_the_whole_result():
    """Of 10 ms in, 10 out and 10 both ways: each against the rate of its own kind."""
    at = SimpleNamespace
    kept, exp = {}, at(at_end=[], result=at(limits={"before": {"h2d_gbps": 1.0}}))
    exp.result.sample = lambda metric, value, unit, **dims: kept.setdefault(metric, []).append((value, dims))
    events = [
        at(event="swap_in", session="s7", bytes=800_000_000, copies=(0.0, 20.0)),
        at(event="swap_out", session="s8", bytes=700_000_000, copies=(10.0, 30.0)),
        at(event="evict", session="s8", bytes=700_000_000, copies=None),
    ]
    record(exp, events, at(elapsed_time=lambda event: event), {"s7": 0, "s8": 1}, {"seed": 3})
    assert kept["swap_in_ms"] == [(20.0, {"seed": 3, "session": 0})]
    assert kept["swap_out_bytes"] == [(700_000_000, {"seed": 3, "session": 1})]
    assert kept["evicted_bytes"] == [(700_000_000, {"seed": 3})]
    assert "swap_rate_ratio" not in kept, "the link has not been measured again yet"
    exp.result.limits |= {"h2d_gbps": 50.0, "d2h_gbps": 40.0, "bidirectional_gbps": 80.0}
    for late in exp.at_end:
        late()
    assert kept["swap_rate_ratio"] == [(pytest.approx(1.5 / (0.5 + 0.4 + 0.8)), {"seed": 3})]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_that_never_begins_leaves_a_log_that_says_so(tmp_path):
    """The rule promises the log; without it the result that tells the reason would be deleted."""
    command = [sys.executable, "-m", "workflow.scripts.pressure", "--run", "h200", "--system", "djinn"]
    done = subprocess.run([*command, "--out", str(tmp_path / "pressure/djinn.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "pressure/djinn.json").read_text())["status"] == "unsupported"
    assert (tmp_path / "pressure/pressure.log").read_text().startswith("# no event")
