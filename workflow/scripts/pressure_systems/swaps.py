"""What moved during a pressure run, from the pager's own events: bytes, times, and the rate while it moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from djinn_core.device.base import Event
from djinn_core.sessions.pagerevents import PagerEvent
from workflow.lib.harness import Experiment
from workflow.lib.results import write_text

Interval = tuple[float, float]
LOG = "pressure.log"  # beside the results


def record(
    exp: Experiment, events: Sequence[PagerEvent], origin: Event, numbers: dict[str, int], dims: dict[str, Any]
) -> None:
    """Samples of every swap and eviction, of the sessions of these `numbers`, by id.

    `origin` was recorded, with timing, before any of them.
    """
    moving: dict[str, list[Interval]] = {"swap_in": [], "swap_out": []}
    moved_bytes = 0
    for event in events:
        if event.event in moving:
            begin, end = event.copies
            interval = (origin.elapsed_time(begin), origin.elapsed_time(end))
            moving[event.event].append(interval)
            moved_bytes += event.bytes
            whose = dims | {"session": numbers[event.session]}
            exp.result.sample(f"{event.event}_ms", interval[1] - interval[0], "ms", **whose)
            exp.result.sample(f"{event.event}_bytes", event.bytes, "bytes", **whose)
        elif event.event in ("disk_write", "disk_read"):
            exp.result.sample(f"{event.event}_bytes", event.bytes, "bytes", **dims)
    evicted = sum(event.bytes for event in events if event.event == "evict")
    exp.result.sample("evicted_bytes", evicted, "bytes", **dims)
    alone_in, alone_out, both = overlap(moving["swap_in"], moving["swap_out"])
    exp.result.sample("swap_in_alone_ms", alone_in, "ms", **dims)
    exp.result.sample("swap_out_alone_ms", alone_out, "ms", **dims)
    exp.result.sample("swap_both_ms", both, "ms", **dims)

    def record_rate() -> None:
        rates = exp.result.limits
        possible = alone_in * rates["h2d_gbps"] + alone_out * rates["d2h_gbps"] + both * rates["bidirectional_gbps"]
        if possible:
            exp.result.sample("swap_rate_ratio", moved_bytes / (possible * 1e6), "ratio", **dims)

    exp.at_end.append(record_rate)


def overlap(first: Iterable[Interval], second: Iterable[Interval]) -> tuple[float, float, float]:
    """How long only the first kind, only the second, and both were under way."""
    edges = sorted(
        (time, step, kind)
        for kind, intervals in enumerate((first, second))
        for begin, end in intervals
        for time, step in ((begin, 1), (end, -1))
    )
    spans = [0.0, 0.0, 0.0]
    active = [0, 0]
    before = 0.0
    for time, step, kind in edges:
        if active[0] and active[1]:
            spans[2] += time - before
        elif active[0] or active[1]:
            spans[0 if active[0] else 1] += time - before
        active[kind] += step
        before = time
    return spans[0], spans[1], spans[2]


def write_log(path: Path, runs: Iterable[tuple[str, Sequence[PagerEvent]]]) -> None:
    """A line per event for a person to read: seconds since its run began, session, what, bytes, milliseconds."""
    lines = []
    for title, events in runs:
        lines.append(f"# {title}\n")
        begin_s = events[0].time_s if events else 0.0
        for event in events:
            lines.append(
                f"{event.time_s - begin_s:10.4f} s  {event.session:<6} {event.event:<24} "
                f"{event.bytes:>15,} bytes {event.ms:10.3f} ms\n"
            )
    write_text(path, "".join(lines))
