"""One-token passes from graphs: most of a layer's kernels, recorded once, go out in two calls, or of several in one.

What limits such a pass is Python, which takes several times as long to issue a layer as a large GPU to compute it. Two
graphs hold what a layer does before its attention and behind it. Between them lies what changes with every token: K and
V go into the session's cache, and attention reads it at its new length. So a layer can begin and end in Python, where
it may be gated, stopped, edited or skipped, and its kernels are those of the layer's own code. Where nothing of that is
to happen in a part of the layers, they go out at once (`chained.py`).

Invariant: a layer is issued from its graphs only after they gave what its own code gives, bit for bit and K and V too,
in two passes, and with others only after that gave the same; and only while it has the same modules, classes, and
parameters at the same addresses, is called with the same shapes and settings, and has no hooks. Otherwise its own code
runs. What is not seen is a Python value inside a module or the config that is changed later (`attention.scaling = 2`),
a module that is put in another order or a buffer that is added, and what the layer's code decides anew by the length,
beyond those of the proofs. Graphs go to the stream that is current as their pass begins, and no layer may leave another
one current.

Not taken: `torch.compile`: other kernels, so other logits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import Cache

from djinn_core.interrupts import Uninterrupted
from djinn_core.models.chained import Chained
from djinn_core.models.layercalls import copied, first_of, hidden_of, replace_hidden
from djinn_core.models.recording import NotRecorded, Recorded, Recording
from djinn_core.models.watched import Watched

if TYPE_CHECKING:
    from djinn_core.device.base import Device, Graphs, Stream

KINDS = 8  # of calls that are recorded; a setting that changes with every call must not fill the memory
TRIES = 3  # recordings of a layer: another thread that waits for the whole device makes one fail
PROOFS = 2
PART = 8  # layers in a launch: while the device computes them, Python prepares the next ones
FAULTS = 30  # in a row, of such launches
PRECISIONS = (  # of `torch.backends.cuda.matmul`; an older torch has not all of them
    "fp32_precision",
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")  # that `torch.backends.cuda` has a switch for

_flash_kind = getattr(nn.attention, "current_flash_attention_impl", lambda: None)  # not in an older torch
_log = logging.getLogger("djinn.graphs")


@dataclass(eq=False)
class _Call:
    """What all layers are given in one pass, besides the hidden states.

    Attributes:
        inputs: the tensors that graphs read, in the order in which they are found in the arguments.
        layers: for each layer its graphs; None where it has none for good.
        tries: how often each was recorded since it was last proven.
        cache: of the pass under way.
        chained: several layers in one launch; None as long as not all of them have graphs.
        faults: for each part, by its first layer, how often in a row that failed; at `FAULTS` it is not tried again.
    """

    inputs: list[torch.Tensor]
    layers: dict[int, Recorded | None] = field(default_factory=dict)
    tries: Counter[int] = field(default_factory=Counter)
    cache: Cache | None = None
    chained: Chained | None = None
    faults: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class _Claims:
    """What one launch gave for each layer: its output, K and V; those that are still to be compared."""

    call: _Call
    chained: Chained
    kind: tuple[int, Hashable]  # as `Chained.proofs` counts it: the first layer, and what is in between
    given: dict[int, tuple[torch.Tensor, ...]]


class LayerGraphs:
    """The graphs of one model. One pass at a time, within `with`.

    Args:
        layers: the decoder's.
        recordable: the layers whose parameters stay where they are.
    """

    def __init__(self, device: Device, layers: Sequence[nn.Module], recordable: Iterable[int]) -> None:
        self._device = device
        self._graphs: Graphs | None = device.graphs()
        self._watched = {index: Watched([layers[index]]) for index in recordable}
        starts = range(0, len(layers), PART) if len(self._watched) == len(layers) else ()
        parts = [range(start, min(start + PART, len(layers))) for start in starts]
        self._parts = {part.start: (part, Watched(layers[part.start : part.stop])) for part in parts}
        self._calls: dict[tuple, _Call] = {}
        self._reasons: dict[str, int] = {}
        self._reasons_apart: dict[str, int] = {}
        self._given: tuple | None = None  # the arguments of the layer before, in the same pass
        self._call: _Call | None = None
        self._looked: tuple[int, bool] = (-1, False)  # which layer was looked at last, and whether it is altered
        self._ahead = range(0)  # layers that have been issued, in the pass under way
        self._claims: _Claims | None = None
        self._done = device.event()
        self._stream: Stream | None = None

    @property
    def recorded(self) -> int:
        """How many layers have graphs, over all kinds of call."""
        calls = list(self._calls.values())
        return sum(found is not None for call in calls for found in list(call.layers.values()))

    @property
    def chained(self) -> int:
        """In how many kinds of call several layers go out in one launch, where nothing happens between them."""
        chains = [call.chained for call in list(self._calls.values())]
        return sum(chain is not None and max(chain.proofs.copy().values(), default=0) >= PROOFS for chain in chains)

    @property
    def unchained(self) -> dict[str, int]:
        """Why layers that have graphs go out one by one, each reason with the first layer that it was found at."""
        return dict(self._reasons_apart)

    @property
    def refused(self) -> dict[str, int]:
        """Why layers that could be recorded were not, each reason with the first layer that it was found at."""
        return dict(self._reasons)

    def __enter__(self) -> None:
        """A pass begins on the current stream, behind the one before."""
        stream = self._device.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_event(self._done)
        self._stream = stream

    def __exit__(self, *exception: object) -> None:
        """The pass has ended; what it was given is let go of."""
        self._forget_given()
        self._looked = (-1, False)
        self._ahead, self._claims = range(0), None
        if self._stream is not None:
            self._done.record(self._stream)

    def close(self) -> None:
        """Forget all graphs; the parameters may go."""
        self._forget_given()
        self._watched.clear()
        self._parts.clear()
        self._calls.clear()
        self._ahead, self._claims = range(0), None
        self._graphs = None  # and with it the memory that they shared

    def run(
        self,
        index: int,
        original: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        undisturbed: Callable[[int, int], bool],
    ) -> Any:
        """`original(*args, **kwargs)` of layer `index`, from its graphs if it can be.

        What it returns is overwritten by its next pass only where the next layer takes it, unseen by anyone else.

        Args:
            undisturbed: whether nothing happens between layers `first` and `last` - 1, so that they may be issued at
                once.
        """
        hidden = hidden_of(args, kwargs)
        given = (*args[1:], *kwargs.values()) if args else _others(kwargs)
        if index in self._ahead and index > self._ahead.start:
            layers = self._call.chained.layers
            if hidden is layers[index - 1].out and self._is_given(given):
                return self._handed_on(index, layers[index])
            # the decoder does something else this time: this layer and the next ones once more, on what they are given
            self._fail(self._call, self._ahead.start, "the decoder does something else between them")
            self._ahead = range(0)
        if index not in self._watched or hidden.shape[1] != 1 or self._altered(index):
            return original(*args, **kwargs)
        if not self._is_given(given):
            self._forget_given()
            self._given, self._call = given, self._call_of(index, hidden, given, tuple(kwargs))
        call = self._call
        if call is None:
            return original(*args, **kwargs)
        found = call.layers.get(index)
        if found is None and index in call.layers:
            return original(*args, **kwargs)
        if found is not None and self._watched[index].moved(found.places):
            self._forget_recordings(index)
            found = None
        if found is None:
            return self._first_time(index, original, args, kwargs)
        if found.proofs < PROOFS:
            return self._prove(index, found, original, args, kwargs)
        if index in self._parts and call.faults[index] < FAULTS:
            self._issue_part(*self._parts[index], hidden, undisturbed)
        if index not in self._ahead:
            found.issue(hidden, call.cache.layers[index], self._stream)
            if self._claims is not None:
                self._compare(index, found)
        return self._handed_on(index, found)

    def _is_given(self, given: tuple) -> bool:
        """As the layer before in the same pass."""
        mine = self._given
        return mine is not None and len(given) == len(mine) and all(map(is_, given, mine))

    def _handed_on(self, index: int, found: Recorded) -> Any:
        """What layer `index` returns, which has been issued."""
        if index + 1 in self._ahead:
            return found.returned
        if index in self._ahead:
            self._call.faults[self._ahead.start] = 0
        if self._comes_next(index + 1):
            return found.returned
        if index in self._ahead and index + 1 == len(self._watched):
            with Uninterrupted(), suppress(Exception):  # what is wrong is told of when it is recorded in time
                self._call.chained.prepare(self._call.cache, ahead=1)
        return copied(found.returned)

    def _issue_part(
        self, part: range, look: Watched, hidden: torch.Tensor, undisturbed: Callable[[int, int], bool]
    ) -> None:
        """Issue its layers at once, if they can be and have been proven to be right; else they are to go one by one."""
        call = self._call
        try:
            chained = call.chained or self._put_together(call)
            if chained is None or not call.cache.uniform or look.altered or not undisturbed(part.start, part.stop):
                return
            if any(self._watched[index].moved(chained.layers[index].places) for index in part):
                return
            with Uninterrupted():
                kind = part.start, chained.prepare(call.cache)
                chained.issue(part, hidden, call.cache, self._stream)
            if chained.proofs[kind] >= PROOFS:
                self._ahead = part
            else:
                layers = {index: (chained.layers[index].out, *call.cache.layers[index].written(1)) for index in part}
                given = {index: tuple(map(torch.clone, layer)) for index, layer in layers.items()}
                self._claims = _Claims(call, chained, kind, given)
        except NotRecorded as reason:
            for start in self._parts:
                self._fail(call, start, str(reason), FAULTS)
        except Exception as error:  # noqa: BLE001 - the layers run one by one
            self._fail(call, part.start, f"{type(error).__name__}: {error}")

    def _put_together(self, call: _Call) -> Chained | None:
        """None as long as a layer has no graphs that were proven, or does not read what the one before writes."""
        if None in call.layers.values():
            raise NotRecorded("not all of them have graphs")
        layers = [call.layers.get(index) for index in range(len(self._watched))]
        if any(layer is None or layer.proofs < PROOFS for layer in layers):
            return None
        apart = [index for index in range(1, len(layers)) if layers[index].hidden is not layers[index - 1].out]
        if apart:
            self._forget_from(call, apart[0])
        else:
            call.chained = Chained(self._graphs, layers)
        return call.chained

    def _compare(self, index: int, found: Recorded) -> None:
        """What was issued at once with what was issued one by one; proven when all layers gave the same."""
        claims = self._claims
        given = claims.given.pop(index, None)
        mine = (found.out, *self._call.cache.layers[index].written(1))
        if given is None:
            self._claims = None  # one of them ran its own code meanwhile
        elif not all(map(_same, given, mine)):
            self._claims = None
            self._fail(claims.call, claims.kind[0], "together they give other values than one by one", FAULTS)
        elif not claims.given:
            self._claims = None
            claims.chained.proofs[claims.kind] += 1

    def _fail(self, call: _Call, start: int, why: str, faults: int = 1) -> None:
        """The layers of a part did not go out together, or for nothing."""
        call.faults[start] += faults
        if call.faults[start] >= FAULTS and why not in self._reasons_apart:
            self._reasons_apart[why] = start
            _log.warning("from layer %d on layers go out one by one, each from its graphs: %s", start, why)

    def _altered(self, index: int) -> bool:
        if self._looked[0] != index:
            self._looked = index, self._watched[index].altered
        return self._looked[1]

    def _comes_next(self, index: int) -> bool:
        """Layer `index` will be issued from graphs: nobody sees what it is given."""
        found = self._call.layers.get(index)
        return found is not None and found.proofs >= PROOFS and not self._altered(index)

    def _forget_recordings(self, index: int) -> None:
        """Layer `index` has other parameters, or has them elsewhere; all its recordings hold the old ones.

        The layers behind it read what it wrote, and are recorded again, too.
        """
        for call in self._calls.values():
            call.chained = None
            if call.layers.get(index) is not None:
                self._forget_from(call, index)

    def _forget_from(self, call: _Call, first: int) -> None:
        """Layers `first` and on are recorded again, each behind the one before."""
        for index in [index for index, layer in call.layers.items() if index >= first and layer is not None]:
            if not self._watched[index].moved(call.layers.pop(index).places):
                call.tries[index] -= 1  # the one before is why

    def _forget_given(self) -> None:
        if self._call is not None:
            self._call.cache = None
        self._given = self._call = None

    def _call_of(self, index: int, hidden: torch.Tensor, given: tuple, names: tuple) -> _Call | None:
        """The kind of call that this is, its tensors copied to where graphs read them; None if it is not recorded."""
        tensors: list[torch.Tensor] = []
        caches: list[Cache] = []
        try:
            kind = tuple(_kind(value, hidden.device, tensors, caches) for value in given)
            if len(caches) != 1:
                raise NotRecorded(f"it is given {len(caches)} caches")
            signature = (hidden.shape, hidden.dtype, names, kind, _modes(hidden.device.type))
            call = self._calls.get(signature)
            if call is None:
                if len(self._calls) == KINDS:
                    raise NotRecorded(f"it is called in more than {KINDS} ways, by shapes and settings")
                with torch.inference_mode(False):
                    call = self._calls[signature] = _Call([torch.empty_like(tensor) for tensor in tensors])
        except NotRecorded as reason:
            self._tell(index, str(reason))
            return None
        for mine, tensor in zip(call.inputs, tensors, strict=True):
            mine.copy_(tensor)
        call.cache = caches[0]
        return call

    def _first_time(self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Record the layer, and run its own code."""
        call, hidden = self._call, hidden_of(args, kwargs)
        args, kwargs = replace_hidden(args, kwargs, hidden.clone())  # trials may change what they are given
        call.tries[index] += 1
        if call.tries[index] > TRIES:
            call.layers[index] = None
            self._tell(index, f"{TRIES} recordings were not enough: its parameters move, or each of them fails")
            return original(*args, **kwargs)
        with Uninterrupted():
            trial = replace_hidden(args, kwargs, hidden.clone())
            original(*trial[0], **trial[1])  # what it needs once is loaded then, and not while it is recorded
            recorded = self._record(index, original, args, kwargs)
        if recorded is None:
            return original(*args, **kwargs)  # last, so that the cache holds what it writes
        call.layers[index] = recorded
        return self._prove(index, recorded, original, args, kwargs)

    def _record(self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict) -> Recorded | None:
        call, before = self._call, self._call.layers.get(index - 1)
        with torch.inference_mode(False), torch.no_grad():
            mine = torch.empty_like(hidden_of(args, kwargs)) if before is None else before.out
            mine.copy_(hidden_of(args, kwargs))
            try:
                recording = Recording(self._graphs, self._stream, mine, call.cache.layers[index])
                given = _with(call.inputs, mine, recording, args, kwargs)
                return recording.record(original, *given, self._watched[index].places)
            except NotRecorded as reason:
                call.layers[index] = None
                self._tell(index, str(reason))
            except Exception as error:  # noqa: BLE001 - whatever it is, the layer's own code runs without graphs
                self._tell(index, f"{type(error).__name__}: {error}")
        return None

    def _prove(self, index: int, recorded: Recorded, original: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """What the layer's own code returns; graphs that give anything else, in K and V too, are not used."""
        cache_layer, why = self._call.cache.layers[index], "its graphs give other values than its own code"
        try:
            recorded.issue(hidden_of(args, kwargs), cache_layer, self._stream)
        except Exception as error:  # noqa: BLE001 - the layer's own code runs without graphs
            recorded, why = None, f"{type(error).__name__}: {error}"
        out = original(*args, **kwargs)  # last, so that the cache holds what it writes
        given = (first_of(out), *cache_layer.written(1))
        if recorded is not None and all(map(_same, given, (recorded.out, recorded.keys, recorded.values))):
            recorded.proofs += 1
            if recorded.proofs == PROOFS:
                self._call.tries[index] = 0
        else:
            self._call.layers[index] = None
            self._tell(index, why)
        return out

    def _tell(self, index: int, why: str) -> None:
        if why not in self._reasons:
            self._reasons[why] = index
            _log.warning("layer %d is not issued from graphs, its own code runs: %s", index, why)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _modes(device_type: str) -> tuple:
    """Torch's settings that decide which kernels run.

    Raises:
        NotRecorded: it is in a mode that must see every operation.
    """
    if torch.is_autocast_enabled(device_type):
        raise NotRecorded("it runs under autocast, which keeps casted weights for a while")
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    if strange := [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]:
        raise NotRecorded(f"it runs in torch's mode {strange[0]}")
    settings = torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.preferred_blas_library(),
        torch.backends.cudnn.enabled,
        _flash_kind(),
        *(getattr(settings, name, None) for name in PRECISIONS),
        *(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ATTENTIONS),
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        *torch._C._get_sdp_priority_order(),
    )


