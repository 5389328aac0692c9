"""The link's own rate, taken around every result, so that a ratio to the link is to the link of that moment."""

from __future__ import annotations

from typing import Any

from djinn_core.certify import measure_limits

RATES = ("h2d_gbps", "d2h_gbps", "bidirectional_gbps", "peer_gbps")
# What an experiment's ratios use of the link; only the drift of these decides. One that is not here uses all four.
RATES_USED = {
    "certify": ("h2d_gbps",),
    "streaming": ("h2d_gbps",),
    "resume": ("h2d_gbps", "d2h_gbps"),
    "pressure": ("h2d_gbps", "d2h_gbps", "bidirectional_gbps"),
}
# Systems that use less: these hold what fits and bring nothing back, so the link never works both ways for them.
# A reference says what is right, and nothing of it is a time.
ONE_WAY = {("pressure", "eager"), ("pressure", "djinn_uncapped")}


def measure(device: str, machine_settings: dict[str, Any]) -> dict[str, float | None]:
    """The four rates by the machine's settings (`limits` in the preset)."""
    settings = machine_settings["limits"]
    return measure_limits(
        device,
        size_bytes=settings["copy_bytes"],
        copies=settings["copies"],
        pinning=machine_settings["pinning"],
    )


def drift(before: dict[str, float | None], after: dict[str, float | None]) -> dict[str, float | None]:
    """The change of each rate as a share of the rate before; None where it was not measured."""
    return {
        name: None if before[name] is None or after[name] is None else abs(after[name] - before[name]) / before[name]
        for name in RATES
    }


def rates_used(experiment: str, system: str) -> tuple[str, ...]:
    """The rates whose drift decides about a result."""
    if system == "reference":
        return ()
    used = RATES_USED.get(experiment, RATES)
    return tuple(name for name in used if name != "bidirectional_gbps") if (experiment, system) in ONE_WAY else used


def bracket(
    experiment: str,
    system: str,
    before: dict[str, float | None],
    after: dict[str, float | None],
    machine_settings: dict[str, Any],
) -> dict[str, Any]:
    """A result's `limits`: the mean of before and after, both, every rate's drift, and which of them decide.

    `drift` is the largest among `drift_of`, the rates that this experiment's ratios use.
    """
    settings = machine_settings["limits"]
    means = {
        name: None if before[name] is None or after[name] is None else (before[name] + after[name]) / 2
        for name in RATES
    }
    by_rate, used = drift(before, after), rates_used(experiment, system)
    section = means | {
        "before": before,
        "after": after,
        "drift": max((by_rate[name] for name in used if by_rate[name] is not None), default=0.0),
        "drift_of": list(used),
        "drift_by_rate": by_rate,
        "drift_allowed": settings["drift_allowed"],
        "drift_decides": settings["drift_decides"],
    }
    if not settings["drift_decides"]:
        section["note"] = "memory-to-memory copies of an emulated device: drift is recorded and decides nothing here"
    return section


def moved(section: dict[str, Any]) -> dict[str, float]:
    """The rates that decide and drifted by more than is allowed, each with its drift."""
    by_rate = section["drift_by_rate"]
    return {name: by_rate[name] for name in section["drift_of"] if (by_rate[name] or 0.0) > section["drift_allowed"]}
