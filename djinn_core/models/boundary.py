"""Where a pass meets Djinn: one permanent wrapper per layer, and one around the decoder.

Invariant: a pass that begins on the provider ends on it, whatever happens between; a layer whose weights were
acquired is released. The wrappers are set once, as instance attributes, and never patched again: who runs is read
from `RUNNING` when a pass begins, so concurrent callers do not see each other. With `RUNNING` unset, a pass is an
ordinary `model(...)`.

Not taken: forward hooks. They cannot skip a layer, and they do not run when the layer raises, which would leave a
ring slot in use for ever. A user's hooks on a layer still fire, outside of the wrapper; hooks on submodules fire
inside, where the weights are in place.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from djinn_core.door import Door
from djinn_core.errors import SessionStateError, UnsupportedModel, UsageError, unloaded
from djinn_core.interrupts import Interruptible, Uninterrupted
from djinn_core.models.layercalls import copied, first_of, hidden_of, replace_hidden

if TYPE_CHECKING:
    from djinn_core.models.graphs import LayerGraphs
    from djinn_core.turn import Turn


class WeightsProvider(Protocol):
    """What puts a layer's weights in place. One pass at a time; the boundary keeps the order of the calls."""

    inference_only: bool

    def begin_pass(self, first_layer: int) -> None: ...

    def acquire(self, layer: int) -> None: ...

    def release(self, layer: int) -> None: ...

    def end_pass(self) -> None: ...


