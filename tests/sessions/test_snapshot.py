"""A saved session goes on in another process, bit for bit; a damaged or foreign one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from djinn_core.errors import IntegrityError, UsageError
from djinn_core.sessions import Sampling
from djinn_core.sessions.snapshot import MEANING, TENSORS, load_session
from tests.sessions.oracle import Oracle, left_padded, prompt
from tests.sessions.rigs import MakeRig, Rig

ROOT = Path(__file__).resolve().parents[2]
CONTINUE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from djinn_core.sessions import Sampling
from djinn_core.sessions.snapshot import load_session
from tests.sessions.rigs import make_rig
folder = Path(sys.argv[1])
rig = make_rig(folder)
session = load_session(folder / "saved", rig.served, rig.sessions)
logits = session.resume()
new = session.generate(6, sampling=Sampling(do_sample=True, eos_token_id=()))
save_file({"logits": logits, "new": new}, folder / "out.safetensors")
session.close()
rig.close()
"""


def test_goes_on_in_another_process(rig: Rig, tmp_path: Path) -> None:
    session = rig.open(batch_size=2)
    session.forward(prompt(2), left_padded(2, 12))
    session.generate(3, sampling=Sampling(do_sample=True, seed=5, eos_token_id=()))
    session.forward(prompt(2, 4, seed=8), stop_after=3)
    session.save(tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "out.safetensors")
    assert torch.equal(there["logits"], session.resume())
    assert torch.equal(there["new"], session.generate(6, sampling=Sampling(do_sample=True, eos_token_id=())))


@pytest.mark.parametrize("family", ["gqa", "gpt2", "mistral"])
def test_checkpoints_come_along(make_rig: MakeRig, tmp_path: Path, family) -> None:
    rig = make_rig(family, torch.bfloat16)
    session = rig.open()
    logits = session.forward(prompt())
    session.checkpoint()
    session.forward(logits.float().argmax(-1)[:, None], stop_after=2)
    session.pause(release=True)
    session.save(tmp_path / "saved")
    held = rig.host.held_bytes
    session.close()
    other = load_session(tmp_path / "saved", rig.served, rig.sessions)
    assert other.device_bytes == 0 and rig.host.held_bytes <= held
    oracle = Oracle(rig.stock)
    first = oracle.forward(prompt())
    second = oracle.greedy(first, 1)[0]
    assert torch.equal(other.resume(), second)
    other.resume(other.checkpoints[0])
    assert torch.equal(other.forward(first.float().argmax(-1)[:, None]), second)


def damage_tensors(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(data)


def damage_meaning(folder: Path) -> None:
    text = (folder / MEANING).read_text()
    (folder / MEANING).write_text(text.replace('"stopped": 0', '"stopped": null'))


def shorten(folder: Path) -> None:
    os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size - 8)


def other_version(folder: Path) -> None:
    meaning = json.loads((folder / MEANING).read_text())
    (folder / MEANING).write_text(json.dumps({**meaning, "version": 2}))


@pytest.mark.parametrize("damage", [damage_tensors, damage_meaning, shorten, other_version])
def test_a_damaged_folder_is_refused(rig: Rig, tmp_path: Path, damage) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    session.save(tmp_path / "saved")
    damage(tmp_path / "saved")
    held = rig.host.held_bytes
    with pytest.raises(IntegrityError):
        load_session(tmp_path / "saved", rig.served, rig.sessions)
    assert rig.host.held_bytes == held and len(rig.sessions.infos()) == 1


def test_a_foreign_folder_is_refused(make_rig: MakeRig, tmp_path: Path) -> None:
    rig, other = make_rig("llama"), make_rig("gqa")
    session = rig.open()
    session.forward(prompt())
    session.save(tmp_path / "saved")
    with pytest.raises(IntegrityError, match="another model"):
        load_session(tmp_path / "saved", other.served, other.sessions)
    with torch.no_grad():
        rig.served.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(IntegrityError, match="another model"):  # the same but for one weight
        load_session(tmp_path / "saved", rig.served, rig.sessions)
    save_file({"x": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(IntegrityError, match="no saved session"):
        load_session(tmp_path, rig.served, rig.sessions)
    with pytest.raises(UsageError, match="exists already"):
        session.save(tmp_path / "saved")
