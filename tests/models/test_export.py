"""A saved source is complete or absent, and written once."""

import errno
import multiprocessing
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from djinn_core.errors import ConfigError, OutOfDisk, WeightsError
from djinn_core.models import export
from djinn_core.models.export import fill_model, save_checkpoint
from djinn_core.models.source import open_source
from djinn_core.models.stack import build_meta_model


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_a_complete_folder_is_left_alone_and_an_incomplete_one_written_anew(tmp_path):
    source = open_source("tiny-llama", dtype="bfloat16")
    folder = save_checkpoint(source, tmp_path / "a")
    first = inodes(folder)
    assert inodes(save_checkpoint(source, folder)) == first
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    save_checkpoint(source, folder)
    assert inodes(folder) != first
    assert open_source(folder).names() == source.names()
    other = open_source("tiny-llama", dtype="bfloat16", seed=1)
    save_checkpoint(other, folder)
    name = "lm_head.weight"
    tensors = [torch.empty(other.meta(name)[0], dtype=torch.bfloat16) for _ in range(2)]
    other.read_into(name, tensors[0])
    open_source(folder).read_into(name, tensors[1])
    assert torch.equal(*tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not written by Djinn"):
        save_checkpoint(open_source("tiny-llama"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = open_source("tiny-llama")
    monkeypatch.setattr(export, "_write_all", full)
    with pytest.raises(OutOfDisk) as caught:
        save_checkpoint(source, tmp_path / "a")
    assert caught.value.needed_bytes == 468_096 * 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_and_a_killed_one_is_cleared(tmp_path, monkeypatch):
    source = open_source("tiny-llama")
    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(source, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "model-00009.safetensors").write_bytes(b"half")
    folder = save_checkpoint(source, tmp_path / "a")
    assert not (folder / "model-00009.safetensors").exists()


def _save(folder):
    save_checkpoint(open_source("tiny-llama"), folder)


def test_two_processes_write_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    both = [context.Process(target=_save, args=(tmp_path / "a",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    open_source(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_filling_another_model_is_refused():
    source = open_source("tiny-llama", dtype=torch.float32)
    half = AutoModelForCausalLM.from_config(source.config, dtype=torch.float16)
    before = half.state_dict()["lm_head.weight"].clone()
    with pytest.raises(WeightsError, match="differs"):
        fill_model(half, source)
    assert torch.equal(half.state_dict()["lm_head.weight"], before)
    with pytest.raises(WeightsError, match="meta"):
        fill_model(build_meta_model(source.config, torch.float32), source)
