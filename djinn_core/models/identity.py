"""What makes two configs, or two dtypes, the same."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PretrainedConfig

from djinn_core.errors import ConfigError

# Said about a model by whoever stored it, and without any effect on what it computes.
_NOT_IDENTITY = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


def config_digest(config: PretrainedConfig) -> str:
    """A digest of everything in the config that shapes the model or its numbers; the dtype is not in it."""
    fields = {key: value for key, value in config.to_dict().items() if key not in _NOT_IDENTITY}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating dtype from itself or its name.

    Raises:
        ConfigError: no such floating dtype.
    """
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} is not a floating dtype of torch; use float32, float16 or bfloat16")
    return found
