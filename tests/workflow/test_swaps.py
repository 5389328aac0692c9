"""How long swaps ran alone and together, against intervals whose answer can be seen; and the log of events."""

import json
import subprocess
import sys

import pytest
import torch

from workflow.scripts.pressure_systems.swaps import overlap


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_that_never_begins_leaves_a_log_that_says_so(tmp_path):
    """The rule promises the log; without it the result that tells the reason would be deleted."""
    command = [sys.executable, "-m", "workflow.scripts.pressure", "--run", "h200", "--system", "djinn"]
    done = subprocess.run([*command, "--out", str(tmp_path / "pressure/djinn.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "pressure/djinn.json").read_text())["status"] == "unsupported"
    assert (tmp_path / "pressure/pressure.log").read_text().startswith("# no event")
