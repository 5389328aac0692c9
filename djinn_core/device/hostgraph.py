"""A graph without a GPU: torch operations that are noted once, and done again into the same tensors.

As on a GPU, nothing has been done when the recording ends: what it returned is filled with NaN until the first replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from djinn_core.device.base import Row, Stream

UNKNOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostGraph(TorchDispatchMode):
    """`Graph` for the emulated device."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        self._made: set[int] = set()  # the memory that was allocated here

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        for *_, made in self._steps:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def abandon(self) -> None:
        self.__exit__(None, None, None)
        self._steps.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not UNKNOWN.isdisjoint(func.tags):
            raise RuntimeError(f"{func} needs a value from the device, and nothing is done while a graph is recorded")
        there = [tensor for tensor in _written(func, args, kwargs) if _memory(tensor) not in self._made]
        before = [(tensor, tensor.clone()) for tensor in there]
        out = func(*args, **kwargs)
        read = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        if func._schema.is_mutable:
            for tensor, value in before:  # nothing is done to what was there while a graph is recorded
                tensor.copy_(value)
            self._steps.append((func, args, kwargs, []))
        elif read.isdisjoint(map(_memory, _tensors(out))):  # else it is a view
            self._steps.append((func, args, kwargs, _tensors(out)))
            self._made.update(map(_memory, _tensors(out)))
        return out

    def replay(self, stream: Stream) -> None:
        for func, args, kwargs, made in self._steps:
            for mine, new in zip(made, _tensors(func(*args, **kwargs)), strict=False):
                mine.copy_(new)


class HostChain:
    """`Chain`, in which every step is issued anew."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def record(self, key: Hashable, step: Callable[[int], torch.Tensor], changing: torch.Tensor) -> Hashable:
        return None

    def replay(
        self,
        stream: Stream,
        key: Hashable,
        step: Callable[[int], torch.Tensor],
        changing: Sequence[torch.Tensor],
        part: range,
    ) -> None:
        for number in part:
            row = self._rows[number]
            row.before.replay(stream)
            row.into.copy_(step(number))
            row.behind.replay(stream)


class HostGraphs:
    """`Graphs` for the emulated device."""

    def new(self) -> HostGraph:
        return HostGraph()

    def chain(self, rows: Sequence[Row]) -> HostChain:
        return HostChain(rows)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operation writes into."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    wrote = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return _tensors([given[name] for name in wrote if name in given])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
