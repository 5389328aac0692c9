"""Every error that Djinn raises, as one tree.

    DjinnError
    ├── UsageError               the caller asked for something that cannot be; nothing changed
    │   ├── ConfigError          a setting is unknown, of the wrong type or out of range
    │   ├── BreakpointError      a breakpoint at a layer or token that does not exist, or that never fired
    │   ├── EditError            an edit of the wrong shape, dtype or position
    │   └── SessionStateError    an operation that the session's state does not allow
    ├── CapacityError            there is not enough of something; nothing was lost, retry after freeing some
    │   ├── OutOfDeviceMemory
    │   ├── OutOfHostMemory
    │   ├── OutOfDisk
    │   └── PinningRefused       the operating system would not page-lock host memory
    ├── DeviceError              the device or its driver failed
    │   └── TransferError        a copy failed, or moved other bytes than planned
    ├── UnsupportedModel         the model cannot be served exactly, with what differs
    ├── WeightsError             a checkpoint with missing, extra, truncated, corrupt or mixed tensors
    ├── IntegrityError           stored session state does not match its checksum or its model
    └── WorkerError              something unforeseen, chained, ended what a thread did for a session; try again

A message says what failed, where, the state it left behind, and the next step. The classes under
`CapacityError` also carry the numbers as attributes.
"""


class DjinnError(Exception):
    """The root: `except DjinnError` catches everything that Djinn raises on purpose."""


class UsageError(DjinnError):
    """The caller asked for something that cannot be. Nothing was changed."""


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type, or out of range."""


class BreakpointError(UsageError):
    """A breakpoint names a layer or token that does not exist, or it never fired."""


class EditError(UsageError):
    """An edit does not fit the boundary: shape, dtype or positions."""


class SessionStateError(UsageError):
    """The session's state does not allow the operation."""


class CapacityError(DjinnError):
    """There is not enough room. Nothing was lost; free some and retry.

    Attributes:
        needed_bytes: what the operation asked for.
        free_bytes: what could have been given.
    """

    def __init__(self, message: str, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{message} (needed {needed_bytes:,} bytes, free {free_bytes:,} bytes)")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class OutOfDeviceMemory(CapacityError):
    """The device budget, or the device beside others, cannot hold what was asked for."""


class OutOfHostMemory(CapacityError):
    """The host budget cannot hold what was asked for."""


class OutOfDisk(CapacityError):
    """The disk budget, or the file system, cannot hold what was asked for."""


class PinningRefused(CapacityError):
    """The operating system would not page-lock host memory (see `ulimit -l`)."""


class DeviceError(DjinnError):
    """The device or its driver failed."""


class TransferError(DeviceError):
    """A copy failed, or moved other bytes than planned."""


class UnsupportedModel(DjinnError):
    """The model cannot be served exactly; the message says what differs."""


class WeightsError(DjinnError):
    """A checkpoint has missing, extra, truncated, corrupt or mixed tensors."""


class IntegrityError(DjinnError):
    """Stored session state does not match its checksum or its model."""


class WorkerError(DjinnError):
    """An error that is not Djinn's ended what a thread did for a session, which is whole. `__cause__` has the error."""


def unloaded() -> SessionStateError:
    """The error for a pass of a model that has been unloaded."""
    return SessionStateError("the model was unloaded and its weights are gone; load it again")
