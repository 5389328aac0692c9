"""Checkpoints: read to the byte what transformers reads, and refused, whole, for what is wrong with them."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from djinn_core.errors import ConfigError, WeightsError
from djinn_core.models import checkpoint, safetensor_file
from djinn_core.models.export import save_checkpoint
from djinn_core.models.source import open_source


def read(source, name):
    shape, dtype = source.meta(name)
    out = torch.empty(shape, dtype=dtype)
    source.read_into(name, out)
    return out


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A checkpoint that transformers wrote, one file."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(3)
    config = open_source("tiny-llama-gqa").config
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(stock, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stock, folder)
    return folder


def rewrite(folder, change):
    """Change the tensors of model.safetensors and write it again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("piece_bytes", [1000, 16 << 20], ids=["pieces", "whole"])
def test_equals_what_transformers_reads(stock, monkeypatch, piece_bytes):
    monkeypatch.setattr(safetensor_file, "READ_BYTES", piece_bytes)
    source = open_source(stock)
    assert (source.kind, source.dtype) == ("checkpoint", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(stock).state_dict()
    assert set(source.names()) == set(theirs)
    assert all(torch.equal(read(source, name), theirs[name]) for name in source.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_converted_in_pieces(stock, monkeypatch, dtype):
    monkeypatch.setattr(safetensor_file, "READ_BYTES", 1000)
    source = open_source(stock, dtype=dtype)
    stored = open_source(stock)
    for name in source.names():
        assert torch.equal(read(source, name), read(stored, name).to(dtype))


def test_shards_are_one_checkpoint(stock, copy):
    model = AutoModelForCausalLM.from_pretrained(stock)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    source = open_source(copy)
    assert all(torch.equal(read(source, name), tensor) for name, tensor in model.state_dict().items())
    assert source.digest == open_source(stock).digest, "the same bytes in other files are the same source"


def test_gpt2_with_and_without_the_outer_prefix(tmp_path):
    config = open_source("tiny-gpt2").config
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "outer")
    model.transformer.save_pretrained(tmp_path / "inner")
    rewrite(tmp_path / "inner", lambda t: t.update({"h.0.attn.bias": torch.ones(1, 1, 4, 4)}))  # as on the hub
    for folder in ("outer", "inner"):
        source = open_source(tmp_path / folder)
        assert "lm_head.weight" not in source.names()
        for name in source.names():
            assert torch.equal(read(source, name), model.state_dict()[name])


def test_tied_weights_stored_twice_must_agree(tmp_path):
    config = open_source("tiny-gpt2").config
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    open_source(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"][200].add_(1))
    with pytest.raises(WeightsError, match=r"wte\.weight and lm_head\.weight are tied by the config and differ"):
        open_source(tmp_path)


def test_only_the_alias_is_stored(tmp_path):
    config = open_source("tiny-gpt2").config
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    wte = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert torch.equal(read(open_source(tmp_path), "transformer.wte.weight"), wte)


def test_missing_extra_and_misshapen_are_all_named_at_once(copy):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.extra_proj.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = torch.ones(255, 64, dtype=torch.bfloat16)

    rewrite(copy, change)
    with pytest.raises(WeightsError) as caught:
        open_source(copy)
    message = str(caught.value)
    assert "missing model.norm.weight" in message
    assert "extra model.layers.0.mlp.extra_proj.weight" in message
    assert "lm_head.weight is [255, 64], the config says [256, 64]" in message


def test_mixed_dtypes_are_refused_with_names(copy):
    rewrite(copy, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    with pytest.raises(WeightsError, match="mixes dtypes") as caught:
        open_source(copy)
    assert "float32: model.norm.weight" in str(caught.value)
    assert "more" in str(caught.value).split("bfloat16: ")[1]


def test_a_truncated_file_is_refused(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    for length, what in [
        (len(data) - 1, "cut short"),
        (len(data) // 2, "cut short"),
        (100, "cut short"),
        (4, "4 bytes"),
    ]:
        file.write_bytes(data[:length])
        with pytest.raises(WeightsError, match=what):
            open_source(copy)
    file.write_bytes(data + b"\0")
    with pytest.raises(WeightsError, match="too long"):
        open_source(copy)


def header_of(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("fault", ["json", "list", "overlap", "shape", "dtype", "length", "offsets"])
def test_a_corrupt_header_is_refused(copy, fault):
    file = copy / "model.safetensors"
    header, body = header_of(file.read_bytes())
    entry = header["model.layers.1.mlp.up_proj.weight"]
    if fault == "json":
        header = b"{" + b"x" * 40
    elif fault == "list":
        header = [header]
    elif fault == "overlap":
        entry["data_offsets"] = [entry["data_offsets"][0] - 2, entry["data_offsets"][1] - 2]
    elif fault == "shape":
        entry["shape"] = [1, *entry["shape"], 2]
    elif fault == "dtype":
        entry["dtype"] = "F8_E4M3"
    elif fault == "offsets":
        entry["data_offsets"] = ["a", "b"]
    data = with_header(header, body)
    if fault == "length":
        data = struct.pack("<Q", 1 << 60) + data[8:]
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"corrupt|F8_E4M3"):
        open_source(copy)


def test_a_file_that_changes_after_opening_is_refused(copy):
    source = open_source(copy)
    file = copy / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100_000)
    out = torch.empty(source.meta("model.norm.weight")[0], dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match="changed since it was opened"):
        source.read_into("model.norm.weight", out)


def test_a_short_read_is_refused(copy):
    source = open_source(copy)
    tensor = source._stored["model.norm.weight"]
    beyond = safetensor_file.StoredTensor(
        tensor.file, tensor.name, tensor.shape, tensor.dtype, (copy / "model.safetensors").stat().st_size - 10, 128
    )
    with pytest.raises(WeightsError, match="10 of 128 bytes"):
        tensor.file.read(beyond, torch.empty(64, dtype=torch.bfloat16))


def test_shards_that_do_not_match_their_index_are_refused(stock, copy):
    (copy / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(stock).save_pretrained(copy, max_shard_size="100KB")
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(weight_map, what):
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=what):
            open_source(copy)

    good = index["weight_map"]
    first, other = sorted(set(good.values()))[:2]
    key = next(name for name, shard in good.items() if shard == first)
    refused(good | {key: other}, rf"{key} is in {first}, and .* says {other}")
    refused(good | {"model.phantom": first}, r"promises tensors that no shard holds: model\.phantom")
    refused(good | {key: "../elsewhere.safetensors"}, "not in its folder")
    path.write_text("{}")
    with pytest.raises(WeightsError, match="no readable weight_map"):
        open_source(copy)
    path.write_text(json.dumps(index))
    (copy / first).unlink()
    with pytest.raises(WeightsError, match=first):
        open_source(copy)


def test_a_folder_without_safetensors_or_config_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"only pytorch_model\.bin; convert it"):
        open_source(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_source(copy)


def test_digest_is_of_content_not_of_place(stock, copy):
    assert open_source(copy).digest == open_source(stock).digest
    assert open_source(copy, dtype="float16").digest != open_source(stock).digest
    rewrite(copy, lambda t: t["model.layers.3.mlp.up_proj.weight"][0, 0].add_(1))
    assert open_source(copy).digest != open_source(stock).digest


def test_generation_config_is_the_checkpoints_own(copy):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 77, "transformers_version": "5.17.0"}))
    assert open_source(copy).generation_config.eos_token_id == 77


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama-gqa"])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 100_000], ids=["one", "shards"])
def test_a_saved_source_is_what_transformers_and_djinn_read_back(tmp_path, name, shard_bytes):
    source = open_source(name, dtype=torch.bfloat16, seed=5)
    folder = save_checkpoint(source, tmp_path / "saved", shard_bytes=shard_bytes)
    back = open_source(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    assert len(list(folder.glob("*.safetensors"))) == 1 or shard_bytes < 4 << 30
    for key in source.names():
        assert torch.equal(read(source, key), theirs.state_dict()[key])
        assert torch.equal(read(source, key), read(back, key))
    assert checkpoint.config_digest(back.config) == checkpoint.config_digest(source.config)
