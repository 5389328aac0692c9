"""Edits of a boundary: declared, checked before anything moves, applied on the device.

An edit is data, never code, so that it can be recorded in a checkpoint, sent over a wire and repeated. Positions are
token indices within the pass whose boundary is edited; negative ones count from its end; None means all. Not taken:
hooks that receive the tensor, which nothing can check, store or send.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from djinn_core.errors import EditError

Positions = Sequence[int] | None


def _tensor(value: Any, what: str) -> torch.Tensor:
    """A private copy of a torch tensor or NumPy array, so that the edit stays what it was."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if hasattr(value, "__array__"):
        return torch.tensor(value)
    raise EditError(f"{what} is a {type(value).__name__}; give a torch tensor, a NumPy array, or edits.from_file(…)")


def _whole(value: Any) -> int | None:
    """A whole number, of Python, NumPy or torch; None if it is something else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _numbers(given: Any, lowest: int, end: int, what: str, range_: str) -> list[int]:
    """The whole numbers of a sequence, each from `lowest` to `end` - 1.

    Raises:
        EditError: one is not, or there is none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise EditError(f"{what} {given!r}: give a sequence of whole numbers, such as [{lowest}]; {range_}")
    numbers = [(value, _whole(value)) for value in given]
    wrong = [value for value, number in numbers if number is None or not lowest <= number < end]
    if wrong or not numbers:
        raise EditError(f"{what} {wrong}: {range_}")
    return [number for _, number in numbers]


