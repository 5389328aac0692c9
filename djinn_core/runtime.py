"""The runtime: one device, its budget, and the models and sessions that share it.

`budget_bytes` caps all device memory of the process. It is split when the runtime opens:

    context       measured: what the driver and its kernels take, plus a margin for kernels loaded later
    activations   reserved for torch's allocator and enforced on it
    extents       the rest: resident weights, rings, KV, staging; `resize` changes this part alone

Not taken: one common pool for activations and extents. torch's allocator cannot be asked to give memory back in the
middle of a pass, so a fixed border is the only one that holds.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from djinn_core import context
from djinn_core.device import named_device, open_device
from djinn_core.door import Door, refuse_inside
from djinn_core.errors import ConfigError, OutOfDeviceMemory, SessionStateError, UsageError
from djinn_core.interrupts import Uninterrupted, act, taken
from djinn_core.loading import load_model
from djinn_core.memory import DiskTier, ExtentPool, HostTier, Ledger, Memory
from djinn_core.memory.hostmapping import available_bytes
from djinn_core.models import twin
from djinn_core.models.checkpoint import CheckpointSource
from djinn_core.models.seeded import SeededSource
from djinn_core.models.source import WeightSource, open_source
from djinn_core.proof import TwinRuns
from djinn_core.turn import Turn
from djinn_core.weights.coding import open_codec
from djinn_core.weights.plan import Residency

if TYPE_CHECKING:
    from djinn_core.sessions import Policy, Session, Sessions, SessionTable
    from djinn_core.sessions.pagerevents import PagerEvent

HOST_SHARE = 0.8  # of the memory that the machine has free, when host_bytes is not given
DEVICE_SHARE = 0.9  # of the memory that the GPU has free, when budget_bytes is not given
ACTIVATION_SHARE = 8  # activations get an eighth of the budget, within these two
ACTIVATION_LEAST_BYTES, ACTIVATION_MOST_BYTES = 256 << 20, 4 << 30


class Runtime:
    """One device and what shares it. A context manager; `close` gives everything back.

    Attributes:
        device, pool, host, disk, ledger: the parts, for the sessions room and for experiments.
        turn: passes on the device, in order of arrival.
        budget_bytes, context_bytes, activation_bytes: the split.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        budget_bytes: int | None = None,
        activation_bytes: int | None = None,
        host_bytes: int | None = None,
        disk_path: str | Path | None = None,
        disk_bytes: int = 0,
        pool_reserve_bytes: int = 0,
        pinning: Literal["required", "optional"] = "required",
        policy: Policy | None = None,
    ) -> None:
        """
        Args:
            device: ``"cuda:N"``, ``"cpu"`` (an emulated device), or ``"auto"``: the first GPU, else ``"cpu"``.
            budget_bytes: the cap on all device memory of this process. A GPU's default is 90 % of what is free; the
                emulated device has none and must be given one.
            activation_bytes: reserved for torch's allocator. On a GPU an eighth of the budget by default, at least
                256 MiB and at most 4 GiB; on the emulated device 0, where it is counted but cannot be enforced.
            host_bytes: pinned host memory for weights and paused sessions; by default 80 % of what is available.
            disk_path, disk_bytes: a folder and a budget for what host memory cannot hold; none by default.
            pool_reserve_bytes: free extents kept from the driver for quick reuse.
            pinning: ``"optional"`` goes on with pageable memory where the system refuses to lock it, slowly.
            policy: chooses which paused sessions leave the device; the default looks at `expected_resume_s`, else at
                how long pauses were lately.

        Raises:
            ConfigError: a budget is missing or out of range, torch sees no such GPU, or a word is unknown.
            OutOfDeviceMemory: the context and the activations alone exceed the budget.
        """
        _check_sizes(
            budget_bytes=budget_bytes,
            activation_bytes=activation_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            pool_reserve_bytes=pool_reserve_bytes,
        )
        if bool(disk_path) != bool(disk_bytes):
            raise ConfigError("a disk tier needs both disk_path and disk_bytes")
        device = named_device(device)
        self.turn = Turn()
        self._models: dict[str, PreTrainedModel] = {}
        self._names = itertools.count(1)
        self._policy = policy
        self._sessions: Sessions | None = None
        self._opening = threading.Lock()
        self._resizing = threading.Lock()
        self._closing = threading.Lock()
        self._door = Door(_closed)
        self._closed = False
        with Uninterrupted(), ExitStack() as held:
            if device == "cpu":
                self._open_emulated(budget_bytes, activation_bytes)
            else:
                self._open_gpu(device, budget_bytes, activation_bytes, held)
            held.callback(self.device.close)
            self.pool = ExtentPool(self.device, self._extent_bytes, reserve_bytes=pool_reserve_bytes)
            held.callback(self.pool.close)
            if host_bytes is None:
                host_bytes = int(available_bytes() * HOST_SHARE)
            self.host = HostTier(self.device, host_bytes, pinning=pinning)
            held.callback(self.host.close)
            self.disk = DiskTier(disk_path, disk_bytes) if disk_path else None
            if self.disk is not None:
                held.callback(self.disk.close)
            self.ledger = Ledger(
                self.pool,
                self.host,
                self.disk,
                context_bytes=self.context_bytes,
                activation_bytes=self.activation_bytes,
                budget_bytes=self.budget_bytes,
            )
            act()
            self._held = held.pop_all()

    def _open_emulated(self, budget_bytes: int | None, activation_bytes: int | None) -> None:
        if budget_bytes is None:
            raise ConfigError(
                "no GPU here, or device='cpu' was asked for: the emulated device needs budget_bytes, the size of the "
                "memory that it emulates"
            )
        self.budget_bytes, self.activation_bytes, self.context_bytes = budget_bytes, activation_bytes or 0, 0
        self._extent_bytes = self._extents(budget_bytes)
        self.device = open_device("cpu", capacity_bytes=self._extent_bytes)

    def _open_gpu(self, name: str, budget_bytes: int | None, activation_bytes: int | None, held: ExitStack) -> None:
        measured = context.ContextMeasurement(name)
        self.device = open_device(name)
        self.context_bytes = measured.finish(self.device)
        if budget_bytes is None:
            budget_bytes = int((measured.free_before_bytes) * DEVICE_SHARE)
        self.budget_bytes = budget_bytes
        if activation_bytes is None:
            activation_bytes = min(max(budget_bytes // ACTIVATION_SHARE, ACTIVATION_LEAST_BYTES), ACTIVATION_MOST_BYTES)
        self.activation_bytes = activation_bytes
        try:
            self._extent_bytes = self._extents(budget_bytes)
        except OutOfDeviceMemory:
            self.device.close()
            raise
        context.cap_activations(self.device, activation_bytes)
        held.callback(context.uncap_activations, self.device)

    def _extents(self, budget_bytes: int) -> int:
        """What `budget_bytes` leaves beside the context and the activations."""
        fixed = self.context_bytes + self.activation_bytes
        if fixed >= budget_bytes:
            raise OutOfDeviceMemory(
                f"budget_bytes leaves nothing for weights and sessions: the driver's context takes "
                f"{self.context_bytes:,} bytes and activations are given {self.activation_bytes:,}; raise budget_bytes "
                "or lower activation_bytes",
                needed_bytes=fixed,
                free_bytes=budget_bytes,
            )
        return budget_bytes - fixed

    # models

    def load(
        self,
        source: str | Path | PretrainedConfig | WeightSource,
        *,
        dtype: torch.dtype | str | None = None,
        resident_layers: Residency = "fill",
        slots: int | None = None,
        chunk_bytes: int | None = None,
        keep_free_bytes: int = 0,
        coding: Literal["ans"] | None = None,
        graphs: bool = False,
        seed: int = 0,
        prove: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> PreTrainedModel:
        """A Hugging Face model within this runtime's budget: `model(...)` and `model.generate(...)` run unmodified.

        Layers that do not stay on the device are streamed through a ring in every pass. Outside of its turn in a pass
        a streamed layer's parameters show whatever lies in the ring, so read weights from the checkpoint instead.

        Args:
            source: a folder of safetensors, a hub id in the local cache, the name or JSON file of an architecture
                (seeded random weights), a config, or an open source, which has its own dtype and seed.
            dtype: of the weights; as stored by default.
            resident_layers: ``"fill"`` keeps what fits, ``"none"``, ``"all"``, or a number of layers.
            slots: of the ring; by default 4, or a near number at which addresses are stable.
            chunk_bytes: the largest single copy, at most a layer; 64 MiB by default.
            keep_free_bytes: device memory that ``"fill"`` must leave for sessions.
            coding: ``"ans"`` keeps what streams losslessly coded on the host and decodes it on the device, so that
                fewer bytes cross the link; for bfloat16 and float16, and float32 on the emulated device. It takes two
                more buffers on the device, each larger than a layer, and on a GPU the package nvidia-nvcomp-cu13.
            graphs: issue the resident layers of sessions' one-token passes from recorded graphs, which takes Python
                a third of the time or less; each layer's are compared with its own code first.
            seed: of random weights.
            prove: run the model's two-layer twin against the stock model first, bit for bit.
            progress: called with (bytes done, bytes in all) as weights are read.

        Raises:
            ConfigError: a setting is unknown or out of range, or its library is not installed.
            UnsupportedModel: the twin differs from the stock model; the message says where.
            WeightsError: the checkpoint is incomplete or damaged.
            CapacityError: the budget of the device or the host is too small; carries bytes needed and free.
        """
        self._check_open()
        _check_sizes(keep_free_bytes=keep_free_bytes)
        if isinstance(source, SeededSource | CheckpointSource):
            weights: WeightSource = source
        else:
            weights = open_source(source, dtype=dtype, seed=seed)
        codec = open_codec(self.device, coding, weights.dtype)
        if prove:
            twin.prove(weights.config, weights.dtype, TwinRuns(_emulated))
        name = f"model {next(self._names)}"
        with Uninterrupted(), self._door:
            model = load_model(
                self,
                weights,
                name=name,
                resident_layers=resident_layers,
                slots=slots,
                chunk_bytes=chunk_bytes,
                keep_free_bytes=keep_free_bytes,
                codec=codec,
                graphs=graphs,
                progress=progress,
            )
            self._models[name] = model
        return model

    def unload(self, model: PreTrainedModel) -> None:
        """Give a model's memory back, once its passes under way have ended. Sessions on it keep their state: save or
        close them.

        Raises:
            SessionStateError: it is not this runtime's, or this thread is within a pass of it (a hook).
        """
        self._check_loaded(model)
        self._refuse_inside()
        with Uninterrupted():
            self._unload(model)

    def _unload(self, model: PreTrainedModel) -> None:
        door = model.djinn.boundary.door
        door.shut()
        try:
            with self.turn:  # who calls the decoder itself has no more than that
                model.djinn.close()
        finally:
            if not model.djinn.closed:
                door.open()
        self._models.pop(model.djinn.name, None)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The models that are loaded."""
        return tuple(self._models.values())

    # sessions

    def open_session(self, model: PreTrainedModel, *, max_length: int, batch_size: int = 1) -> Session:
        """A session on `model`, empty and RUNNING, that may become `max_length` tokens long.

        Raises:
            SessionStateError: the model is not loaded in this runtime.
            UnsupportedModel: a layer keeps something other than keys and values.
            OutOfDeviceMemory: device, host and disk together could not hold every open session at its longest, or the
                host could not swap them.
        """
        with Uninterrupted(), self._door:
            self._check_loaded(model)
            return self._opened().open(model, max_length=max_length, batch_size=batch_size)

    def load_session(self, folder: str | Path, model: PreTrainedModel) -> Session:
        """A session that was saved to `folder`, on the same model; it is paused.

        Raises:
            IntegrityError: the folder is damaged, or belongs to another model.
        """
        from djinn_core.sessions.snapshot import load_session

        with Uninterrupted(), self._door:
            self._check_loaded(model)
            return load_session(folder, model, self._opened())

    def sessions(self) -> SessionTable:
        """Every open session now, a `SessionInfo` for each: its state, and where its memory is; prints as a table."""
        from djinn_core.sessions import SessionTable

        return SessionTable() if self._sessions is None else self._sessions.infos()

    @property
    def events(self) -> deque[PagerEvent]:
        """What the pager did, oldest first. It goes on growing: loop over `list(runtime.events)`."""
        return self._opened().pager.events

    def evict(self, session: Session) -> bool:
        """Take a paused session's device memory now, as pressure would, after its write-back.

        Returns False, and leaves it as it is, where it is in use or the host has no room for it.

        Raises:
            SessionStateError: it is not an open session of this runtime.
        """
        with Uninterrupted(), self._door:
            pager = self._opened().pager
            holding = getattr(session, "_holding", None)
            if holding is None or pager.holdings.get(holding.id) is not holding:
                raise SessionStateError(f"{session!r} is not an open session of this runtime; nothing was evicted")
            return pager.evict(holding)

    def _opened(self) -> Sessions:
        """The sessions room, opened when first needed."""
        self._check_open()
        with Uninterrupted(), self._door, self._opening:
            if self._sessions is None:
                from djinn_core.sessions import Sessions

                self._sessions = Sessions(self.device, self.pool, self.host, self.disk, self._policy)
        return self._sessions

    def _check_loaded(self, model: PreTrainedModel) -> None:
        self._check_open()
        loaded = getattr(model, "djinn", None)
        if loaded is None or self._models.get(loaded.name) is not model:
            raise SessionStateError("the model is not loaded in this runtime (any more); load it here first")

    # everyone

    def memory(self) -> Memory:
        """Who holds the memory, now; prints as a table."""
        self._check_open()
        with Uninterrupted():
            return self.ledger.snapshot()

    def resize(self, budget_bytes: int) -> None:
        """Another cap on all device memory of this process, while everything goes on.

        A larger one holds at once. For a smaller one paused sessions leave the device, after their write-back, and the
        memory is the driver's again on return. Context, activations and weights keep what they have.

        Raises:
            ConfigError: it is no size, or the device is smaller.
            OutOfDeviceMemory: what cannot leave (weights, sessions that run) takes more; the cap is as it was.
        """
        self._check_open()
        _check_sizes(budget_bytes=budget_bytes)
        extent_bytes = self._extents(budget_bytes)
        if extent_bytes >= self.device.capacity_bytes + self.device.granularity_bytes:
            raise ConfigError(
                f"budget_bytes {budget_bytes:,} would give weights and sessions {extent_bytes:,} bytes, and "
                f"{self.device.name} has {self.device.capacity_bytes:,} (emulated, the runtime's first budget)"
            )
        with Uninterrupted(), self._door, taken(self._resizing):
            self._opened().pager.resize(extent_bytes)
            self.budget_bytes = self.ledger.budget_bytes = budget_bytes

    def close(self) -> None:
        """Close sessions, unload models, and give all memory back. Twice is once.

        Loads, opens and passes under way are waited for; what comes later is refused.

        Raises:
            SessionStateError: this thread is within one of them (a hook, a callback, a policy); nothing was closed.
        """
        self._refuse_inside()
        with Uninterrupted(), taken(self._closing):
            if self._closed:
                return
            with ExitStack() as undo:
                for door in (self._door, *(model.djinn.boundary.door for model in self.models)):
                    door.shut()
                    undo.callback(door.open)
                if self._sessions is not None:
                    self._sessions.close()  # not within the turn: whoever uses one of them may be waiting for it
                    self._sessions = None
                with self.turn, ExitStack() as ending:
                    undo.pop_all()
                    ending.callback(self._held.close)
                    ending.callback(setattr, self, "_closed", True)
                    for model in self.models:
                        ending.callback(self._unload, model)

    def _refuse_inside(self) -> None:
        """Who closes from within would wait for himself, or for who waits for him."""
        refuse_inside()
        if self._sessions is not None:
            self._sessions.refuse_inside()
        if self.turn.held:  # a call of the decoder itself
            raise SessionStateError("a pass is under way on this thread (a hook?); close or unload after it")

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _closed() -> SessionStateError:
    return SessionStateError("the runtime is closed; make a new one")


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63):
            raise ConfigError(f"{name} is {size!r}; it is a number of bytes, a whole number from 0 to 2**63 - 1")


def open_session(model: PreTrainedModel, *, max_length: int, batch_size: int = 1) -> Session:
    """`Runtime.open_session` of the runtime in which `model` is loaded."""
    return _runtime_of(model).open_session(model, max_length=max_length, batch_size=batch_size)


def load_session(folder: str | Path, model: PreTrainedModel) -> Session:
    """`Runtime.load_session` of the runtime in which `model` is loaded."""
    return _runtime_of(model).load_session(folder, model)


def _runtime_of(model: PreTrainedModel) -> Runtime:
    loaded = getattr(model, "djinn", None)
    if loaded is None:
        raise UsageError(f"{type(model).__name__} was not loaded by Djinn; use djinn.load, or Runtime.load")
    return loaded.runtime


def _emulated(size_bytes: int) -> Runtime:
    """A small runtime for a twin."""
    return Runtime("cpu", budget_bytes=size_bytes, host_bytes=size_bytes, pinning="optional")


def load(source: str | Path | PretrainedConfig, *, device: str = "auto", **settings: Any) -> PreTrainedModel:
    """A model in a runtime of its own: `model.djinn.runtime`, which ends with `model.djinn.runtime.close()`.

    `settings` are those of `Runtime` and of `Runtime.load`, each by its name.

    Raises:
        ConfigError: a setting that neither of them knows. And what they raise.
    """
    of_runtime = {name: value for name, value in settings.items() if name in _names_of(Runtime.__init__)}
    of_load = {name: value for name, value in settings.items() if name not in of_runtime}
    if unknown := sorted(set(of_load) - _names_of(Runtime.load)):
        allowed = sorted(_names_of(Runtime.__init__) | _names_of(Runtime.load))
        raise ConfigError(f"load does not know {', '.join(unknown)}; it takes {', '.join(allowed)}")
    runtime = Runtime(device, **of_runtime)
    try:
        return runtime.load(source, **of_load)
    except BaseException:
        runtime.close()
        raise


def _names_of(function: Callable[..., Any]) -> set[str]:
    """Its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
