"""What stays on the device and what streams through it, decided before anything is copied.

A pure function of sizes and settings: it touches no device, so that every choice can be tested and printed.
Resident layers are spread evenly over the depth: the link then works at one pace, and never waits behind a run of
layers that need nothing from it.

A slot belongs to a position in the stream of passes, position = pass x streamed layers + index. Where the number of
slots divides the number of streamed layers, a layer meets the same slot in every pass and its addresses are stable;
the default number of slots is chosen so when it can be.

With lossless coding a layer crosses the link coded, into one of two landing buffers, and is decoded from there into its
slot. How small it becomes is known only when it has been coded; so the plan is made with the most that a coded layer
can take, and gets the sizes once they are known (`with_coded`). Not taken: to plan with an expected ratio, which would
promise device memory on a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from djinn_core.errors import ConfigError, OutOfDeviceMemory

Residency = Literal["fill", "none", "all"] | int

DEFAULT_CHUNK_BYTES = 64 << 20
DEFAULT_SLOTS = (4, 3, 5, 2)  # in the order of preference; two already keep the link busy when compute is short
LANDINGS = 2  # one is filled while the other is decoded, which takes a small part of the time of the copy


@dataclass(frozen=True)
class Plan:
    """Which layers stay, which stream, and through what.

    Attributes:
        layer_bytes: packed size of each layer, in layer order.
        other_bytes: device bytes of what is neither layer nor ring (embeddings, norms, head), always resident.
        resident: layers that stay on the device.
        streamed: layers that come through the ring in each pass, in order.
        slots: ring slots; 0 when nothing streams.
        slot_bytes: size of a slot, the largest streamed layer rounded up to the granularity.
        chunk_bytes: the largest single copy.
        granularity_bytes: the smallest piece of device memory; each layer and slot is rounded up to it.
        landings: buffers in which coded layers arrive; 0 without coding.
        landing_bytes: size of one, the most that the largest streamed layer can take coded, rounded up.
        coded_bytes: what each layer takes coded, in layer order, with its own size for one that stays; None without
            coding, and before the weights are coded.
    """

    layer_bytes: tuple[int, ...]
    other_bytes: int
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    chunk_bytes: int
    granularity_bytes: int = 1
    landings: int = 0
    landing_bytes: int = 0
    coded_bytes: tuple[int, ...] | None = None

    @property
    def ring_bytes(self) -> int:
        """Device bytes of all slots and landing buffers."""
        return self.slots * self.slot_bytes + self.landings * self.landing_bytes

    @property
    def resident_bytes(self) -> int:
        """Device bytes of everything that stays: resident layers, and what is not a layer."""
        g = self.granularity_bytes
        return round_up(self.other_bytes, g) + sum(round_up(self.layer_bytes[layer], g) for layer in self.resident)

    @property
    def device_bytes(self) -> int:
        """Device bytes in all."""
        return self.resident_bytes + self.ring_bytes

    @property
    def link_bytes(self) -> tuple[int, ...]:
        """What each layer takes on the link: its coded size once it has one."""
        return self.layer_bytes if self.coded_bytes is None else self.coded_bytes

    @cached_property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes that cross the link in one whole pass."""
        return sum(self.link_bytes[layer] for layer in self.streamed)

    @cached_property
    def coded_ratio(self) -> float:
        """Bytes on the link over bytes of the layers that stream; 1 without coding, and where nothing streams."""
        whole_bytes = sum(self.layer_bytes[layer] for layer in self.streamed)
        return self.streamed_bytes_per_pass / whole_bytes if whole_bytes else 1.0

    @property
    def stable_addresses(self) -> bool:
        """True when each layer's parameters have one address for good."""
        return self.slots == 0 or len(self.streamed) % self.slots == 0

    def chunks(self, layer: int) -> tuple[tuple[int, int], ...]:
        """The copies that bring `layer`: (offset, size) in order, covering its block exactly."""
        size, step = self.link_bytes[layer], self.chunk_bytes
        return tuple((offset, min(step, size - offset)) for offset in range(0, size, step))

    def pass_s(self, link_gbps: float) -> float:
        """The time that the link needs for one pass, in seconds, at a measured rate."""
        return self.streamed_bytes_per_pass / (link_gbps * 1e9)

    def with_coded(self, coded_bytes: Mapping[int, int]) -> Plan:
        """The same plan, once each streamed layer is known to take `coded_bytes[layer]` on the link."""
        sizes = (coded_bytes.get(layer, size) for layer, size in enumerate(self.layer_bytes))
        return replace(self, coded_bytes=tuple(sizes))


