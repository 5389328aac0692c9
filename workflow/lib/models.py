"""Shapes and sizes of the models that the presets name, from their architecture files alone.

The sizes are for checks of the settings and for the estimate of what a run needs; what a run moves is counted where
it is moved.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from djinn_core.models.folder import find_folder

ARCHITECTURES = Path(__file__).resolve().parents[2] / "config" / "models"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@dataclass(frozen=True)
class Shape:
    """Depth and sizes in bytes of one model in one dtype; `kv_bytes_per_token` is that of all layers."""

    name: str
    layers: int
    layer_bytes: int
    other_bytes: int
    kv_bytes_per_token: int
    max_positions: int | None

    @property
    def weight_bytes(self) -> int:
        return self.layers * self.layer_bytes + self.other_bytes


def architecture(model: dict[str, Any]) -> dict[str, Any] | None:
    """The `config.json` of a preset's model: its checkpoint's (None without one), else config/models/NAME.json."""
    if model.get("path"):
        folder = find_folder(model["path"])
        return json.loads((folder / "config.json").read_text()) if folder is not None else None
    return json.loads((ARCHITECTURES / f"{model['name']}.json").read_text())


def stamp_of(model: dict[str, Any]) -> str:
    """Changes when the architecture of a preset's model does, or a file of its checkpoint (by name, size and time)."""
    if not model.get("path"):
        return hashlib.blake2b((ARCHITECTURES / f"{model['name']}.json").read_bytes(), digest_size=16).hexdigest()
    folder = find_folder(model["path"])
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors")) if folder else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def is_known(kind: Any) -> bool:
    """Whether transformers has this `model_type`; to ask it imports torch, so it is asked only where it must be."""
    if kind in GATED or kind == "gpt2":
        return True
    from transformers import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def shape_of(model: dict[str, Any], dtype: str) -> Shape | None:
    """The shape, or None where this file does not know the architecture (the plan then checks at load).

    Raises:
        ValueError: a size is missing or is none, with its field.
    """
    config = architecture(model)
    if config is None:
        return None
    if config["model_type"] in GATED:
        return _gated_shape(model["name"], config, ITEM_BYTES[dtype])
    if config["model_type"] == "gpt2":
        return _gpt2_shape(model["name"], config, ITEM_BYTES[dtype])
    return None


def _optional(config: dict[str, Any], field: str) -> int | None:
    return None if config.get(field) is None else _size(config, field)


def _size(config: dict[str, Any], field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = f"is {value!r}" if field in config else "is missing"
        raise ValueError(f"`{field}` {said}; allowed: a whole number from 1")
    return value


def _gated_shape(name: str, config: dict[str, Any], item_bytes: int) -> Shape:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _optional(config, "num_key_value_heads") or heads
    head_dim = _optional(config, "head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * _size(config, "intermediate_size") + 2 * hidden
    embedding = _size(config, "vocab_size") * hidden
    other = embedding * (1 if config.get("tie_word_embeddings") else 2) + hidden
    depth = _size(config, "num_hidden_layers")
    return Shape(
        name=name,
        layers=depth,
        layer_bytes=layer * item_bytes,
        other_bytes=other * item_bytes,
        kv_bytes_per_token=2 * depth * kv_heads * head_dim * item_bytes,
        max_positions=_optional(config, "max_position_embeddings"),
    )


def _gpt2_shape(name: str, config: dict[str, Any], item_bytes: int) -> Shape:
    hidden, depth, positions = (_size(config, field) for field in ("n_embd", "n_layer", "n_positions"))
    inner = _optional(config, "n_inner") or 4 * hidden
    layer = hidden * (3 * hidden + hidden + 2 * inner) + 3 * hidden + hidden + inner + hidden + 4 * hidden
    other = (_size(config, "vocab_size") + positions) * hidden + 2 * hidden
    return Shape(
        name=name,
        layers=depth,
        layer_bytes=layer * item_bytes,
        other_bytes=other * item_bytes,
        kv_bytes_per_token=2 * depth * hidden * item_bytes,
        max_positions=positions,
    )
