"""Whether layers are still what was recorded. Asked for every token: no loop in Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, contains, is_

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from djinn_core.models.recording import Places

_forward_of, _trains = attrgetter("forward"), attrgetter("training")


class Watched:
    """Layers, as they are when this is made."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        modules = [module for layer in layers for module in layer.modules()]
        self._modules = modules
        self._hooks = [_global_forward_hooks, _global_forward_pre_hooks]
        self._hooks += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._outside = list(map(vars, layers))  # a layer's own `forward` is the boundary's
        self._outer = list(map(dict.get, self._outside, repeat("forward")))
        self._inside = [vars(module) for layer in layers for module in list(layer.modules())[1:]]
        self._children = [module._modules for module in modules]
        self._sizes = list(map(len, self._children))
        families = [(group, name) for group in self._children for name in group]
        self._parents, self._roles = [group for group, _ in families], [name for _, name in families]
        self._had = list(map(dict.get, self._parents, self._roles))
        self._classes = list(map(type, modules))
        self._kinds = list(dict.fromkeys(self._classes))
        self._forwards = list(map(_forward_of, self._kinds))
        tensors = [(group, name) for m in modules for group in (m._parameters, m._buffers) for name in group]
        self._groups, self._names = [group for group, _ in tensors], [name for _, name in tensors]

    @property
    def altered(self) -> bool:
        """A hook, another module, another class or another `forward` is in them, or one is being trained."""
        return (
            any(self._hooks)
            or not all(map(is_, map(dict.get, self._outside, repeat("forward")), self._outer))
            or list(map(len, self._children)) != self._sizes
            or not all(map(is_, map(dict.get, self._parents, self._roles), self._had))
            or not all(map(is_, map(type, self._modules), self._classes))
            or not all(map(is_, map(_forward_of, self._kinds), self._forwards))
            or any(map(_trains, self._modules))
            or any(map(contains, self._inside, repeat("forward")))
        )

    @property
    def places(self) -> Places:
        """Which parameters and buffers they have, and where."""
        return Places(list(map(dict.get, self._groups, self._names)))

    def moved(self, since: Places) -> bool:
        """Whether a parameter or buffer is another one now, or elsewhere."""
        found = map(dict.get, self._groups, self._names)
        return not all(map(is_, found, since.tensors)) or since.moved
