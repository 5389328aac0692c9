"""A checkpoint: a folder with config.json and safetensors files, as on the Hugging Face hub.

Invariant: opening one reads every header and compares every tensor with the model of config.json; a folder that opens
lacks nothing, and reading it can fail only by the disk or by a file that changes.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from djinn_core.errors import WeightsError
from djinn_core.models.config_file import believed, check_sizes, read_fields
from djinn_core.models.folder import INDEX, weights_file
from djinn_core.models.identity import config_digest, dtype_name
from djinn_core.models.safetensor_file import READ_BYTES, SafetensorFile, StoredTensor
from djinn_core.models.seeded import check_destination
from djinn_core.models.stack import build_meta_model, tensor_specs, tied_names

_SAMPLE_BYTES = 4096
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")


class CheckpointSource:
    """The tensors of a folder of safetensors, under the model's own names.

    Attributes:
        folder: where it lies.
        stored_dtype: what its floating tensors are stored as; `dtype` is what they are read as.
        digest: of the config, both dtypes and a sample of every tensor's bytes, so that a copied or moved folder keeps
            it, and another fine-tune of the same architecture does not share it.
    """

    kind = "checkpoint"

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        self.folder = folder.resolve()
        self.config = _read_config(self.folder)
        self.generation_config = _read_generation_config(self.folder)
        stored = _read_headers(self.folder)
        self.stored_dtype = _one_dtype(self.folder, stored.values())
        self.dtype = dtype or self.stored_dtype
        if self.dtype not in _FLOATS:
            raise WeightsError(f"{self.folder}: {dtype_name(self.dtype)} is not served; ask for dtype float32 or less")
        model = build_meta_model(self.config, self.dtype)
        self._specs = tensor_specs(model)
        self._stored = _match(self.folder, model, stored)
        self.digest = self._digest()

    def __repr__(self) -> str:
        return f"CheckpointSource({str(self.folder)!r}, {dtype_name(self.dtype)})"

    def names(self) -> tuple[str, ...]:
        """Every tensor once, in the model's order; tied names are left out."""
        return tuple(self._specs)

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """The shape and dtype of a tensor."""
        spec = self._specs[name]
        return spec.shape, spec.dtype

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor into `out`, a contiguous CPU tensor of its shape and dtype. Complete when it returns.

        Raises:
            WeightsError: fewer bytes than the header promised, or the file changed since it was opened.
        """
        check_destination(name, out, *self.meta(name))
        stored = self._stored[name]
        if stored.dtype == out.dtype:
            stored.file.read(stored, out)
        else:
            stored.file.read_converted(stored, out)

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"checkpoint\0{config_digest(self.config)}\0{self.stored_dtype}\0{self.dtype}".encode())
        for name, stored in self._stored.items():
            digest.update(f"\0{name}\0{list(stored.shape)}\0".encode())
            digest.update(stored.file.sample(stored, _SAMPLE_BYTES))
        return digest.hexdigest()


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    read_fields(path)  # transformers would guess a missing `model_type` from the folder's name
    return check_sizes(believed(path, lambda: AutoConfig.from_pretrained(folder, local_files_only=True)), path)


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    return believed(path, lambda: GenerationConfig.from_pretrained(folder, local_files_only=True))


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor: of model.safetensors, or of all the shards in model.safetensors.index.json."""
    file = weights_file(folder)
    return _read_shards(file) if file.name == INDEX else SafetensorFile(file).tensors


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} has no readable weight_map: {error!r}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index} has no readable weight_map: it must be an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    absent = [name for name in names if not os.path.isfile(index.parent / name)]
    if outside or absent:
        raise WeightsError(f"{index} names shards that are not in its folder: {', '.join((outside + absent)[:5])}")
    stored: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in SafetensorFile(index.parent / name).tensors.items():
            if weight_map.get(key) != name:
                raise WeightsError(f"{key} is in {name}, and {index} says {weight_map.get(key, 'nothing of it')}")
            stored[key] = tensor
    missing = sorted(set(weight_map) - set(stored))
    if missing:
        raise WeightsError(f"{index} promises tensors that no shard holds: {_some(missing)}")
    return stored


def _one_dtype(folder: Path, tensors: Iterable[StoredTensor]) -> torch.dtype:
    groups: dict[torch.dtype, list[str]] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            groups.setdefault(tensor.dtype, []).append(tensor.name)
    if len(groups) != 1:
        found = "; ".join(f"{dtype_name(dtype)}: {_some(names)}" for dtype, names in groups.items())
        raise WeightsError(f"{folder} mixes dtypes, which no single run can serve exactly ({found or 'no weights'})")
    return next(iter(groups))


def _match(folder: Path, model: PreTrainedModel, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensor behind each of the model's names; all problems in one message."""
    tied = tied_names(model)
    prefix = f"{model.base_model_prefix}."

    def key_of(name: str) -> str | None:
        # A checkpoint of the inner model alone (GPT-2 on the hub) lacks the outer model's prefix, or has one too many.
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((key for key in candidates if key in stored), None)

    aliases: dict[str, list[str]] = {}
    for alias, kept in tied.items():
        aliases.setdefault(kept, []).append(alias)
    found: dict[str, StoredTensor] = {}
    used: set[str] = set()
    problems = []
    for name, spec in tensor_specs(model).items():
        keys = [key for key in map(key_of, (name, *aliases.get(name, ()))) if key is not None]
        used.update(keys)
        if not keys:
            problems.append(f"missing {name}")
        elif any(stored[key].shape != spec.shape for key in keys):
            problems.append(f"{keys[0]} is {list(stored[keys[0]].shape)}, the config says {list(spec.shape)}")
        elif any(not _same_bytes(stored[keys[0]], stored[key]) for key in keys[1:]):
            problems.append(f"{' and '.join(keys)} are tied by the config and differ in the files")
        elif stored[keys[0]].dtype.is_floating_point != spec.dtype.is_floating_point:
            problems.append(f"{keys[0]} is {dtype_name(stored[keys[0]].dtype)}, the model has {dtype_name(spec.dtype)}")
        else:
            found[name] = stored[keys[0]]
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
    extra = [key for key in stored if key not in used and not any(re.search(pattern, key) for pattern in known)]
    problems += [f"extra {key}" for key in extra]
    if problems:
        raise WeightsError(f"{folder} does not fit its config.json: {_some(problems, '; ')}")
    return found


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (torch.empty(min(a.size_bytes, READ_BYTES), dtype=torch.uint8) for _ in range(2))
    for begin in range(0, a.size_bytes, READ_BYTES):
        count = min(READ_BYTES, a.size_bytes - begin)
        for tensor, piece in ((a, left), (b, right)):
            tensor.file.read_range(tensor, begin, piece[:count])
        if not torch.equal(left[:count], right[:count]):
            return False
    return True


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
