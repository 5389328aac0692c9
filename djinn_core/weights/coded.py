"""Coded weights: how they get to the host, and how a pass brings them through landing buffers into the ring.

                        link                      decode
    host, coded  ------------------>  landing  ----------->  slot

Position p lands in buffer p mod landings. Order on the device is kept by events that are made once: a landing's copies
wait for `free`, the decode that read it last; a decode waits for `filled`, its copies, and for the slot's `consumed`,
its last reader; compute waits for the slot's `ready`, behind the decode. All decodes go out on one stream, so one that
was dropped is in order before the one that takes its slot.

Not taken: to decode inside the slot, with the coded bytes at its end and the block growing from its front. That saves
the landing buffers if a decoder never writes past what it has read, and nvCOMP promises no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from djinn_core.device.base import Device, Direction, Event
from djinn_core.errors import OutOfHostMemory, WeightsError
from djinn_core.memory.hosttier import HostBlock, HostTier
from djinn_core.weights.coding import Codec, Coded
from djinn_core.weights.plan import Plan, round_up
from djinn_core.weights.ring import Slot
from djinn_core.weights.store import BLOCK_ALIGNMENT_BYTES, Layout, Readable, read_all
from djinn_core.weights.streamer import Rebinding, Streamer

COMPARED_BYTES = 32 << 20  # at a time: a comparison takes as much again from torch's allocator


def scratch_bytes(layouts: Sequence[Layout]) -> int:
    """What `CodedStore.read` takes of the host tier while it runs, besides the coded blocks."""
    return round_up(max((layout.size_bytes for layout in layouts), default=0), BLOCK_ALIGNMENT_BYTES)


class CodedStore:
    """The streamed layers' coded blocks in pinned host memory, each in an allocation of its own size.

    Attributes:
        blocks: for each streamed layer its coded bytes, uint8.
        coded: for each, what decoding needs.
        size_bytes: what the store takes of the host tier.
    """

    def __init__(self, device: Device, host: HostTier, codec: Codec, owner: str) -> None:
        self.blocks: dict[int, torch.Tensor] = {}
        self.coded: dict[int, Coded] = {}
        self.size_bytes = 0
        self._device, self._host, self._codec, self._owner = device, host, codec, owner
        self._held: list[HostBlock] = []

    def read(
        self,
        source: Readable,
        layouts: Mapping[int, Layout],
        slot: torch.Tensor,
        landings: Sequence[torch.Tensor],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Read each layer from `source`, code it on the device, keep it, and see it decoded once. Complete on return.

        `slot` and `landings` are the ring's, still unused: a layer lies in the slot as it was read, is coded into the
        first landing buffer and, back from the host, decoded into the second, which is larger than a layer.

        Raises:
            OutOfHostMemory, PinningRefused: no room for a layer, or for what it became; `close` gives the rest back.
            WeightsError, TransferError, DeviceError: as the source and the device say; or a layer that was coded,
                stored and decoded is not the same to the bit.
        """
        scratch = self._host.allocate_exact(scratch_bytes(list(layouts.values())), self._owner)
        try:
            for layer, layout in layouts.items():
                block = scratch.tensor[: layout.size_bytes]
                read_all(source, list(layout.views(block).items()), on_bytes)
                self._keep(layer, block, slot, landings, len(layouts))
        except BaseException:
            self._codec.stream.synchronize()
            raise
        finally:
            self._codec.end_encoding()
            scratch.free()

    def close(self) -> None:
        """Give the memory back. No copy out of it may be in flight."""
        self.blocks.clear()
        self.coded.clear()
        self.size_bytes = 0
        while self._held:
            self._held.pop().free()

    def _keep(
        self, layer: int, block: torch.Tensor, slot: torch.Tensor, landings: Sequence[torch.Tensor], layers: int
    ) -> None:
        """Code one layer into memory of its own, and compare what comes back."""
        stream = self._codec.stream
        whole = slot[: block.numel()]
        self._device.copy(whole, block, stream, Direction.H2D)
        coded = self._codec.encode(whole, landings[0])
        kept = self._allocate(coded.size_bytes, layers)
        arrived = landings[0][: coded.size_bytes]
        self._device.copy(kept, arrived, stream, Direction.D2H)
        self._device.copy(arrived, kept, stream, Direction.H2D)
        again = landings[1][: block.numel()]
        self._codec.decoder(coded, arrived, again)()
        stream.synchronize()
        if not equal(whole, again):
            raise WeightsError(
                f"layer {layer} was coded by {self._codec.name}, stored and decoded, and differs from what was read; "
                "the model was not loaded; load it without coding"
            )
        self.blocks[layer], self.coded[layer] = kept, coded

    def _allocate(self, size_bytes: int, layers: int) -> torch.Tensor:
        free_bytes = self._host.free_bytes
        if round_up(size_bytes, BLOCK_ALIGNMENT_BYTES) > free_bytes:
            raise OutOfHostMemory(
                f"the coded weights do not fit the host budget: {len(self._held)} of {layers} layers took "
                f"{self.size_bytes:,} bytes, and the next one finds no room; raise host_bytes, or budget_bytes so that "
                "more layers stay on the device",
                needed_bytes=size_bytes,
                free_bytes=free_bytes,
            )
        held = self._host.allocate_exact(size_bytes, self._owner)
        self._held.append(held)
        self.size_bytes += round_up(size_bytes, BLOCK_ALIGNMENT_BYTES)
        return held.tensor


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two blocks on the device are the same, compared there, piece by piece."""
    pieces = range(0, a.numel(), COMPARED_BYTES)
    return all(torch.equal(a[at : at + COMPARED_BYTES], b[at : at + COMPARED_BYTES]) for at in pieces)


@dataclass(frozen=True)
class Landing:
    """A buffer in which coded layers arrive.

    Attributes:
        filled: recorded on the H2D stream behind the copies.
        free: recorded on the codec's stream behind the decode that reads them.
    """

    memory: torch.Tensor
    filled: Event
    free: Event


class CodedStreamer(Streamer):
    """A streamer whose layers cross the link coded. What it counts, and what the plan says, are the coded bytes."""

    def __init__(
        self,
        device: Device,
        plan: Plan,
        store: CodedStore,
        codec: Codec,
        slots: Sequence[torch.Tensor],
        landings: Sequence[torch.Tensor],
        rebinding: Mapping[tuple[int, int], Rebinding] | None = None,
    ) -> None:
        """
        Args:
            plan: with the coded sizes.
            store: the coded blocks of the streamed layers.
            landings: `plan.landings` uint8 tensors of `plan.landing_bytes` on the device.
        """
        super().__init__(device, plan, store.blocks, landings, rebinding)
        self._coded = store.coded
        self._codec = codec
        self._slot_memory = slots
        self._landings = [Landing(memory, device.event(), device.event()) for memory in landings]
        self._decoders: dict[tuple[int, int, int], Callable[[], None]] = {}

    def close(self) -> None:
        """As of any streamer; what the codec knows of the memory is forgotten."""
        try:
            super().close()
        finally:
            self._decoders.clear()

    def _bring(self, layer: int, slot: Slot) -> None:
        index = slot.position % len(self._landings)
        landing, decoding = self._landings[index], self._codec.stream
        decode = self._decoder(layer, index, slot.index)
        self._wait_free(landing)
        self._copy(layer, slot, index)
        landing.filled.record(self._h2d)
        self._wait_filled(landing)
        self._wait_consumed(slot)
        decode()
        landing.free.record(decoding)
        slot.ready.record(decoding)

    def _wait_free(self, landing: Landing) -> None:
        self._h2d.wait_event(landing.free)

    def _wait_filled(self, landing: Landing) -> None:
        self._codec.stream.wait_event(landing.filled)

    def _wait_consumed(self, slot: Slot) -> None:
        self._codec.stream.wait_event(slot.consumed)

    def _decoder(self, layer: int, landing: int, slot: int) -> Callable[[], None]:
        """The decode of `layer` from that landing buffer into that slot, made once."""
        decode = self._decoders.get((layer, landing, slot))
        if decode is None:
            coded = self._coded[layer]
            source = self._landings[landing].memory[: coded.size_bytes]
            decode = self._codec.decoder(coded, source, self._slot_memory[slot][: self.plan.layer_bytes[layer]])
            self._decoders[layer, landing, slot] = decode
        return decode