class PassControl(Protocol):
    """What steers one pass: where it enters, and what happens at each layer's boundary.

    Layers are 0-based here. A pass with `first_layer` = L executes layers L, L+1, ...; the stored boundary is what
    `enter` returns, at layer L, or after the last layer when L is the number of layers. `enter` is called once in
    every pass, also when `first_layer` is 0 (then it is given the embeddings, and usually returns them). At layer
    `stop_before`, if any, `stop` is given what that layer would receive, a user's hooks included, and ends the pass.
    `ready`, if it is not None, says whether the pass has any use for its turn yet; until then others go first, and
    where there are none, until it `begins`. `begin` is called when it has its turn, and has issued nothing yet.
    `undisturbed`: between layers `first` and `last` - 1 nothing is waited for, changed, kept or copied, so that they
    may be issued at once.
    """

    first_layer: int
    stop_before: int | None

    @property
    def ready(self) -> Callable[[], bool] | None: ...

    def undisturbed(self, first: int, last: int) -> bool: ...

    def begins(self) -> bool: ...

    def begin(self) -> None: ...

    def enter(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def before_layer(self, layer: int) -> None: ...

    def after_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor: ...

    def stop(self, hidden: torch.Tensor) -> None: ...


RUNNING: ContextVar[PassControl | None] = ContextVar("djinn_running", default=None)
"""The control of the next pass of this context; unset for a plain `model(...)`. While a pass runs it reads None,
so that another model called from inside (a hook) is a plain pass."""


class PassStopped(Exception):
    """Raised by `PassControl.stop` to end the pass. The session catches it; users never see it."""


# What layers of a class return (see `Boundary.arity`), learned when one first runs: a model's twin teaches it.
_ARITY: dict[type[nn.Module], int] = {}


class NullProvider:
    """Weights that are always in place (a resident model, a stock twin)."""

    inference_only = False

    def begin_pass(self, first_layer: int) -> None: ...

    def acquire(self, layer: int) -> None: ...

    def release(self, layer: int) -> None: ...

    def end_pass(self) -> None: ...


class _Layers(nn.ModuleList):
    """The decoder's own layers; a slice of them is made once.

    Many decoders run `self.layers[: n]`, and `nn.ModuleList` answers with a new module each time, which takes longer
    than all the skipped layers of a resumed pass.
    """

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        modules = tuple(self._modules.values())
        kept = self.__dict__.setdefault("_djinn_slices", {})
        key = index.indices(len(modules))
        if key not in kept or kept[key][0] != modules:
            kept[key] = (modules, nn.ModuleList(modules[index]))
        return kept[key][1]

    def _get_name(self) -> str:
        return "ModuleList"  # the model prints as the stock one does


class Boundary:
    """The wrappers of one model, and what they count.

    Attributes:
        executed: how often each layer's own code has run, by layer index; it only grows.
        arity: what a layer returns: 0 a tensor, n a tuple of n with the hidden states first, None not known yet.
        graphs: what sessions' one-token passes are issued from; None issues them kernel by kernel.
        door: entered around the outermost model's forward, which reads weights behind the decoder's pass, too.
    """

    graphs: LayerGraphs | None = None

    def __init__(
        self,
        decoder: nn.Module,
        layers: nn.ModuleList,
        provider: WeightsProvider,
        turn: Turn,
    ) -> None:
        self.provider = provider
        self.executed = [0] * len(layers)
        self.arity = _ARITY.get(type(layers[0]), _declared_arity(layers[0]))
        self._layer_class = type(layers[0])
        self._turn = turn
        self.door = Door(unloaded)
        self._count = len(layers)
        self._control: PassControl | None = None
        self._runner: int | None = None
        if type(layers) is nn.ModuleList:
            layers.__class__ = _Layers
        decoder.forward = self._wrap_decoder(decoder.forward)
        for index, layer in enumerate(layers):
            layer.forward = self._wrap_layer(index, layer.forward)

    def wrap_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The outermost model's forward, within the door."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            plain = RUNNING.get() is None  # a session's own code says where Ctrl-C acts
            with Uninterrupted(), self.door, Interruptible() if plain else nullcontext():
                return original(*args, **kwargs)

        return forward

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._runner == threading.get_ident():
                raise SessionStateError(
                    "a pass of this model is running on this thread, and a second one was begun inside it (from a "
                    "hook?); the first one is unharmed; run the second after it"
                )
            control = RUNNING.get()
            return self._pass(control, 0 if control is None else control.first_layer, original, args, kwargs)

        return forward

    def _pass(
        self, control: PassControl | None, first_layer: int, body: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        """Run `body` as one pass: the turn, the provider, and the control that the layers see."""
        if not 0 <= first_layer <= self._count:
            raise UsageError(f"a pass cannot enter at layer {first_layer}: the model has {self._count} layers")
        when = () if control is None else (control.ready, control.begins)
        with Uninterrupted(), self._turn.when(*when):
            token = None if control is None else RUNNING.set(None)
            self._runner, self._control = threading.get_ident(), control
            try:
                graphs: AbstractContextManager[Any] = nullcontext()
                if control is not None:
                    control.begin()
                    graphs = self.graphs or graphs
                self.provider.begin_pass(first_layer)
                try:
                    with graphs, Interruptible():
                        return body(*args, **kwargs)
                finally:
                    self.provider.end_pass()
            finally:
                self._runner = self._control = None
                if token is not None:
                    RUNNING.reset(token)

    def _wrap_layer(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        provider, executed, last = self.provider, self.executed, self._count - 1
        get_ident = threading.get_ident

        def run(control: PassControl | None, args: tuple, kwargs: dict) -> Any:
            provider.acquire(index)
            try:
                executed[index] += 1
                if control is None or self.graphs is None:
                    return original(*args, **kwargs)
                out = self.graphs.run(index, original, args, kwargs, control.undisturbed)
                stops = index + 1 == control.stop_before  # and a boundary outlives the layer's next pass
                return copied(out) if stops else out
            finally:
                provider.release(index)

        def controlled(control: PassControl, args: tuple, kwargs: dict) -> Any:
            first = control.first_layer
            if index < first:
                hidden = hidden_of(args, kwargs)
                return self._pack(control.enter(hidden) if index == last and first > last else hidden)
            if index == first:
                args, kwargs = replace_hidden(args, kwargs, control.enter(hidden_of(args, kwargs)))
            if index == control.stop_before:
                control.stop(hidden_of(args, kwargs))
            control.before_layer(index)
            out = run(control, args, kwargs)
            if type(out) is tuple:
                return (control.after_layer(index, out[0]), *out[1:])
            return control.after_layer(index, out)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._runner != get_ident():
                return self._pass(None, index, forward, args, kwargs)  # called by itself: a pass of its own
            control = self._control
            out = run(None, args, kwargs) if control is None else controlled(control, args, kwargs)
            if self.arity is None:
                self.arity = _ARITY[self._layer_class] = len(out) if type(out) is tuple else 0
            if provider.inference_only and first_of(out).requires_grad:
                raise UsageError(
                    f"layer {index} ran with gradients, and its weights are streamed: a backward pass would read "
                    "other layers' weights; use torch.inference_mode(), or load with resident_layers='all'"
                )
            return out

        return forward

    def _pack(self, hidden: torch.Tensor) -> Any:
        """`hidden` in the form in which a layer returns it."""
        if self.arity == 0:
            return hidden
        if self.arity is None:
            raise UnsupportedModel(
                "whether this model's layers return a tensor or a tuple is not known, so none can be skipped; "
                "load it with prove=True, or run one whole pass first"
            )
        return (hidden,) + (None,) * (self.arity - 1)


def install(
    model: nn.Module,
    stack: Any,
    provider: WeightsProvider,
    turn: Turn,
) -> Boundary:
    """Wrap `model`, `stack.decoder` and each of `stack.layers`, once and for good.

    Args:
        model: the outermost model; `executed_layers(model)` reads its counters.
        stack: anything with `decoder` (its forward runs embed -> layers -> norm) and `layers`.
        provider: puts weights in place.
        turn: entered around each pass.

    Raises:
        UsageError: the model is wrapped already.
    """
    if hasattr(model, "_djinn_boundary"):
        raise UsageError("this model is wrapped already; a model belongs to one runtime")
    boundary = Boundary(stack.decoder, stack.layers, provider, turn)
    model.forward = boundary.wrap_model(model.forward)
    model._djinn_boundary = boundary
    return boundary


def executed_layers(model: nn.Module) -> tuple[int, ...]:
    """How often each layer's own code has run since `install`, by layer index."""
    return tuple(model._djinn_boundary.executed)


def _declared_arity(layer: nn.Module) -> int | None:
    annotation = inspect.signature(layer.forward).return_annotation
    return 0 if annotation in (torch.Tensor, "torch.Tensor", "Tensor") else None
