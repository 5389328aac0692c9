"""The states of a session, and the only way from one to another.

    RUNNING ──pause──> PAUSED ──evicted──> SWAPPED
       ^                 │  ^                │  │
       │                 │  └──prefetched────┘  │
       └───RESUMING <────┴───────resume─────────┘      any of them ──> CLOSED, FAILED; FAILED ──> CLOSED

PAUSED means that memory may be taken as soon as it is clean; SWAPPED that none is held. FAILED is final but for
`close`: state was lost in a tier (a checksum), and nothing pretends otherwise. Not taken: flags (is_paused,
is_resident, …), whose combinations nobody can list.
"""

from __future__ import annotations

from enum import Enum

from djinn_core.errors import SessionStateError


class SessionState(Enum):
    """Where a session is in its life."""

    RUNNING = "running"
    PAUSED = "paused"
    SWAPPED = "swapped"
    RESUMING = "resuming"
    CLOSED = "closed"
    FAILED = "failed"


_S = SessionState

TRANSITIONS: dict[SessionState, frozenset[SessionState]] = {
    _S.RUNNING: frozenset({_S.PAUSED, _S.CLOSED, _S.FAILED}),
    _S.PAUSED: frozenset({_S.SWAPPED, _S.RESUMING, _S.CLOSED, _S.FAILED}),
    _S.SWAPPED: frozenset({_S.PAUSED, _S.RESUMING, _S.CLOSED, _S.FAILED}),
    _S.RESUMING: frozenset({_S.RUNNING, _S.PAUSED, _S.CLOSED, _S.FAILED}),
    _S.FAILED: frozenset({_S.CLOSED}),
    _S.CLOSED: frozenset(),
}

_REMEDY = {
    _S.RUNNING: "it is running already; pause it first",
    _S.PAUSED: "it is paused; resume it first",
    _S.SWAPPED: "it is paused and off the device; resume it first",
    _S.RESUMING: "it is being brought back; let the resume end first",
    _S.CLOSED: "it is closed, and its state is gone; open another session, or load a saved one",
    _S.FAILED: "a part of its state was lost; close it, and load a saved one or open another",
}


def refusal(session: str, state: SessionState, doing: str) -> SessionStateError:
    """The error for an operation that `state` does not allow; the caller raises it."""
    return SessionStateError(f"session {session} cannot {doing}: {_REMEDY[state]}")


def transition(session: str, state: SessionState, to: SessionState, doing: str) -> SessionState:
    """`to`, when a session in `state` may go there.

    Raises:
        SessionStateError: it may not; the message says what to do instead.
    """
    if to not in TRANSITIONS[state]:
        raise refusal(session, state, doing)
    return to
