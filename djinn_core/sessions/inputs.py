"""What a pass is given: ids, mask and positions, and the edits on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from djinn_core.errors import EditError, SessionStateError, UsageError
from djinn_core.sessions.blocks import Layout
from djinn_core.sessions.breakpoints import check_layer
from djinn_core.sessions.checkpoint import PassInputs, Story
from djinn_core.sessions.edits import Edit, check_edits
from djinn_core.sessions.holding import Holding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EditsByLayer = Mapping[int, Sequence[Edit]]
NO_EDITS: EditsByLayer = {}


def make_inputs(
    model: PreTrainedModel,
    holding: Holding,
    story: Story,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    device: torch.device,
) -> PassInputs:
    """The inputs of a pass over the pending token and `ids` [B, T], on the device.

    Positions are given only where something is padded, as `generate` does; else the model counts them itself.

    Raises:
        UsageError: shapes or dtypes do not fit the session, or an id lies outside of the model's vocabulary. On a GPU
            such an id would end the process's context, and every session with it. Ids that lie there already are not
            looked at: that would wait for the device.
        SessionStateError: the session would grow past its longest length, or past where a longrope model turns to other
            frequencies: the keys that it holds are turned by the earlier ones, and stock `generate` computes them anew.
    """
    batch_size, longest, length = holding.layout.batch_size, holding.layout.max_length, min(holding.table.lengths)
    if not isinstance(ids, torch.Tensor):
        raise UsageError(f"input_ids are a {type(ids).__name__}; give a tensor of whole numbers, [{batch_size}, T]")
    if ids.ndim != 2 or ids.shape[0] != batch_size or ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(
            f"input_ids are {ids.dtype} of shape {tuple(ids.shape)}; the session takes whole numbers of "
            f"[{batch_size}, T]"
        )
    if ids.device.type == "cpu" and ids.numel():
        _check_ids(model, ids)
    if mask is not None and mask.shape != ids.shape:
        raise UsageError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; give equal ones")
    ids = ids.to(device)
    if story.pending is not None:
        ids = torch.cat([story.pending, ids], dim=1)
    new = ids.shape[1]
    if not new:
        raise UsageError("input_ids are empty")
    if length + new > longest:
        raise SessionStateError(
            f"session {holding.id} holds {length} tokens and was opened for {longest}; {new} more do "
            "not fit: open one with a larger max_length"
        )
    if story.mask is None and (mask is None or bool(mask.all())):
        if (turns_at := _turns_at(model)) is not None:
            _check_turn(holding.id, length, length + new, turns_at)
        return PassInputs(ids, None, None)
    before = story.mask if story.mask is not None else torch.ones((ids.shape[0], length), dtype=torch.long)
    added = torch.ones(ids.shape, dtype=torch.long, device=device)
    if mask is not None:
        added[:, new - mask.shape[1] :] = mask.to(device)
    whole = torch.cat([before.to(device), added], dim=1)
    if (turns_at := _turns_at(model)) is not None:
        _check_turn(holding.id, *(int(rows.sum(-1).max()) for rows in (before, whole)), turns_at)
    positions = (whole.cumsum(-1) - 1).masked_fill(whole == 0, 0)[:, -new:]
    return PassInputs(ids, whole, positions)


def _turns_at(model: PreTrainedModel) -> int | None:
    """The positions up to which a longrope model uses its short frequencies; None for every other model."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None


def _check_turn(session: str, before: int, after: int, turns_at: int) -> None:
    if 0 < before <= turns_at < after:
        raise SessionStateError(
            f"session {session} holds {before} positions and would have {after}: beyond {turns_at} this model's "
            "longrope turns every key by other frequencies; give all of it as the prompt of a new session"
        )


def _check_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None:  # wrapped, by an adapter
        return
    least, most = (int(bound) for bound in torch.aminmax(ids))
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise UsageError(f"{wrong} is among the input_ids; the model's go from 0 to {rows - 1}")


def edits_by_layer(
    edits: Sequence[Edit] | Mapping[int, Sequence[Edit]], stop: int | None, tokens: int, layout: Layout, hidden: int
) -> EditsByLayer:
    """Edits by the layer after which they happen, each checked against the boundary there.

    Raises:
        EditError: one does not fit, or could not happen.
        BreakpointError: its layer does not exist.
    """
    if isinstance(edits, Edit):
        edits = (edits,)
    if not edits:
        return NO_EDITS
    if not isinstance(edits, Mapping):
        if stop is None:
            raise EditError("edits without stop_after need a layer each: give a mapping {layer: [edit, …]}")
        edits = {stop: edits}
    shape = (layout.batch_size, tokens, hidden)
    for layer in edits:
        check_layer(layer, layout.layers)
        if stop is not None and layer > stop:
            raise EditError(f"an edit after layer {layer} never happens in a pass that stops after layer {stop}")
    rows = {layer: (given,) if isinstance(given, Edit) else given for layer, given in edits.items()}
    return {layer: check_edits(given, shape, layout.dtype) for layer, given in rows.items()}


def check_later(layer: int, edits: EditsByLayer) -> None:
    """Edits of a pass that has been executed to `layer` happen there or later, or they never do."""
    if edits and min(edits) < layer:
        raise EditError(f"layer {min(edits)} lies before the checkpoint, which stands after layer {layer}")


def check_between(session: str, edits: object, stop_after: int | None) -> None:
    """A session between tokens has no boundary to edit, and no pass to stop."""
    if edits or stop_after is not None:
        raise UsageError(
            f"session {session} stands between tokens: there is no boundary to edit and no pass to stop; "
            "give edits and stop_after to forward"
        )
