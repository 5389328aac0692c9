"""Files that promise what cannot be: each is refused by name, with an error of Djinn's own."""

import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from djinn_core.errors import ConfigError, UnsupportedModel, WeightsError
from djinn_core.models.export import save_checkpoint
from djinn_core.models.folder import INDEX, SINGLE
from djinn_core.models.safetensor_file import SafetensorFile
from djinn_core.models.source import open_source

DEEP = "[" * 100_000


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(open_source("tiny-llama-gqa", dtype="bfloat16", seed=1), tmp_path / "checkpoint")


def entry(**fields):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields}


@pytest.mark.parametrize(
    "header",
    [
        entry(data_offsets=[0.0, 16.0]),
        entry(data_offsets=[0.5, 16.5]),
        entry(data_offsets=["0", "16"]),
        entry(data_offsets=[False, 16]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 16, 16]),
        entry(data_offsets=[0, float("inf")]),
        entry(data_offsets=[-16, 0]),
        entry(data_offsets=[16, 0]),
        entry(data_offsets=[0, 1600], shape=[400]),
        entry() | {"b": entry(data_offsets=[8, 16], shape=[2])["a"]},
        entry(shape=[4.0]),
        entry(shape=["4"]),
        entry(shape=[True, 4]),
        entry(shape=[-2, -2]),
        entry(shape=[1 << 70]),
        entry(shape=None),
        entry(dtype=["F32"]),
        entry(dtype={}),
        entry(dtype="F8_E4M3"),
        {"a": {}},
        {"a": [1]},
        {"a": None},
        [],
        None,
        DEEP,
    ],
    ids=lambda header: json.dumps(header)[:70],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    text = (header if header is DEEP else json.dumps(header)).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        SafetensorFile(path)


def test_a_header_beyond_the_file_and_a_folder_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + b"{}")
    for what in (path, tmp_path):
        with pytest.raises(WeightsError, match=str(what)):
            SafetensorFile(what)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("hidden_size", "num_hidden_layers") for value in ("32", None, 2.5, 0, -4, [], {})),
        *(("num_key_value_heads", value) for value in ("2", 2.5, 0, -2)),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("intermediate_size", 0),
        ("head_dim", 0),
        ("max_position_embeddings", 0),
        ("sliding_window", 10**30),
        ("hidden_size", 10**30),
        ("model_type", "nonsense"),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("rms_norm_eps", "small"),
        ("rope_parameters", 3),
    ],
)
def test_a_config_that_lies_is_refused_with_its_file(folder, tmp_path, field, value):
    config = folder / "config.json"
    text = json.dumps(json.loads(config.read_text()) | {field: value})
    config.write_text(text)
    alone = tmp_path / "alone.json"
    alone.write_text(text)
    for source, file in ((folder, config), (alone, alone)):
        with pytest.raises(ConfigError, match=str(file)):
            open_source(source)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", "{", DEEP], ids=lambda text: text[:4])
def test_a_config_that_is_no_object_with_a_type_is_refused(folder, text):
    folder = folder.rename(folder.with_name("llama"))  # a name by which transformers guesses the type
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"llama/config\.json"):
        open_source(folder)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 1 << 60), ("hidden_act", "nonsense")])
def test_a_config_that_no_model_can_be_built_from_is_refused(folder, field, value):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UnsupportedModel, match="llama: transformers builds no"):
        open_source(folder)


def test_a_read_error_while_the_digest_is_made_names_the_tensor(folder, monkeypatch):
    file = SafetensorFile(folder / SINGLE)
    tensor = file.tensors["model.norm.weight"]
    whole = torch.empty(tensor.size_bytes, dtype=torch.uint8)
    file.read_range(tensor, 0, whole)
    assert file.sample(tensor, 6) == bytes(whole[[*range(6), *range(29, 35), *range(58, 64)]].tolist())

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("pread", "preadv"):
        monkeypatch.setattr(os, call, broken)
    with pytest.raises(WeightsError, match=rf"model\.norm\.weight from {folder / SINGLE}: Input/output error"):
        file.sample(tensor, 6)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "num_hidden_layers": 10**30},
        {"model_type": "qwen2", "num_hidden_layers": 10**30},  # whose config makes a list of its layers
        {"model_type": "gpt2", "n_layer": 1001},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**30}},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_layers_without_end_are_refused_before_any_is_built(folder, tmp_path, fields):
    alone = tmp_path / "deep.json"
    for file, source in ((alone, alone), (folder / "config.json", folder)):
        file.write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match=rf"{file}: n\w+ is 10\d+; at most 1000 layers"):
            open_source(source)
    if fields["model_type"] == "llama":
        with pytest.raises(ConfigError, match=r"the llama config: num_hidden_layers is 10+; at most 1000 layers"):
            open_source(LlamaConfig(**fields))


def test_heads_that_do_not_share_evenly_are_refused_with_both_numbers(tmp_path):
    fields = open_source("tiny-llama-gqa").config.to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 3}
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(fields))
    for source in (path, LlamaConfig(**fields)):
        with pytest.raises(ConfigError, match="num_attention_heads 4 is no multiple of num_key_value_heads 3"):
            open_source(source)


@pytest.mark.parametrize("text", ["[]", "null", "{", DEEP, '{"compile_config": 3}'], ids=lambda text: text[:20])
def test_a_generation_config_that_lies_is_refused(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        open_source(folder)


@pytest.mark.parametrize(
    "name", [3, None, [1], {}, "", ".", "..", "../x", "/x", "a\0b", "a" * 5000], ids=lambda name: repr(name)[:9]
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(folder, name):
    single = (folder / SINGLE).rename(folder / "part.safetensors")
    (folder.parent / "x").write_bytes(single.read_bytes())
    names = SafetensorFile(single).tensors
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(WeightsError, match=INDEX):
        open_source(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"weight_map": 3}', '{"weight_map": [["a", "part"]]}', DEEP])
def test_an_index_without_a_map_is_refused(folder, text):
    (folder / SINGLE).rename(folder / "part")
    (folder / INDEX).write_text(text)
    with pytest.raises(WeightsError, match="no readable weight_map"):
        open_source(folder)


def test_the_single_file_goes_before_the_index_as_in_transformers(folder):
    tensors = load_file(folder / SINGLE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "part.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    source = open_source(folder)
    for name in source.names():
        shape, dtype = source.meta(name)
        out = torch.empty(shape, dtype=dtype)
        source.read_into(name, out)
        assert torch.equal(out, theirs[name])