def round_up(size_bytes: int, to: int) -> int:
    """`size_bytes`, rounded up to a multiple of `to`."""
    return -(-size_bytes // to) * to


def make_plan(
    layer_bytes: Sequence[int],
    other_bytes: int,
    budget_bytes: int,
    *,
    slots: int | None = None,
    resident_layers: Residency = "fill",
    chunk_bytes: int | None = None,
    granularity_bytes: int = 1,
    coded_bound: Callable[[int], int] | None = None,
    budget_name: str = "its device budget",
) -> Plan:
    """The plan for a model of these sizes within `budget_bytes` of device memory.

    Args:
        layer_bytes: packed bytes of each layer.
        other_bytes: bytes that must be resident.
        slots: ring slots, at least one; by default 4, or a near number that gives stable addresses. Never more than
            there are streamed layers.
        resident_layers: ``"fill"`` keeps as many layers as the budget holds beside the ring, ``"none"`` and ``"all"``
            say so, a number says how many.
        chunk_bytes: the largest single copy, at most a slot; by default 64 MiB, or a slot where that is less.
        coded_bound: the most bytes that a layer of so many can take coded; None without coding.
        budget_name: what the refusal calls the budget.

    Raises:
        ConfigError: a setting is out of range, or a chunk is larger than a slot.
        OutOfDeviceMemory: the budget cannot hold it; carries the bytes needed and given.
    """
    sizes, g = tuple(layer_bytes), granularity_bytes
    _check(sizes, slots, resident_layers, chunk_bytes)
    depth = len(sizes)

    def plan(kept: int, wanted_slots: int) -> Plan:
        resident = spread(kept, depth)
        streamed = tuple(sorted(set(range(depth)) - set(resident)))
        largest = max((sizes[layer] for layer in streamed), default=0)
        slot_bytes = round_up(largest, g)
        chunk = chunk_bytes or min(DEFAULT_CHUNK_BYTES, max(slot_bytes, 1))
        slots = min(wanted_slots, len(streamed))
        landings = LANDINGS if coded_bound is not None and streamed else 0
        landing_bytes = round_up(coded_bound(largest), g) if landings else 0
        return Plan(sizes, other_bytes, resident, streamed, slots, slot_bytes, chunk, g, landings, landing_bytes)

    def most(wanted_slots: int) -> Plan | None:
        """The plan that keeps the most layers with this many slots, or None when not even none fits."""
        if isinstance(resident_layers, int) or resident_layers == "none":
            candidates = [plan(resident_layers if isinstance(resident_layers, int) else 0, wanted_slots)]
        elif resident_layers == "all":
            candidates = [plan(depth, wanted_slots)]
        else:
            candidates = [plan(kept, wanted_slots) for kept in range(depth, -1, -1)]
        return next((p for p in candidates if p.device_bytes <= budget_bytes), None)

    if slots is None:
        chosen = _best([most(count) for count in DEFAULT_SLOTS])
        smallest = plan(_kept_at_least(resident_layers, depth), min(DEFAULT_SLOTS))
    else:
        chosen = most(slots)
        smallest = plan(_kept_at_least(resident_layers, depth), slots)
    if chosen is None:
        raise OutOfDeviceMemory(
            f"the model does not fit {budget_name}: what must be resident takes {smallest.resident_bytes:,} bytes "
            f"and a ring of {smallest.slots} slots of {smallest.slot_bytes:,}"
            + (f" and {smallest.landings} landing buffers" if smallest.landings else "")
            + f" takes {smallest.ring_bytes:,}; nothing was copied; raise budget_bytes, lower activation_bytes, or "
            "keep fewer layers resident",
            needed_bytes=smallest.device_bytes,
            free_bytes=budget_bytes,
        )
    if chosen.slots and chosen.chunk_bytes > chosen.slot_bytes:
        raise ConfigError(
            f"chunk_bytes is {chosen.chunk_bytes:,}, larger than a slot of {chosen.slot_bytes:,} bytes (the largest "
            "streamed layer); choose at most that"
        )
    return chosen


def spread(count: int, depth: int) -> tuple[int, ...]:
    """`count` of `depth` layers, evenly spread."""
    return tuple((2 * i + 1) * depth // (2 * count) for i in range(count))


def _best(plans: Sequence[Plan | None]) -> Plan | None:
    """The most preferred plan, if none keeps more layers with stable addresses.

    A preferred slot count is given up for stable addresses, but never for a pass that moves more bytes.
    """
    found = [p for p in plans if p is not None]
    if not found:
        return None
    preferred = found[0]
    for candidate in found:
        if candidate.stable_addresses and candidate.streamed_bytes_per_pass <= preferred.streamed_bytes_per_pass:
            return candidate
    return preferred


def _kept_at_least(resident_layers: Residency, depth: int) -> int:
    if isinstance(resident_layers, int):
        return resident_layers
    return depth if resident_layers == "all" else 0


def _check(sizes: tuple[int, ...], slots: int | None, resident_layers: Residency, chunk_bytes: int | None) -> None:
    if not sizes or min(sizes) <= 0:
        raise ConfigError(
            f"layer sizes must be positive, got {len(sizes)} layers, the smallest {min(sizes, default=0)}"
        )
    for name, value in (("slots", slots), ("chunk_bytes", chunk_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r}; allowed are whole numbers from 1, or None to choose")
    if isinstance(resident_layers, str):
        if resident_layers not in ("fill", "none", "all"):
            raise ConfigError(f"resident_layers is {resident_layers!r}; allowed are 'fill', 'none', 'all' or a number")
    elif isinstance(resident_layers, bool) or not isinstance(resident_layers, int):
        raise ConfigError(f"resident_layers is {resident_layers!r}; allowed are 'fill', 'none', 'all' or a number")
    elif not 0 <= resident_layers <= len(sizes):
        raise ConfigError(f"resident_layers is {resident_layers}; the model has {len(sizes)} layers")
