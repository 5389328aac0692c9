"""Real DeepSpeed on a tiny model: it answers as the stock model does; its grid survives a point that does not fit."""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from workflow.lib.harness import Experiment, Outcome
from workflow.lib.results import Result
from workflow.scripts.streaming_systems.base import source_of, stock_model
from workflow.scripts.streaming_systems.resident import answers, seeded_prompt

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

CONFIG = {"model": {"name": "tiny-llama", "path": None, "seed": 0}, "dtype": "bfloat16", "cap_bytes": 1 << 20}


class Quiet:
    def task(self, what):
        return nullcontext()


@pytest.fixture
def exp(tmp_path) -> Experiment:
    return Experiment(
        Result("streaming", "test", "cpu", {}), dict(CONFIG), {}, "cpu", None, Quiet(), tmp_path / "a.json"
    )


@pytest.fixture(scope="module")
def peers():
    return pytest.importorskip("workflow.scripts.streaming_systems.deepspeed_peers")


def test_the_grid_is_in_layers(peers) -> None:
    points = peers.grid_points(1000)
    assert len(points) == len(peers.grid_points(1)) >= 4
    assert points[2]["stage3_prefetch_bucket_size"] == 2840 and points[2]["stage3_max_live_parameters"] == 6310
    assert all(point["stage3_prefetch_bucket_size"] <= point["stage3_max_live_parameters"] for point in points)


def test_a_point_that_does_not_fit_is_left_out_and_the_answers_stay_right(exp, peers) -> None:
    source = source_of(CONFIG)
    prompt = seeded_prompt(source.config.vocab_size, 9, 0, torch.device("cpu"))
    tried = []

    def timed_pass(loaded) -> float:
        tried.append(1)
        layer = loaded.model.module.model.layers[1].mlp if len(tried) in (1, 5) else None
        hook = layer.register_forward_pre_hook(run_out) if layer else None
        try:
            with torch.inference_mode():
                loaded.model(input_ids=prompt, use_cache=False)
        finally:
            if hook:
                hook.remove()
        return 1.0 / len(tried)

    def run_out(*_) -> None:
        raise torch.OutOfMemoryError("as the cap would have it")

    with peers.cpu_tuned(exp, timed_pass) as loaded, torch.inference_mode():
        first = answers(loaded.model, prompt, 2)
        best = loaded.settings["deepspeed"]
    points = peers.grid_points(1)
    assert len(exp.result.extra["grid_out_of_memory"]) == 2
    assert exp.config["grid"][0] == {} and len(exp.config["grid"]) == 1 + len(points)
    assert {s["point"] for s in exp.result.samples} == {1, 3, 4}, "of those that were not made to run out"
    assert best["param_persistence_threshold"] == points[-1]["stage3_param_persistence_threshold"]
    with torch.inference_mode():
        assert first.same(answers(stock_model(source, "cpu"), prompt, 2))


def test_a_cap_that_holds_no_point_says_so(exp, peers) -> None:
    def timed_pass(loaded) -> float:
        raise torch.OutOfMemoryError("never")

    with pytest.raises(Outcome, match="holds no point") as raised, peers.cpu_tuned(exp, timed_pass):
        pass
    assert raised.value.status == "out_of_memory"


def test_what_is_missing_for_async_io_is_named(exp, peers, monkeypatch) -> None:
    monkeypatch.setattr(peers.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(Outcome, match="apt install libaio-dev") as raised, peers.nvme(exp):
        pass
    assert raised.value.status == "unsupported"


@pytest.fixture
def builds(peers, tmp_path, monkeypatch) -> list[bool]:
    """A cache folder with the lock that a killed build left; each build says whether it found that lock."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "lock").touch()
    found: list[bool] = []
    monkeypatch.setattr(peers.AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    monkeypatch.setattr(
        peers.AsyncIOBuilder, "load", lambda self, verbose: found.append((tmp_path / "async_io" / "lock").exists())
    )
    return found


def test_the_lock_of_a_killed_build_does_not_stop_the_next(peers, builds) -> None:
    assert peers.async_io_missing() is None
    assert builds == [False]


def test_the_lock_of_a_build_under_way_is_left_alone(peers, builds, tmp_path: Path) -> None:
    with (tmp_path / "async_io" / "djinn.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        second = threading.Thread(target=peers.async_io_missing)
        second.start()
        second.join(0.3)
        assert second.is_alive() and not builds
        assert (tmp_path / "async_io" / "lock").exists()
    second.join(30)
    assert builds == [False]


def test_the_lock_of_a_build_that_did_not_ask_stays(peers, builds, tmp_path: Path) -> None:
    with (tmp_path / "async_io" / "lock").open():
        assert peers.async_io_missing() is None
    assert builds == [True]


def test_a_cache_that_cannot_be_written_is_named(peers, builds, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "async_io" / "lock"))
    assert "was not built" in peers.async_io_missing()


def test_a_disk_too_small_says_the_bytes(exp, peers, monkeypatch) -> None:
    monkeypatch.setattr(peers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 7}))
    with pytest.raises(Outcome, match="of disk for the parameters, have 7"):
        peers.nvme_folder(exp)


def test_what_a_killed_run_left_on_the_disk_goes(exp, peers, tmp_path: Path) -> None:
    left, other = tmp_path / f"{peers.NVME_PREFIX}abc" / "zero_stage_3", tmp_path / "dmon_deepspeed_nvme.csv"
    left.mkdir(parents=True)
    (left / "0_param.tensor.swp").write_bytes(bytes(100))
    other.touch()
    assert peers.nvme_folder(exp) == str(tmp_path)
    assert list(tmp_path.iterdir()) == [other]
