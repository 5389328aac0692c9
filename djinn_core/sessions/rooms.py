"""The sessions of one runtime: opened on its models, listed, closed with it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from djinn_core.device.base import Device
from djinn_core.errors import SessionStateError, UsageError
from djinn_core.interrupts import Uninterrupted, act, taken
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.extents import ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.sessions.blocks import Block, Layout, Stored, host_held_bytes
from djinn_core.sessions.checkpoint import Story
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.kvcache import attention_windows, kv_layout, positions_in_table
from djinn_core.sessions.pager import Pager
from djinn_core.sessions.policy import Policy
from djinn_core.sessions.session import Session
from djinn_core.sessions.state import SessionState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SessionInfo:
    """One session at one moment: its state, and what it holds where: KV, checkpoints and their boundaries.

    Bytes are those that a tier gives for it. What sessions share counts for each; `shared_` is how much of it the row
    of an older session has too, so that without it the rows add up to what `Runtime.memory()` has for sessions.
    """

    id: str
    state: SessionState
    length: int
    max_length: int
    batch_size: int
    checkpoints: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    dirty_bytes: int
    shared_device_bytes: int = 0
    shared_host_bytes: int = 0
    shared_disk_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.id:>6} {self.state.value:<9} {self.length:>7}/{self.max_length:<7} device {self.device_bytes:>14,} "
            f"host {self.host_bytes:>14,} disk {self.disk_bytes:>14,}"
        )


_NAMES = tuple(field.name for field in fields(SessionInfo))
_NUMBERS = tuple(name for name in _NAMES if name not in ("id", "state") and not name.startswith("shared_"))


class SessionTable(tuple[SessionInfo, ...]):
    """The sessions of one moment, oldest first: a tuple whose `str()` is a table, and ends with what all hold once."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("session", "state", *(name.replace("_", " ") for name in _NUMBERS))]
        for info in self:
            rows.append((info.id, info.state.value, *(f"{getattr(info, name):,}" for name in _NUMBERS)))
        if len(self) > 1:
            rows.append(("all", "", *(self._in_all(name) for name in _NUMBERS)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for session, state, *numbers in rows:
            cells = [n.rjust(width) for n, width in zip(numbers, widths[2:], strict=True)]
            lines.append("  ".join([session.ljust(widths[0]), state.ljust(widths[1]), *cells]))
        return "\n".join(lines)

    def _in_all(self, name: str) -> str:
        """The sum of a column, without what an older row has too; nothing where there is no use for one."""
        if f"shared_{name}" not in _NAMES:
            return ""
        return f"{sum(getattr(info, name) - getattr(info, f'shared_{name}') for info in self):,}"


class Sessions:
    """Opens sessions, and closes what is left. Thread-safe.

    Attributes:
        pager: moves them; `pager.events` is its log.
    """

    def __init__(
        self,
        device: Device,
        pool: ExtentPool,
        host: HostTier,
        disk: DiskTier | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.pager = Pager(device, pool, host, disk, policy)
        # of each model, its table of positions: to look for it takes longer than all else that an open does
        self._positions: WeakKeyDictionary[PreTrainedModel, int | None] = WeakKeyDictionary()

    def open(self, model: PreTrainedModel, *, max_length: int, batch_size: int = 1) -> Session:
        """A session that may become `max_length` tokens long, RUNNING and empty.

        Raises:
            UnsupportedModel: a layer keeps something other than keys and values.
            OutOfDeviceMemory: all tiers together could not hold every open session at its longest.
        """
        with Uninterrupted(), ExitStack() as undo:
            holding = self.open_holding(model, max_length=max_length, batch_size=batch_size)
            undo.callback(self.pager.close_session, holding)
            session = Session(model, self.pager, holding)
            act()
            undo.pop_all()
            return session

    def open_holding(self, model: PreTrainedModel, *, max_length: int, batch_size: int) -> Holding:
        """The memory side of `open`; `load_session` fills it."""
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; give a whole number from 1")
        attention_windows(model.config)
        if model not in self._positions:
            self._positions[model] = positions_in_table(model)
        positions = self._positions[model]
        if positions is not None and max_length > positions:
            raise UsageError(f"max_length is {max_length}; this model has a table of {positions} positions")
        layout = self.layout(model, max_length, batch_size)
        hidden = model.config.get_text_config(decoder=True).hidden_size
        return self.pager.open(layout, batch_size * max_length * hidden * layout.dtype.itemsize)

    def layout(self, model: PreTrainedModel, max_length: int, batch_size: int) -> Layout:
        return kv_layout(model.config, model.dtype, batch_size, max_length, self.pager.device.granularity_bytes)

    def adopt(self, model: PreTrainedModel, holding: Holding, story: Story) -> Session:
        """A session around a holding that `load_session` has filled."""
        return Session(model, self.pager, holding, story)

    def infos(self) -> SessionTable:
        """Every open session, now."""
        with Uninterrupted(), self.pager.lock:
            mapped: set[Block] = set()
            stored: set[Stored] = set()
            return SessionTable([_info(holding, mapped, stored) for holding in self.pager.holdings.values()])

    def refuse_inside(self) -> None:
        """Raise SessionStateError if this thread is using a session (a hook of its pass)."""
        for holding in list(self.pager.holdings.values()):
            if holding.user_thread == threading.get_ident():
                raise SessionStateError(
                    f"session {holding.id} is in use by this thread, which closes all sessions meanwhile (from a "
                    "hook?); close them after it"
                )

    def close(self) -> None:
        """Close what is open, and end the pager. Whoever uses a session ends first.

        Raises:
            SessionStateError: this thread is using one itself (a hook of its pass); nothing was closed.
        """
        self.refuse_inside()
        used: list[Holding] = []
        with Uninterrupted(), ExitStack() as held:
            while new := [holding for holding in list(self.pager.holdings.values()) if holding not in used]:
                for holding in new:
                    held.enter_context(taken(holding.user))
                    used.append(holding)
            self.pager.ending = True
            for holding in used:
                if holding.state is not SessionState.CLOSED:
                    self.pager.close_session(holding)
            self.pager.close()


def _info(holding: Holding, mapped: set[Block], stored: set[Stored]) -> SessionInfo:
    """Its row; `mapped` and `stored` are what older ones have, and then what this one has besides."""
    here = set(holding.mapped.values())
    has = here | holding.stored
    behind = holding.behind.host_bytes if holding.behind is not None else 0
    stale = sum(extent.size_bytes for extent in holding.stale.values())
    info = SessionInfo(
        id=holding.id,
        state=holding.state,
        length=min(holding.table.lengths),
        max_length=holding.layout.max_length,
        batch_size=holding.layout.batch_size,
        checkpoints=len(holding.checkpoints),
        device_bytes=_on_device(here) + stale,
        host_bytes=host_held_bytes(has) + behind,
        disk_bytes=_on_disk(has),
        dirty_bytes=sum(max(0, block.end_bytes() - block.host_valid_bytes) for block in here),
        shared_device_bytes=_on_device(here & mapped),
        shared_host_bytes=host_held_bytes(has & stored),
        shared_disk_bytes=_on_disk(has & stored),
    )
    mapped |= here
    stored |= has
    return info


def _on_device(blocks: set[Block]) -> int:
    return sum(block.size_bytes for block in blocks)


def _on_disk(stored: set[Stored]) -> int:
    return sum(disk.held_bytes for each in stored if (disk := each.disk) is not None)
