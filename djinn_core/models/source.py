"""Where weights come from: a checkpoint, or seeded random numbers in a true architecture.

Invariant: a source is checked completely when it is opened, before anything is allocated or copied, and each tensor is
then read once, straight into its final place; the host never holds a second copy of a tensor's bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from djinn_core.errors import ConfigError
from djinn_core.models.checkpoint import CheckpointSource
from djinn_core.models.config_file import believed, check_sizes, read_fields
from djinn_core.models.folder import find_folder, is_hub_id
from djinn_core.models.identity import as_dtype
from djinn_core.models.seeded import SeededSource

_OWN = Path(__file__).parent / "architectures"  # a link to config/models; in an installed package, its files


class WeightSource(Protocol):
    """A model's config and tensors. Thread-safe.

    Attributes:
        config: the model's config.
        generation_config: the checkpoint's own, where it has one.
        dtype: of every floating tensor that `read_into` writes.
        kind: whether the weights are trained or random; results say which.
        digest: equal digests mean equal configs and equal bytes.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    dtype: torch.dtype
    kind: Literal["checkpoint", "seeded"]
    digest: str

    def names(self) -> tuple[str, ...]:
        """Every tensor's name in the model, tied ones once, in the model's order."""
        ...

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """The shape and dtype of a tensor."""
        ...

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor into `out`, a contiguous CPU tensor of its shape and dtype. Complete when it returns.

        Raises:
            WeightsError: fewer bytes than the header promised, or the file changed since it was opened.
        """
        ...


def open_source(
    source: str | Path | PretrainedConfig, *, dtype: torch.dtype | str | None = None, seed: int = 0
) -> WeightSource:
    """The weights that `source` names.

    Args:
        source: a folder with config.json and safetensors; an architecture's JSON file, or its name (``"llama-2-13b"``);
            a config object; or a hub id (``"org/name"``) in the local cache. The network is never used. A model has
            at most 1,000 layers.
        dtype: what tensors are read as; a checkpoint in another dtype is converted piece by piece. None: as stored,
            or as the config says, or float32.
        seed: of random weights; a checkpoint has its own.

    Raises:
        ConfigError: no such architecture, folder or cached checkpoint, or its config is wrong.
        WeightsError: the checkpoint lacks tensors, or they are cut short, corrupt or of mixed dtypes.
        UnsupportedModel: transformers builds no causal language model from the config.
    """
    dtype = None if dtype is None else as_dtype(dtype)
    if isinstance(source, PretrainedConfig):
        return _seeded(check_sizes(source, f"the {source.model_type} config"), dtype, seed)
    folder = find_folder(source)
    if folder is not None:
        return CheckpointSource(folder, dtype=dtype)
    path = Path(source).expanduser()
    if path.suffix == ".json":
        return _seeded(read_config(path), dtype, seed)
    name = str(source)
    if name in architectures():
        return _seeded(read_config(architectures()[name]), dtype, seed)
    if is_hub_id(name):
        raise ConfigError(
            f"model {name!r} is no folder and not in the local Hugging Face cache; "
            f"download it there first, or name one of the architectures {', '.join(architectures())}"
        )
    raise ConfigError(
        f"model {name!r} is neither a folder, a JSON file nor one of the architectures {', '.join(architectures())}"
    )


def architectures() -> dict[str, Path]:
    """Named architectures: those of Djinn, and those in config/models of the current directory, which go first."""
    found: dict[str, Path] = {}
    for folder in (_OWN, Path.cwd() / "config" / "models"):
        found |= {file.stem: file for file in folder.glob("*.json")}
    return dict(sorted(found.items()))


def read_config(path: Path) -> PretrainedConfig:
    """The config in a JSON file of config.json's format.

    Raises:
        ConfigError: the file is missing, no JSON object, names no known `model_type`, or has sizes that cannot be.
    """
    fields = read_fields(path)
    return check_sizes(believed(path, lambda: AutoConfig.for_model(**fields)), path)


def _seeded(config: PretrainedConfig, dtype: torch.dtype | None, seed: int) -> SeededSource:
    return SeededSource(config, dtype=dtype or config.dtype or torch.float32, seed=seed)
