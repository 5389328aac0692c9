"""What a model may be named by."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from djinn_core.errors import ConfigError
from djinn_core.models.export import save_checkpoint
from djinn_core.models.source import architectures, open_source

REPOSITORY = Path(__file__).parents[2]


def test_a_name_a_file_and_a_config_are_the_same_source(tmp_path, monkeypatch):
    path = REPOSITORY / "config" / "models" / "tiny-llama.json"
    monkeypatch.chdir(tmp_path)
    sources = [
        open_source(what) for what in ("tiny-llama", path, str(path), LlamaConfig(**json.loads(path.read_text())))
    ]
    assert len({source.digest for source in sources}) == 1
    assert {source.kind for source in sources} == {"seeded"}


def test_the_current_directory_goes_first(tmp_path, monkeypatch):
    folder = tmp_path / "config" / "models"
    folder.mkdir(parents=True)
    fields = json.loads(architectures()["tiny-llama"].read_text())
    (folder / "mine.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    (folder / "tiny-llama.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    monkeypatch.chdir(tmp_path)
    assert open_source("mine").config.num_hidden_layers == 1
    assert open_source("tiny-llama").config.num_hidden_layers == 3
    assert "llama-2-13b" in architectures()


@pytest.mark.parametrize("source", ["no-such-model", "no/such/folder/at/all", "./absent", Path("nowhere")])
def test_an_unknown_model_is_refused_with_what_there_is(source):
    with pytest.raises(ConfigError, match=r"neither a folder.*tiny-llama"):
        open_source(source)


def test_a_hub_id_is_looked_for_in_the_cache_only(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="not in the local Hugging Face cache"):
        open_source("djinn/no-such-model")


def test_a_hub_id_in_the_cache_is_opened(tmp_path, monkeypatch):
    repository = tmp_path / "models--djinn--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    source = open_source("tiny-llama", dtype="float16", seed=2)
    save_checkpoint(source, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = open_source("djinn/tiny")
    assert cached.names() == source.names()


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "is not JSON"), ("[]", "model_type"), ("{}", "model_type"), ('{"model_type": "nonsense"}', "nonsense")],
)
def test_a_wrong_architecture_file_is_refused(tmp_path, text, what):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        open_source(path)
    with pytest.raises(ConfigError, match="cannot read"):
        open_source(tmp_path / "absent.json")


def test_dtypes_by_name():
    assert open_source("tiny-llama").dtype == torch.float32
    assert open_source("tiny-llama", dtype="bfloat16").dtype == torch.bfloat16
    for wrong in ("int8", "double-trouble"):
        with pytest.raises(ConfigError, match=wrong):
            open_source("tiny-llama", dtype=wrong)
