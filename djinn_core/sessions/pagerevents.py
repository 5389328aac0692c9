"""What the pager did, event by event, for logs and experiments."""

from __future__ import annotations

from dataclasses import dataclass

from djinn_core.device.base import Event

EVENTS_KEPT = 10_000  # with two timing events each, some 20 MB


@dataclass(frozen=True)
class PagerEvent:
    """One thing that the pager did.

    Attributes:
        time_s: on the clock of `time.perf_counter`.
        ms: how long the host was at it; copies may still be in flight.
        copies: timing events around the copies of a swap, on the device's clock.
    """

    time_s: float
    session: str
    event: str
    bytes: int
    ms: float
    copies: tuple[Event, Event] | None = None

    def __str__(self) -> str:
        return f"{self.time_s:.6f} {self.session} {self.event} {self.bytes} bytes {self.ms:.3f} ms"
