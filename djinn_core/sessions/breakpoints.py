"""Where and when a pass stops."""

from __future__ import annotations

from dataclasses import dataclass

from djinn_core.errors import BreakpointError


@dataclass(frozen=True)
class Breakpoint:
    """Stop after `layer` of the pass that takes generated token `token` as its input.

    Layers count from 1: `layer` is how many have been executed; the number of layers itself means after the last one,
    before the norm. Tokens count from 0, the first that `generate` chooses. The prefill's own breakpoints are
    `session.forward(ids, stop_after=layer)`.
    """

    layer: int
    token: int


def check_layer(layer: int, layers: int) -> int:
    """`layer`, when a pass of `layers` layers can stop after it.

    Raises:
        BreakpointError: it cannot.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= layers:
        raise BreakpointError(f"no pass can stop after layer {layer!r}: this model has layers 1 to {layers}")
    return layer


def check_breakpoint(stop_at: Breakpoint, layers: int, max_new_tokens: int) -> None:
    """Refuse a breakpoint that could not fire in a generation of `max_new_tokens`.

    Raises:
        BreakpointError: it names a layer or a token that does not exist.
    """
    check_layer(stop_at.layer, layers)
    if isinstance(stop_at.token, bool) or not isinstance(stop_at.token, int) or not 0 <= stop_at.token < max_new_tokens:
        raise BreakpointError(
            f"token {stop_at.token!r} is never run: {max_new_tokens} new tokens are numbered 0 to {max_new_tokens - 1}"
        )
