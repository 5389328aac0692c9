"""The edge of the threads that move sessions: what is raised there becomes an error for whoever waits for it.

Invariant: a thread of the pager ends only when the pager is closed. Whatever is raised while it works for a session
ends that work, stands in the event log, and is raised where the session's caller waits. Not taken: a thread that ends,
and callers that look whether it lives; each of their waits would need a timeout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn_core.errors import DjinnError, WorkerError

if TYPE_CHECKING:
    from djinn_core.sessions.holding import Holding


def told(error: BaseException, holding: Holding, doing: str, remedy: str) -> DjinnError:
    """`error` itself when it is Djinn's own, else one with it as the cause that says whose it is and what to do."""
    if isinstance(error, DjinnError):
        return error
    wrapped = WorkerError(
        f"session {holding.id}, {holding.state.value}: {doing} failed with {type(error).__name__}: {error}; what the "
        f"session holds is whole, {remedy}"
    )
    wrapped.__cause__ = error
    return wrapped
