"""What this machine's links can do, measured through the runtime's own host tier, and whether to trust it.

`measure_limits` gives the four rates that every ratio to the link uses; `certify` adds the table by size and a
verdict per line, each with its threshold. Nothing is assumed from a data sheet except the PCIe standard's own
bandwidth per lane, which the link is compared with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch

from djinn_core.device import Device, Direction, open_device
from djinn_core.device.base import Event
from djinn_core.memory.hosttier import HostTier

Pinning = Literal["required", "optional"]
WARMUP_COPIES = 2
# a short copy is repeated until this much time is covered, so that one late wake-up does not decide
MIN_TIMED_S = 0.002
# both directions at once: copies in each queue, at most so many bytes of them, cut into pieces that are counted
BOTH_WAYS_COPIES = 4
BOTH_WAYS_BYTES = 4 << 30
PIECES = 16
MIN_PIECE_BYTES = 1 << 20


class LinkBench:
    """One buffer on the device and two on the host, and timed copies between them.

    Times are the host's clock from the issue to the stream's end, the device idle before. All memory is given back
    by `close`.
    """

    def __init__(self, device: Device, size_bytes: int, *, pinning: Pinning = "required") -> None:
        self.device = device
        self.size_bytes = size_bytes
        self._cleanup = ExitStack()
        self._plain: torch.Tensor | None = None
        try:
            self.near = [self._on_device() for _ in range(2)]
            tier = HostTier(device, 2 * size_bytes + (1 << 20), pinning=pinning)
            self._cleanup.callback(tier.close)
            began_s = time.perf_counter()
            blocks = [tier.allocate_exact(size_bytes, "certify") for _ in range(2)]
            self.pinning_s = time.perf_counter() - began_s
            for block in blocks:
                self._cleanup.callback(block.free)
                block.tensor.fill_(1)
            self.far = [block.tensor for block in blocks]
            self.pinned = tier.pinned
            self.streams = [device.stream() for _ in range(2)]
        except BaseException:
            self._cleanup.close()
            raise

    def __enter__(self) -> LinkBench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.device.synchronize()
        self.near, self.far = [], []
        self._cleanup.close()

    def _on_device(self) -> torch.Tensor:
        granularity = self.device.granularity_bytes
        size_bytes = -(-self.size_bytes // granularity) * granularity
        handle = self.device.create(size_bytes)
        self._cleanup.callback(self.device.destroy, handle)
        address = self.device.reserve(size_bytes)
        self._cleanup.callback(self.device.release, address, size_bytes)
        self.device.map(address, handle, size_bytes)
        self._cleanup.callback(self.device.unmap, address, size_bytes)
        self.device.grant(address, size_bytes)
        return self.device.tensor(address, size_bytes)[: self.size_bytes]

    def h2d_gbps(self, size_bytes: int) -> float:
        """One timing of host to device."""
        near, far = self.near[0][:size_bytes], self.far[0][:size_bytes]
        return self._rate(size_bytes, lambda: self._copy(0, near, far, Direction.H2D))

    def d2h_gbps(self, size_bytes: int) -> float:
        """One timing of device to host."""
        near, far = self.near[1][:size_bytes], self.far[1][:size_bytes]
        return self._rate(size_bytes, lambda: self._copy(1, far, near, Direction.D2H))

    def bidirectional_gbps(self, size_bytes: int) -> float:
        """One timing of both at once: what the two directions moved while both were under way, over that time.

        Each direction gets a queue of copies, in pieces with an event behind each, so that neither the first one's
        head start nor the tail, in which one direction has the link to itself, is counted.
        """
        copies = max(2, min(BOTH_WAYS_COPIES, BOTH_WAYS_BYTES // size_bytes))
        piece_bytes = max(-(-size_bytes // PIECES), MIN_PIECE_BYTES)
        cuts = [slice(at, min(at + piece_bytes, size_bytes)) for at in range(0, size_bytes, piece_bytes)]
        while True:
            both_ms, moved_bytes = self._both_ways(cuts * copies)
            if both_ms >= MIN_TIMED_S * 1e3:
                return moved_bytes / both_ms / 1e6
            copies *= 2

    def _both_ways(self, cuts: Sequence[slice]) -> tuple[float, float]:
        """Milliseconds in which both queues were under way, and what they moved in them."""
        marks: list[list[tuple[Event, int]]] = [[(self._mark(way), 0)] for way in range(2)]
        for cut in cuts:
            self._copy(0, self.near[0][cut], self.far[0][cut], Direction.H2D)
            self._copy(1, self.far[1][cut], self.near[1][cut], Direction.D2H)
            for way, row in enumerate(marks):
                row.append((self._mark(way), row[-1][1] + cut.stop - cut.start))
        for stream in self.streams:
            stream.synchronize()
        origin = marks[0][0][0]
        curves = [[(origin.elapsed_time(event), size) for event, size in row] for row in marks]
        begin_ms, end_ms = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        return end_ms - begin_ms, sum(moved_by(curve, end_ms) - moved_by(curve, begin_ms) for curve in curves)

    def _mark(self, stream: int) -> Event:
        event = self.device.event(timing=True)
        event.record(self.streams[stream])
        return event

    def pageable_gbps(self, size_bytes: int, direction: Direction) -> float:
        """One timing through plain pageable memory, by torch's own blocking copy."""
        if self._plain is None:
            self._plain = torch.ones(self.size_bytes, dtype=torch.uint8)
        plain, near = self._plain[:size_bytes], self.near[0][:size_bytes]
        if direction is Direction.H2D:
            return self._rate(size_bytes, lambda: near.copy_(plain))
        return self._rate(size_bytes, lambda: plain.copy_(near))

    def _copy(self, stream: int, dst: torch.Tensor, src: torch.Tensor, direction: Direction) -> None:
        self.device.copy(dst, src, self.streams[stream], direction)

    def _rate(self, size_bytes: int, work: Callable[[], object]) -> float:
        repeats = 1
        while True:
            self.device.synchronize()
            began_s = time.perf_counter()
            for _ in range(repeats):
                work()
                for stream in self.streams:
                    stream.synchronize()
            elapsed_s = time.perf_counter() - began_s
            if elapsed_s >= MIN_TIMED_S:
                return repeats * size_bytes / elapsed_s / 1e9
            repeats *= 2


