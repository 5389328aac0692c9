"""A source's bytes for everyone else: as a checkpoint folder for the peers, or into a model that has memory.

Invariant: a folder under its final name is complete. It is written under a name of its own, by one process at a time,
and renamed at the end; what a killed process left behind is written anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from djinn_core.errors import ConfigError, OutOfDisk, WeightsError
from djinn_core.models.identity import dtype_name
from djinn_core.models.safetensor_file import DTYPE_NAMES
from djinn_core.models.source import WeightSource
from djinn_core.models.stack import TensorSpec, build_meta_model, tensor_specs

SHARD_BYTES = 4 << 30
_WRITE_BYTES = 64 << 20
_RECORD = "djinn.json"


def save_checkpoint(source: WeightSource, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write `source` as a folder that `from_pretrained` reads to the same bytes; a folder already so is left alone.

    On the host it takes one buffer of the largest tensor's size.

    Raises:
        ConfigError: `folder` exists and is not one that this function wrote.
        OutOfDisk: the file system cannot hold it; nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    with _sole_writer(partial):
        if _is_written(folder, source.digest):
            shutil.rmtree(partial)
            return folder
        if folder.exists() and not (folder / _RECORD).is_file():
            shutil.rmtree(partial)
            raise ConfigError(f"{folder} exists and was not written by Djinn; name another folder or remove it")
        try:
            _write(source, partial, shard_bytes)
        except OSError as error:
            free_bytes = shutil.disk_usage(partial).free
            shutil.rmtree(partial)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutOfDisk(f"writing {folder}", needed_bytes=_total_bytes(source), free_bytes=free_bytes) from error
        except BaseException:
            shutil.rmtree(partial)
            raise
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return folder


def fill_model(model: PreTrainedModel, source: WeightSource) -> None:
    """Read all tensors of `source` into a model that already has memory, wherever that is; tied weights stay tied.

    Raises:
        WeightsError: the model is not of the source's config and dtype, or lies on the meta device; nothing was read.
    """
    specs = tensor_specs(model)
    wanted = {name: TensorSpec(name, *source.meta(name)) for name in source.names()}
    if specs != wanted:
        differing = sorted(name for name in specs.keys() | wanted.keys() if specs.get(name) != wanted.get(name))
        raise WeightsError(f"{type(model).__name__} differs from {source!r} in {', '.join(differing[:5])}")
    state = model.state_dict()
    if any(state[name].is_meta for name in specs):
        raise WeightsError(f"{type(model).__name__} is on the meta device and has no memory to fill; use bind")
    for name in specs:
        place = state[name]
        if place.device.type == "cpu" and place.is_contiguous():
            source.read_into(name, place)
        else:
            staging = torch.empty(place.shape, dtype=place.dtype)
            source.read_into(name, staging)
            place.copy_(staging)


@contextmanager
def _sole_writer(partial: Path) -> Iterator[None]:
    """Hold the folder `partial`, empty, for this process; wait for another that holds it."""
    while True:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
            break
        os.close(handle)  # the other one has renamed it
    try:
        for left in partial.iterdir():
            left.unlink()
        yield
    finally:
        os.close(handle)


def _is_written(folder: Path, digest: str) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record["digest"] == digest and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _total_bytes(source: WeightSource) -> int:
    return sum(TensorSpec(name, *source.meta(name)).size_bytes for name in source.names())


def _write(source: WeightSource, folder: Path, shard_bytes: int) -> None:
    total_bytes, free_bytes = _total_bytes(source), shutil.disk_usage(folder).free
    if total_bytes > free_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    shards = list(_shards(source, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(source, specs, folder / file)
        weight_map |= {spec.name: file for spec in specs}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    model = build_meta_model(source.config, source.dtype)
    config = json.loads(source.config.to_json_string(use_diff=True))
    config |= {"architectures": [type(model).__name__], "dtype": dtype_name(source.dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = source.generation_config or GenerationConfig.from_model_config(source.config)
    generation.save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _RECORD).write_text(json.dumps({"digest": source.digest, "files": files}, indent=1) + "\n")


def _shards(source: WeightSource, shard_bytes: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size_bytes = 0
    for spec in (TensorSpec(name, *source.meta(name)) for name in source.names()):
        if shard and size_bytes + spec.size_bytes > shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(spec)
        size_bytes += spec.size_bytes
    yield shard


def _write_shard(source: WeightSource, specs: Iterable[TensorSpec], path: Path) -> None:
    specs = list(specs)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.size_bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = torch.empty(max(spec.size_bytes for spec in specs), dtype=torch.uint8)
    with path.open("wb", buffering=0) as file:
        _write_all(file, struct.pack("<Q", len(text)) + text)
        for spec in specs:
            out = buffer[: spec.size_bytes].view(spec.dtype).view(spec.shape)
            source.read_into(spec.name, out)
            _write_all(file, buffer[: spec.size_bytes].numpy())
        os.fsync(file.fileno())


def _write_all(file: RawIOBase, data: bytes | np.ndarray) -> None:
    view = memoryview(data)
    for begin in range(0, len(view), _WRITE_BYTES):
        piece = view[begin : begin + _WRITE_BYTES]
        while len(piece):
            piece = piece[file.write(piece) :]
