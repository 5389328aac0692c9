"""The ring: slots that belong to positions in the stream of passes, and one function that changes their state.

                fill             filled            acquire             release
    FREE ------------> FILLING ----------> READY ------------> IN_USE ------------> FREE
                          |                  |
                          +------ drop ------+---> FREE

Position p = pass x streamed layers + index lies in slot p mod slots. The next holder of a slot is therefore never a
matter of the layer's number: 3 slots over 40 layers wrap correctly, where a slot per layer index once overwrote a
layer that was still computing, with wrong logits and no error. An illegal step raises.

States are the host's view: READY means that all copies are queued and `ready` is recorded behind them, not that they
have arrived. When a slot is filled, `streamer.py` says. Order on the device is kept by two events per slot, made once:
a fill waits for `consumed`, compute for `ready`.
"""

from __future__ import annotations

from enum import Enum

from djinn_core.device.base import Event
from djinn_core.errors import DeviceError


class SlotState(Enum):
    """What a slot holds."""

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in use"


class SlotStep(Enum):
    """What may happen to a slot."""

    FILL = "fill"
    FILLED = "filled"
    ACQUIRE = "acquire"
    RELEASE = "release"
    DROP = "drop"


_NEXT = {
    (SlotState.FREE, SlotStep.FILL): SlotState.FILLING,
    (SlotState.FILLING, SlotStep.FILLED): SlotState.READY,
    (SlotState.FILLING, SlotStep.DROP): SlotState.FREE,
    (SlotState.READY, SlotStep.ACQUIRE): SlotState.IN_USE,
    (SlotState.READY, SlotStep.DROP): SlotState.FREE,
    (SlotState.IN_USE, SlotStep.RELEASE): SlotState.FREE,
}


class Slot:
    """One slot.

    Attributes:
        position: the position that it holds or last held; -1 before the first.
        filled_bytes: bytes whose copies into it were issued for this position.
        ready: recorded on the H2D stream behind the fill.
        consumed: recorded on the compute stream behind the layer that read it.
    """

    __slots__ = ("consumed", "filled_bytes", "index", "position", "ready", "state")

    def __init__(self, index: int, ready: Event, consumed: Event) -> None:
        self.index = index
        self.state = SlotState.FREE
        self.position = -1
        self.filled_bytes = 0
        self.ready = ready
        self.consumed = consumed

    def holds(self, position: int) -> bool:
        """True when `position` is here, or on its way."""
        return self.position == position and self.state in (SlotState.FILLING, SlotState.READY)

    def step(self, step: SlotStep) -> None:
        """Change the state.

        Raises:
            DeviceError: the step is illegal here; it would have overwritten or read the wrong layer.
        """
        following = _NEXT.get((self.state, step))
        if following is None:
            raise DeviceError(
                f"ring slot {self.index} is {self.state.value} (position {self.position}) and cannot {step.value}; "
                "this is a fault in the streamer, and nothing was overwritten"
            )
        self.state = following


class Ring:
    """The slots, by position."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots

    def __len__(self) -> int:
        return len(self.slots)

    def slot_of(self, position: int) -> Slot:
        """The slot in which `position` lies."""
        return self.slots[position % len(self.slots)]

    def window(self, position: int) -> range:
        """The positions that the ring can hold when `position` is the next to be read."""
        return range(position, position + len(self.slots))
