"""What a decoder layer is called with, and what it returns: hidden states first, in whatever form."""

from __future__ import annotations

from typing import Any

import torch


def hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states [B, T, hidden] among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def replace_hidden(args: tuple, kwargs: dict, hidden: torch.Tensor) -> tuple[tuple, dict]:
    """The arguments, with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def first_of(out: Any) -> torch.Tensor:
    """The hidden states that a layer returned, alone or first in a tuple."""
    return out[0] if type(out) is tuple else out


def copied(out: Any) -> Any:
    """What a layer returned, with a copy of the hidden states."""
    return (out[0].clone(), *out[1:]) if type(out) is tuple else out.clone()