def _kind(value: Any, device: torch.device, tensors: list[torch.Tensor], caches: list[Cache]) -> Any:
    """What of an argument may not change between two calls; its tensors and caches are added to the lists."""
    if isinstance(value, torch.Tensor):
        if value.device != device or value.dim() > 3:
            raise NotRecorded(f"it is given a tensor of {value.dim()} dimensions on {value.device}, such as a mask")
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, Cache):
        caches.append(value)
        return Cache
    if isinstance(value, tuple):
        return tuple(_kind(each, device, tensors, caches) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    raise NotRecorded(f"it is given a {type(value).__name__}")


def _with(
    inputs: list[torch.Tensor], hidden: torch.Tensor, cache: Any, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The arguments of a call, with `hidden`, the tensors of `inputs` and `cache` in their places."""
    tensors = iter(inputs)

    def mine(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return next(tensors)
        if isinstance(value, Cache):
            return cache
        return tuple(map(mine, value)) if isinstance(value, tuple) else value

    if args:
        return (hidden, *map(mine, args[1:])), {name: mine(value) for name, value in kwargs.items()}
    return (), {name: hidden if name == "hidden_states" else mine(value) for name, value in kwargs.items()}


def _others(kwargs: dict) -> tuple:
    """The arguments besides the hidden states."""
    return tuple(value for name, value in kwargs.items() if name != "hidden_states")