def moved_by(curve: Sequence[tuple[float, int]], at_ms: float) -> float:
    """Bytes that a queue had moved by a time, between the pieces' ends in proportion."""
    for (before_ms, before), (after_ms, after) in pairwise(curve):
        if at_ms < after_ms:
            return before + (after - before) * max(0.0, at_ms - before_ms) / (after_ms - before_ms)
    return curve[-1][1]


@contextmanager
def opened(device: str | Device, size_bytes: int) -> Iterator[Device]:
    """`device` itself, or the one of that name, opened for the block; an emulated one just large enough."""
    if isinstance(device, Device):
        yield device
        return
    capacity = {"capacity_bytes": 4 * size_bytes + (4 << 20)} if device == "cpu" else {}
    found = open_device(device, **capacity)
    try:
        yield found
    finally:
        found.close()


def measure_limits(device: str | Device, *, size_bytes: int, copies: int, pinning: Pinning) -> dict[str, float | None]:
    """h2d_gbps, d2h_gbps, bidirectional_gbps and peer_gbps: medians of `copies` copies of `size_bytes`.

    Through the runtime's own host tier; `peer_gbps` is None without a second GPU. Two copies warm up. Everything is
    given back.

    Raises:
        OutOfDeviceMemory: the device has no room for two buffers of `size_bytes`.
        PinningRefused: the host's two could not be page-locked, and `pinning` is required.
    """
    with opened(device, size_bytes) as found, LinkBench(found, size_bytes, pinning=pinning) as bench:
        rates: dict[str, float | None] = {
            f"{name}_gbps": median_of(getattr(bench, f"{name}_gbps"), copies, size_bytes)
            for name in ("h2d", "d2h", "bidirectional")
        }
        rates["peer_gbps"] = peer_gbps(size_bytes, copies) if found.is_gpu else None
    return rates


def median_of(timed: Callable[..., float], copies: int, *words: Any) -> float:
    """The median of `copies` calls after the warm-ups."""
    for _ in range(WARMUP_COPIES):
        timed(*words)
    return statistics.median(timed(*words) for _ in range(copies))


def peer_gbps(size_bytes: int, copies: int) -> float | None:
    """Device to device from the first GPU to the second; None where there is no second one or no direct path."""
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        return None
    here = torch.ones(size_bytes, dtype=torch.uint8, device="cuda:0")
    there = torch.empty(size_bytes, dtype=torch.uint8, device="cuda:1")

    rate = median_of(_peer_rate, copies, here, there)
    del here, there
    torch.cuda.empty_cache()
    return rate


def _peer_rate(here: torch.Tensor, there: torch.Tensor) -> float:
    torch.cuda.synchronize(here.device)
    began_s = time.perf_counter()
    there.copy_(here, non_blocking=True)
    torch.cuda.synchronize(here.device)
    torch.cuda.synchronize(there.device)
    return here.numel() / (time.perf_counter() - began_s) / 1e9


def link_table(
    bench: LinkBench, sizes_bytes: Sequence[int], copies: int, *, limits: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of (`metric`, `direction`, `memory`, `size_bytes`, `value`, `unit`), one per timing, warm-ups flagged.

    With `limits` only what the four rates are made of, under the metric `limit_gbps`.
    """
    memory = "pinned" if bench.pinned else "pageable"  # where pinning is optional and was refused, nothing is pinned
    ways: dict[tuple[str, str], Callable[[int], float]] = {
        ("h2d", memory): bench.h2d_gbps,
        ("d2h", memory): bench.d2h_gbps,
        ("bidirectional", memory): bench.bidirectional_gbps,
    }
    if bench.pinned and not limits:
        ways["h2d", "pageable"] = lambda size_bytes: bench.pageable_gbps(size_bytes, Direction.H2D)
        ways["d2h", "pageable"] = lambda size_bytes: bench.pageable_gbps(size_bytes, Direction.D2H)
    for size_bytes in sizes_bytes:
        for (direction, kind), timed in ways.items():
            for number in range(WARMUP_COPIES + copies):
                yield {
                    "metric": "limit_gbps" if limits else "copy_gbps",
                    "value": timed(size_bytes),
                    "unit": "GB/s",
                    "warmup": number < WARMUP_COPIES,
                    "direction": direction,
                    "memory": kind,
                    "size_bytes": size_bytes,
                }
