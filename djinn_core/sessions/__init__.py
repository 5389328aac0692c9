"""Sessions: inferences that stop at a layer, leave the GPU, and go on from exactly there."""

from djinn_core.sessions import edits
from djinn_core.sessions.breakpoints import Breakpoint
from djinn_core.sessions.checkpoint import Checkpoint
from djinn_core.sessions.edits import Ablate, Add, Edit, ProjectOut, Replace, Scale
from djinn_core.sessions.policy import Candidate, ExpectedLast, Policy
from djinn_core.sessions.rooms import SessionInfo, Sessions, SessionTable
from djinn_core.sessions.sampling import Sampling
from djinn_core.sessions.session import Session
from djinn_core.sessions.state import SessionState

__all__ = [
    "Ablate",
    "Add",
    "Breakpoint",
    "Candidate",
    "Checkpoint",
    "Edit",
    "ExpectedLast",
    "Policy",
    "ProjectOut",
    "Replace",
    "Sampling",
    "Scale",
    "Session",
    "SessionInfo",
    "SessionState",
    "SessionTable",
    "Sessions",
    "edits",
]
