"""Write-backs that are wanted: at a pause, before a release, and when someone waits for one.

A thread does them in order, or whoever waits for one does it himself; each is done once. The thread also settles
boundaries: their device copies go when the host has them.
"""

from __future__ import annotations

import queue
import threading

from djinn_core.device.base import Device
from djinn_core.errors import CapacityError
from djinn_core.memory.disktier import DiskTier
from djinn_core.memory.extents import ExtentPool
from djinn_core.memory.hosttier import HostTier
from djinn_core.sessions.checkpoint import Boundary
from djinn_core.sessions.holding import Holding
from djinn_core.sessions.lineages import Lineages
from djinn_core.sessions.policy import Policy
from djinn_core.sessions.state import SessionState
from djinn_core.sessions.workers import told
from djinn_core.sessions.writeback import write_back

WRITE_BACK_REMEDY = "on the device; resume and pause it to try again"


class Writer(Lineages):
    """Its thread runs from the beginning to `end_writer`."""

    def __init__(
        self, device: Device, pool: ExtentPool, host: HostTier, disk: DiskTier | None, policy: Policy | None
    ) -> None:
        super().__init__(device, pool, host, disk, policy)
        self._out: queue.SimpleQueue[Holding | Boundary | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._work_out, name="djinn-writer", daemon=True)
        self._writer.start()

    def end_writer(self) -> None:
        """End the thread, after what has been asked of it."""
        self._out.put(None)
        self._writer.join()

    def _want(self, holding: Holding) -> None:
        """One more write-back is wanted. The lock is held."""
        holding.queued = holding.unstarted = True
        holding.wanted += 1

    def _ask_clean(self, holding: Holding) -> None:
        """Someone waits for the write-back. It is begun anew when the host had no room, or took the copies away."""
        with self.lock:
            holding.needed = True
            again = holding.trouble is None or isinstance(holding.trouble, CapacityError)
            under_way = holding.queued or holding.draining or holding.leaving
            if holding.state is SessionState.PAUSED and again and not under_way and not holding.is_clean():
                holding.trouble = None
                self._want(holding)
                self._out.put(holding)

    def boundary_issued(self, boundary: Boundary) -> None:
        """Its copy to the host is under way; its device copy is dropped when that is complete."""
        self._out.put(boundary)

    def _work_out(self) -> None:
        while (item := self._out.get()) is not None:
            self.way.give()
            if isinstance(item, Boundary):
                self._settle_boundary(item)
            else:
                self._drain(item)

    def _settle_boundary(self, boundary: Boundary) -> None:
        try:
            self.device.bind_thread()
            boundary.written.synchronize()
        except BaseException as error:  # noqa: BLE001 - the thread's edge; a resume takes what is on the device
            self.log_id("-", f"boundary stays on the device ({error!r})")
            return
        with self.lock:
            boundary.host_valid_bytes = boundary.size_bytes
            boundary.device = None
            self.lock.notify_all()

    def _drain(self, holding: Holding) -> None:
        """Do the write-back that is wanted, unless a thread has taken it up already."""
        with self.lock:
            if not holding.unstarted:
                return
            holding.unstarted = False
            holding.drains += 1
            number = holding.wanted
        try:
            self.device.bind_thread()
            holding.wait_issued()
            if holding.release:
                self.evict(holding, released=True)
            if holding.state is SessionState.PAUSED:
                self._clean(holding)
        except BaseException as error:  # the thread's edge: `wait_until` tells whoever waits
            if number == holding.wanted:  # another one has been wanted since, and speaks for itself
                holding.trouble = told(error, holding, "its write-back", WRITE_BACK_REMEDY)
            self.log(holding, f"stays dirty ({error!r})")
            if threading.current_thread() is not self._writer and not isinstance(error, Exception):
                raise
        finally:
            with self.lock:
                holding.drains -= 1
                holding.queued = holding.unstarted or holding.drains > 0
                self.lock.notify_all()

    def _clean(self, holding: Holding) -> None:
        """Write back what is new; only for someone who waits for it at the cost of others' clean copies."""
        while True:
            optional = not holding.needed
            try:
                write_back(self, holding, list(holding.mapped.values()), optional=optional)
                return
            except CapacityError:
                if not optional or not holding.needed:
                    raise
