"""The parts of a decoder: its layers, and everything else; a model without memory, and memory put into it.

Models are built on the meta device, where they cost nothing, and `bind` assigns tensors without copying. A model is
understood by its structure, a ModuleList of `num_hidden_layers`, and not by a table of names: what has none is refused.

Not taken: building the model on the CPU and copying out of it, which would hold a 13B model's bytes twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from djinn_core.errors import UnsupportedModel, WeightsError
from djinn_core.models.config_file import LIES


class TensorSpec(NamedTuple):
    """A tensor by its qualified name, without its bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stack:
    """Where a model's decoder and layers are, and which tensors belong to which.

    Attributes:
        decoder: the inner model, whose forward runs embedding, layers and final norm.
        decoder_name: its qualified name.
        layers: the decoder's layers, in order.
        layer_tensors: for each layer its tensors (parameters and persistent buffers), in the module's order.
        resident: all other tensors: embeddings, norms, the head.
        tied: second names of a tensor, each with the one name under which it is kept.
    """

    decoder: nn.Module
    decoder_name: str
    layers: nn.ModuleList
    layer_tensors: tuple[tuple[TensorSpec, ...], ...]
    resident: tuple[TensorSpec, ...]
    tied: Mapping[str, str]

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(sum(spec.size_bytes for spec in layer) for layer in self.layer_tensors)

    @property
    def resident_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.resident)


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of `config` on the meta device, in evaluation mode, without gradients.

    `config` itself is left as it is.

    Raises:
        UnsupportedModel: transformers knows no causal language model for this config, or it is quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{config.model_type}: quantised checkpoints are not served; load the original weights")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except LIES as error:
        raise UnsupportedModel(
            f"{config.model_type}: transformers builds no causal language model from the config: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Second names of tied tensors -> the name under which each is kept: by the model's own rule, and by identity."""
    tied = dict(model.all_tied_weights_keys)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            kept = first.setdefault(id(parameter), name)
            if kept != name:
                tied[name] = kept
    while any(kept in tied for kept in tied.values()):  # a tie to a tie
        tied = {name: tied.get(kept, kept) for name, kept in tied.items()}
    return tied


def tensor_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Every parameter and persistent buffer, tied ones once, in the model's order."""
    tied = tied_names(model)
    state = model.state_dict()
    return {name: TensorSpec(name, t.shape, t.dtype) for name, t in state.items() if name not in tied}


def find_stack(model: PreTrainedModel) -> Stack:
    """The decoder of `model` and what belongs to it.

    Raises:
        UnsupportedModel: no single list of `num_hidden_layers` layers, or a tensor that two layers share.
    """
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    name, decoder, layers = _find_layers(model, depth)
    specs, tied = tensor_specs(model), tied_names(model)
    prefix = next(f"{name}.{child}." if name else f"{child}." for child, m in decoder.named_children() if m is layers)
    layer_tensors: list[list[TensorSpec]] = [[] for _ in range(depth)]
    resident = []
    for spec in specs.values():
        if spec.name.startswith(prefix):
            layer_tensors[int(spec.name[len(prefix) :].split(".", 1)[0])].append(spec)
        else:
            resident.append(spec)
    shared = [f"{alias} = {kept}" for alias, kept in tied.items() if prefix in alias or prefix in kept]
    if shared:
        raise UnsupportedModel(f"{type(model).__name__}: layers share tensors ({', '.join(shared[:5])})")
    return Stack(decoder, name, layers, tuple(map(tuple, layer_tensors)), tuple(resident), tied)


def _find_layers(model: PreTrainedModel, depth: int) -> tuple[str, nn.Module, nn.ModuleList]:
    """The outermost module that owns a ModuleList of `depth` modules of one class."""
    found = []
    for name, module in model.named_modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth and len({type(m) for m in child}) == 1:
                found.append((name, module, child))
    if model.config.is_encoder_decoder or not found:
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else "no such list"
        raise UnsupportedModel(
            f"{type(model).__name__}: looked for one list of {depth} equal decoder layers (num_hidden_layers), "
            f"found {what}"
        )
    level = min(name.count(".") + bool(name) for name, _, _ in found)
    outermost = [entry for entry in found if entry[0].count(".") + bool(entry[0]) == level]
    if len(outermost) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(outermost)} lists of {depth} layers, in {[name for name, _, _ in outermost]}"
        )
    return outermost[0]


def bind(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` into a meta model without copying, tie what is tied, and rebuild its non-persistent buffers.

    Parameters afterwards share storage with `tensors`; buffers such as rotary `inv_freq` are computed in their own
    precision on the device of the first tensor.

    Raises:
        WeightsError: a tensor of another shape or dtype than the model's, one the model lacks, or one missing.
        UnsupportedModel: something is still without memory, because only its constructor knew its value.
    """
    specs, tied = tensor_specs(model), tied_names(model)
    _refuse_mismatch(model, specs, tensors)
    for name, tensor in tensors.items():
        owner, leaf = _owner(model, name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
    for name, kept in tied.items():  # one Parameter under both names, as transformers ties them
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = model.get_parameter(kept)
    device = next(iter(tensors.values())).device
    _rebuild_buffers(model, device)
    left = sorted(_left_on_meta(model))
    if left:
        raise UnsupportedModel(
            f"{type(model).__name__}: cannot rebuild {', '.join(left[:5])}, which no checkpoint holds"
        )


def _refuse_mismatch(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor]
) -> None:
    problems = [f"missing {name}" for name in specs if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in specs]
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is not None and (tensor.shape != spec.shape or tensor.dtype != spec.dtype):
            wanted = f"{spec.dtype} {tuple(spec.shape)}"
            problems.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted}")
    if problems:
        raise WeightsError(
            f"tensors do not fit {type(model).__name__}, nothing was bound: {'; '.join(problems[:5])}"
            + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _rebuild_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the non-persistent buffers as `from_pretrained` does, through the model's own `_init_weights`.

    Each is computed twice, over zeros and over ones: what comes out different was not computed at all.
    """
    owners: dict[nn.Module, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.is_meta:
                owners.setdefault(module, []).append((f"{path}.{leaf}" if path else leaf, leaf))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers' own mark: `_init_weights` leaves such a tensor alone
    for module, buffers in owners.items():
        first: dict[str, torch.Tensor] = {}
        for fill in (torch.zeros_like, torch.ones_like):
            for _, leaf in buffers:
                module._buffers[leaf] = fill(module._buffers[leaf], device=device)
            with torch.no_grad():
                model._init_weights(module)
            for name, leaf in buffers:
                value = module._buffers[leaf]
                if not torch.equal(first.setdefault(name, value), value):
                    raise UnsupportedModel(f"{type(model).__name__}: cannot rebuild {name}, which no checkpoint holds")


def _left_on_meta(model: nn.Module) -> Iterable[str]:
    for path, module in model.named_modules():
        for group in (module._parameters, module._buffers, vars(module)):
            for leaf, value in group.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    yield f"{path}.{leaf}" if path else leaf
