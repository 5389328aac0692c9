"""The link's own rate, taken around every result, so that a ratio to the link is to the link of that moment."""

from __future__ import annotations

from typing import Any

from djinn_core.certify import measure_limits

RATES = ("h2d_gbps", "d2h_gbps", "bidirectional_gbps", "peer_gbps")


def measure(device: str, machine_settings: dict[str, Any]) -> dict[str, float | None]:
    """The four rates by the machine's settings (`limits` in the preset)."""
    settings = machine_settings["limits"]
    return measure_limits(
        device,
        size_bytes=settings["copy_bytes"],
        copies=settings["copies"],
        pinning=machine_settings["pinning"],
    )


def drift(before: dict[str, float | None], after: dict[str, float | None]) -> float:
    """The largest change of a rate, as a share of the rate before."""
    changes = [
        abs(after[name] - before[name]) / before[name]
        for name in RATES
        if before[name] is not None and after[name] is not None
    ]
    return max(changes, default=0.0)


def bracket(
    before: dict[str, float | None], after: dict[str, float | None], machine_settings: dict[str, Any]
) -> dict[str, Any]:
    """A result's `limits`: the mean of before and after, both, and the drift with what it decides."""
    settings = machine_settings["limits"]
    means = {
        name: None if before[name] is None or after[name] is None else (before[name] + after[name]) / 2
        for name in RATES
    }
    section = means | {
        "before": before,
        "after": after,
        "drift": drift(before, after),
        "drift_allowed": settings["drift_allowed"],
        "drift_decides": settings["drift_decides"],
    }
    if not settings["drift_decides"]:
        section["note"] = "memory-to-memory copies of an emulated device: drift is recorded and decides nothing here"
    return section
