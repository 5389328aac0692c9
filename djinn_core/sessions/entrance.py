"""How a boundary leaves a pass, and how it gets back into one: its copy is the first thing that a resume issues.

The caller's own thread issues it, into a standing slot, on a stream of its own: no queue, no map, no lock but the
boundary's own, so that the copy is under way within microseconds of the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from djinn_core.errors import IntegrityError
from djinn_core.sessions.checkpoint import Boundary, Checkpoint
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.staging import Slot

if TYPE_CHECKING:
    from djinn_core.sessions.pager import Pager


def reserve_boundary(pager: Pager, holding: Holding, tokens: int, hidden_size: int) -> Boundary:
    """Room on the host for a boundary, before the pass begins, so that a full host stops nothing half-way.

    Raises:
        OutOfHostMemory: there is none; nothing was executed.
    """
    shape = torch.Size((holding.layout.batch_size, tokens, hidden_size))
    boundary = Boundary(shape, holding.layout.dtype, pager.device.event(blocking=True))
    boundary.host = pager.tiers.allocate(boundary.size_bytes, holding.id)
    return boundary


def keep_boundary(pager: Pager, boundary: Boundary, hidden: torch.Tensor) -> None:
    """Write the boundary to the host, asynchronously; the device copy stays until that is complete."""
    hidden = hidden.contiguous()
    pager.staging.store(hidden, boundary.host.tensor[: boundary.size_bytes], boundary.written)
    boundary.device = hidden


def load_boundary(
    pager: Pager, holding: Holding, boundary: Boundary, *, stands_at: Checkpoint | None
) -> Slot | torch.Tensor:
    """Issue the boundary's copy to the device before anything else; the tensor itself when it is still there.

    Raises:
        IntegrityError: the disk returned other bytes. The session is FAILED when the checkpoint that it `stands_at` is
            the only one that it has.
    """
    there = boundary.device
    if there is not None:
        return there
    slot = pager.staging.take(pager.way)
    with boundary.lock:
        host = boundary.host
        boundary.readers += 1
    try:
        if host is None:
            pager.way.leave()
            pager.tiers.fetch(boundary, holding.id)
            host = boundary.host
        pager.staging.load(slot, host)
    except BaseException as error:
        with boundary.lock:
            boundary.readers -= 1
        pager.staging.give_back(slot)
        if isinstance(error, IntegrityError):
            if holding.checkpoints == [stands_at]:
                pager.fail(holding, error)
            else:
                error.add_note("the session's other checkpoints can still be resumed")
        raise
    holding.reading = (boundary, slot.ready)
    return slot


def enter_boundary(pager: Pager, boundary: Boundary, slot: Slot | torch.Tensor) -> torch.Tensor:
    """The boundary as the next layer's input, on the compute stream; the slot is given back behind it."""
    if isinstance(slot, torch.Tensor):
        return slot.clone()  # the checkpoint stays as it was, whatever a hook does
    compute = pager.device.current_stream()
    try:
        compute.wait_event(slot.ready)
        hidden = slot.bytes[: boundary.size_bytes].view(boundary.dtype).view(boundary.shape).clone()
        pager.staging.read(slot, compute)
    finally:
        pager.staging.give_back(slot)
    return hidden
