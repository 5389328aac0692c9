"""Seeded random weights: the same bytes on every machine, for every system and in every order of loading.

Invariant: a tensor's bytes depend on the seed, its name, shape and dtype, and its standard deviation, on nothing else.
Each chunk of 2**20 values draws raw 16-bit integers from its own Philox stream, keyed by (seed, name) and counted by
the chunk; each integer picks one of 65,536 quantiles of the normal distribution, already rounded to the dtype. NumPy
promises that raw Philox streams never change, and the quantiles come from the standard library.

Not taken: `torch.randn` (its CPU stream depends on size and vectorisation, and it is one thread) and NumPy's
`standard_normal` (its stream may change between releases).
"""

from __future__ import annotations

import hashlib
import math
import threading
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig

from djinn_core.errors import WeightsError
from djinn_core.models.identity import config_digest, dtype_name
from djinn_core.models.pieces import each_piece
from djinn_core.models.stack import build_meta_model, tensor_specs

GENERATOR = "philox-quantile-1"  # part of the digest: change it whenever the bytes change
CHUNK_VALUES = 1 << 20
_BLOCK_VALUES = 1 << 16  # small enough for its index array to stay in a core's cache
_LEVELS = 1 << 16

# What writes into the residual stream; its deviation falls with depth, or 80 layers would overflow fp16.
_RESIDUAL_OUT = (
    "o_proj.weight",
    "down_proj.weight",
    "c_proj.weight",
    "out_proj.weight",
    "fc2.weight",
    "fc_out.weight",
    "dense.weight",
    "dense_4h_to_h.weight",
)
_BITS = {torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
_TORCH_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@cache
def _unit_quantiles() -> np.ndarray:
    """The midpoint quantiles of N(0, 1), float64, ascending and symmetric to the bit."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((_LEVELS // 2 + i + 0.5) / _LEVELS) for i in range(_LEVELS // 2)])
    return np.concatenate([-upper[::-1], upper])


_tables: dict[tuple[float, torch.dtype], np.ndarray] = {}
_tables_lock = threading.Lock()


def _table(std: float, dtype: torch.dtype) -> np.ndarray:
    """The bit patterns of the quantiles times `std`, rounded to `dtype`."""
    with _tables_lock:
        if (std, dtype) not in _tables:
            values = torch.from_numpy(_unit_quantiles() * std).to(torch.float32).to(dtype)
            _tables[std, dtype] = values.view(_TORCH_BITS[dtype]).numpy().view(_BITS[dtype])
        return _tables[std, dtype]


def fill_normal(out: torch.Tensor, *, seed: int, name: str, std: float) -> None:
    """Fill `out` (on the CPU, contiguous, fp32, fp16 or bf16) with the values that `seed` and `name` give it."""
    bits = out.view(_TORCH_BITS[out.dtype]).reshape(-1).numpy().view(_BITS[out.dtype])
    table = _table(std, out.dtype)
    key = np.frombuffer(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), dtype="<u8")

    def fill(begin: int, end: int) -> None:
        stream = np.random.Philox(key=key, counter=[0, begin // CHUNK_VALUES, 0, 0])
        draws = stream.random_raw(math.ceil((end - begin) / 4)).astype("<u8", copy=False).view("<u2")
        for at in range(begin, end, _BLOCK_VALUES):
            stop = min(at + _BLOCK_VALUES, end)
            np.take(table, draws[at - begin : stop - begin], out=bits[at:stop], mode="clip")

    each_piece(bits.size, CHUNK_VALUES, fill)


class SeededSource:
    """A config's true architecture with seeded random weights.

    Matrices are N(0, initializer_range), what writes into the residual stream is scaled by 1/sqrt(2 layers), norm
    weights are 1, and biases are N(0, initializer_range), so that a forgotten bias shows.

    Attributes:
        config: the model's config; `config.dtype` is set to `dtype`.
        generation_config: None; a model makes its own from the config.
        digest: of the generator, the seed, the dtype and the config.
    """

    kind = "seeded"

    def __init__(self, config: PretrainedConfig, *, dtype: torch.dtype, seed: int = 0) -> None:
        if dtype not in _BITS:
            raise WeightsError(f"seeded weights come in float32, float16 and bfloat16, not {dtype_name(dtype)}")
        self.config = config
        self.dtype = dtype
        self.seed = seed
        self.generation_config: GenerationConfig | None = None
        self._specs = tensor_specs(build_meta_model(config, dtype))
        text = f"{GENERATOR}\0{seed}\0{dtype_name(dtype)}\0{config_digest(config)}"
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._std = float(getattr(config, "initializer_range", None) or 0.02)
        self._residual_std = self._std / math.sqrt(2 * config.num_hidden_layers)

    def __repr__(self) -> str:
        return f"SeededSource({self.config.model_type}, seed={self.seed}, {dtype_name(self.dtype)})"

    def names(self) -> tuple[str, ...]:
        """Every tensor once, in the model's order; tied names are left out."""
        return tuple(self._specs)

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """The shape and dtype of a tensor."""
        spec = self._specs[name]
        return spec.shape, spec.dtype

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Make the tensor's values right in `out`, a contiguous CPU tensor of its shape and dtype."""
        check_destination(name, out, *self.meta(name))
        if out.dim() == 1 and name.endswith("weight"):
            out.fill_(1)
        elif not out.is_floating_point():
            raise WeightsError(f"{name} is {dtype_name(out.dtype)}: seeded weights are floating point only")
        else:
            std = self._residual_std if name.endswith(_RESIDUAL_OUT) and out.dim() > 1 else self._std
            fill_normal(out, seed=self.seed, name=name, std=std)


def check_destination(name: str, out: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Refuse a destination into which `name` cannot be read in place."""
    if out.shape != shape or out.dtype != dtype or out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"{name} is {dtype_name(dtype)} {tuple(shape)} and needs a contiguous CPU tensor of that kind, "
            f"not {dtype_name(out.dtype)} {tuple(out.shape)} on {out.device}"
        )
