"""A model's config, read from a file that may lie: what comes out has sizes that fit each other.

transformers checks the types of some fields of some models; what it lets through fails later, far from the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from djinn_core.errors import ConfigError

# What transformers raises over a field of the wrong type or value; RuntimeError has RecursionError in it.
LIES = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_WINDOWS = ("sliding_window", "attention_chunk_size")  # each config has its own word for "none"
# Layers are built, and named by some configs, before a tensor is looked at. Several times what published models have.
MOST_LAYERS = 1000
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_T = TypeVar("_T")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a file in config.json's format, as they are written there.

    Raises:
        ConfigError: the file is missing, no JSON object with a `model_type`, or of more than `MOST_LAYERS` layers.
    """
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ConfigError(f"{path} must be an object with `model_type`, in the format of a checkpoint's config.json")
    for section in (fields, fields.get("text_config")):
        if isinstance(section, dict):
            _refuse_depth(section, path)
    return fields


def _refuse_depth(fields: Mapping[str, Any], where: str | Path) -> None:
    for name in _DEPTHS:
        layers = fields.get(name)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ConfigError(f"{where}: {name} is {layers}; at most {MOST_LAYERS} layers are served; correct it")


def believed(path: Path, read: Callable[[], _T]) -> _T:
    """What `read` makes of a file by means of transformers, whose errors become one that names the file."""
    try:
        return read()
    except LIES as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"transformers cannot read {path}: {type(error).__name__}: {what}; correct the file"
        ) from error


def check_sizes(config: PretrainedConfig, where: str | Path) -> PretrainedConfig:
    """The config itself, if its sizes are positive, its heads fit each other and nothing is beyond all use.

    Raises:
        ConfigError: a size below 1, a size or a window of more than 64 bits, more than `MOST_LAYERS` layers, or
            attention heads that the key-value heads do not divide.
    """
    text = config.get_text_config()
    _refuse_depth({"num_hidden_layers": getattr(text, "num_hidden_layers", None)}, where)
    for name in (*_SIZES, *_WINDOWS):
        value = getattr(text, name, None)
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"{where}: {name} is {value}; it must have at most 64 bits; correct it")
    for name in _SIZES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{where}: {name} is {value}; it must be 1 or more")
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ConfigError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}; correct one of them"
        )
    return config