def _places(positions: Positions, tokens: int, what: str) -> list[int] | None:
    """Positions counted from 0, or None for all.

    Raises:
        EditError: one lies outside of the pass.
    """
    if positions is None:
        return None
    range_ = f"the pass has {tokens} tokens, positions {-tokens} to {tokens - 1}"
    return [place % tokens for place in _numbers(positions, -tokens, tokens, f"{what} at positions", range_)]


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """The base: `apply` returns the edited hidden states [B, T, hidden]; `hidden` itself is left as it is."""

    @abstractmethod
    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        """Refuse what `apply` could not do to a boundary of this shape.

        Raises:
            EditError: shapes, dtypes or positions do not fit.
        """

    @abstractmethod
    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """The edited hidden states; `hidden` is left as it is."""

    def describe(self) -> str:
        """The edit in words, without the numbers of its tensors."""
        parts = []
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, torch.Tensor):
                value = f"{value.dtype} {tuple(value.shape)}"
            parts.append(f"{part.name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _check_value(edit: Edit, name: str, value: torch.Tensor, shape: torch.Size, dtype: torch.dtype, count: int) -> None:
    """`value` must broadcast to [B, count, hidden], keep the width, and be of the boundary's dtype."""
    wanted = (shape[0], count, shape[2])
    what = f"{type(edit).__name__}.{name}"
    if value.dtype != dtype:
        raise EditError(f"{what} is {value.dtype}, the boundary is {dtype}; convert it, so that no rounding is hidden")
    try:
        fits = torch.broadcast_shapes(value.shape, wanted) == wanted and value.shape[-1:] == wanted[-1:]
    except RuntimeError:
        fits = False
    if not fits:
        raise EditError(f"{what} has shape {tuple(value.shape)}, which does not fit [B, positions, hidden] = {wanted}")


def _on(hidden: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value.to(hidden.device)


def _update(hidden: torch.Tensor, places: list[int] | None, new: Any) -> torch.Tensor:
    """`hidden` with `new(part)` at the places."""
    if places is None:
        return new(hidden)
    out = hidden.clone()
    index = torch.tensor(places, device=hidden.device)
    out[:, index] = new(hidden[:, index])
    return out


@dataclass(frozen=True, eq=False)
class _Valued(Edit):
    tensor: torch.Tensor
    positions: Positions = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", _tensor(self.tensor, f"{type(self).__name__}.tensor"))

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        places = _places(self.positions, shape[1], type(self).__name__)
        _check_value(self, "tensor", self.tensor, shape, dtype, shape[1] if places is None else len(places))


@dataclass(frozen=True, eq=False)
class Add(_Valued):
    """hidden + tensor: a steering vector [hidden], one per position [positions, hidden], or [B, positions, hidden]."""

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        places = _places(self.positions, hidden.shape[1], "Add")
        return _update(hidden, places, lambda part: part + _on(hidden, self.tensor))


@dataclass(frozen=True, eq=False)
class Replace(_Valued):
    """tensor in place of hidden: activation patching."""

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        places = _places(self.positions, hidden.shape[1], "Replace")
        return _update(hidden, places, lambda part: _on(hidden, self.tensor).expand(part.shape).clone())


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """factor * hidden."""

    factor: float
    positions: Positions = None

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float):
            raise EditError(f"Scale.factor is {self.factor!r}; give a number")

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        _places(self.positions, shape[1], "Scale")

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        return _update(hidden, _places(self.positions, hidden.shape[1], "Scale"), lambda part: part * self.factor)


@dataclass(frozen=True, eq=False)
class ProjectOut(Edit):
    """hidden minus its component along `direction` [hidden], computed in float32."""

    direction: torch.Tensor
    positions: Positions = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _tensor(self.direction, "ProjectOut.direction"))

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        _places(self.positions, shape[1], "ProjectOut")
        if self.direction.shape != (shape[2],) or not self.direction.is_floating_point():
            raise EditError(
                f"ProjectOut.direction is {self.direction.dtype} of shape {tuple(self.direction.shape)}; "
                f"the boundary wants a floating-point ({shape[2]},)"
            )
        if not self.direction.float().norm() > 0:
            raise EditError("ProjectOut.direction has no length; nothing can be projected out along it")

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(_on(hidden, self.direction).float(), dim=0)

        def without(part: torch.Tensor) -> torch.Tensor:
            wide = part.float()
            return (wide - (wide @ unit)[..., None] * unit).to(part.dtype)

        return _update(hidden, _places(self.positions, hidden.shape[1], "ProjectOut"), without)


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Zeros: at `positions` (all channels), in `channels` (all positions), or where both meet."""

    positions: Positions = None
    channels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.positions is None and self.channels is None:
            raise EditError("Ablate needs positions, channels or both; to zero everything, Scale(0.0)")

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        _places(self.positions, shape[1], "Ablate")
        width = shape[2]
        if self.channels is not None:
            _numbers(self.channels, 0, width, "Ablate of channels", f"the boundary has channels 0 to {width - 1}")

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        def zeroed(part: torch.Tensor) -> torch.Tensor:
            if self.channels is None:
                return torch.zeros_like(part)
            out = part.clone()
            out[..., torch.tensor([_whole(channel) for channel in self.channels], device=hidden.device)] = 0
            return out

        return _update(hidden, _places(self.positions, hidden.shape[1], "Ablate"), zeroed)


@dataclass(frozen=True, eq=False)
class Recorded(Edit):
    """An edit that a loaded checkpoint already contains, in words. It cannot be applied again."""

    what: str

    def check(self, shape: torch.Size, dtype: torch.dtype) -> None:
        raise EditError(f"{self.what} is a record of an edit that was applied before the session was saved")

    def describe(self) -> str:
        return self.what


def from_file(path: str | Path, name: str) -> torch.Tensor:
    """The tensor `name` of a safetensors file, for use in an edit.

    Raises:
        EditError: there is no such file or tensor, or the file is damaged; the message lists the names.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if name not in names:
                raise EditError(f"{path} has no tensor {name!r}; it has {', '.join(sorted(names)[:10])}")
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise EditError(f"{path} is not a readable safetensors file: {error}") from error


def check_edits(edits: Sequence[Edit], shape: Sequence[int], dtype: torch.dtype) -> tuple[Edit, ...]:
    """`edits` as a tuple, each checked against a boundary [B, T, hidden].

    Raises:
        EditError: one does not fit, or is no edit.
    """
    for edit in edits:
        if not isinstance(edit, Edit):
            raise EditError(f"{type(edit).__name__} is no edit; use Add, Scale, Replace, ProjectOut or Ablate")
        edit.check(torch.Size(shape), dtype)
    return tuple(edits)


def apply_edits(edits: Sequence[Edit], hidden: torch.Tensor) -> torch.Tensor:
    for edit in edits:
        hidden = edit.apply(hidden)
    return hidden
