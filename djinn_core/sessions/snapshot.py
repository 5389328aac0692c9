"""A session as a folder: `state.safetensors` (KV blocks, boundaries, ids) and `session.json` (what they mean).

Invariant: a folder under its final name is complete; it is written beside it, synced, and renamed. Loading checks the
JSON's own digest, the model's, and the tensors' (blake2b), before a session exists. No pickle in either direction:
neither file can carry code. Blocks that checkpoints share are written once.

Not taken: `safetensors.torch.save_file`, which would hold a second copy of the KV in memory, and refuses views.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from djinn_core.errors import DeviceError, DjinnError, IntegrityError, OutOfDisk, OutOfHostMemory, UsageError
from djinn_core.interrupts import Interruptible, Uninterrupted, act, taken
from djinn_core.sessions.blocks import Block, BlockTable, Stored
from djinn_core.sessions.checkpoint import Boundary, Checkpoint, PassInputs, Story
from djinn_core.sessions.edits import Recorded
from djinn_core.sessions.state import SessionState
from djinn_core.sessions.tensorfile import TensorFile, write_tensors
from djinn_core.sessions.writeback import write_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from djinn_core.sessions.holding import Holding
    from djinn_core.sessions.rooms import Sessions
    from djinn_core.sessions.session import Session

FORMAT, VERSION = "djinn-session", 1
TENSORS, MEANING = "state.safetensors", "session.json"
HOLD_TRIES = 100  # each is a write-back, a read from disk, or a moment's wait
POLL_S = 0.02
STORY = ("mask", "logits", "pending", "unfinished", "rng")
LAYOUT = ("layers", "batch_size", "max_length", "kv_heads", "head_dim")


def model_digest(model: PreTrainedModel) -> str:
    """What a model is: its weight source and its config; the parameters' own bytes when it was not loaded by Djinn."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    loaded = getattr(model, "djinn", None)
    if loaded is not None:
        digest.update(loaded.source.digest.encode())
    else:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


# saving


class _Collector:
    """Gives every tensor of a session a name, once. Until `close` the host keeps what the tensors lie on."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tensors: dict[str, torch.Tensor] = {}
        self._tables = [session._holding.table, *(point.table for point in session.checkpoints)]
        self._blocks: dict[Block, str] = {}
        self._held: list[Stored] = []

    def block(self, block: Block) -> str:
        if block not in self._blocks:
            name = f"block.{len(self._blocks)}.layer{block.layer}"
            end = max(table.end_bytes(block) for table in self._tables if table in block.holders)
            if end:
                self._hold(block, end)
            self._blocks[block] = name
            self.tensors[name] = block.host.tensor[:end] if end else torch.empty(0, dtype=torch.uint8)
        return self._blocks[block]

    def _hold(self, stored: Stored, end: int) -> None:
        """Have `end` bytes of it whole on the host, and kept there. Others may take the host's room at any moment."""
        with Uninterrupted():
            self._hold_whole(stored, end)

    def _hold_whole(self, stored: Stored, end: int) -> None:
        pager = self.session._pager
        for _ in range(HOLD_TRIES):
            with pager.lock, stored.lock:
                written = isinstance(stored, Boundary) and not stored.settled  # whoever reads it waits for its event
                if stored.host is not None and (stored.host_valid_bytes >= end or written):
                    stored.readers += 1
                    self._held.append(stored)
                    return
                place = next(iter(stored.places), None) if isinstance(stored, Block) else None
            if stored.disk_valid_bytes >= end:
                pager.tiers.fetch(stored, self.session.id)
            elif place is not None:
                write_back(pager, place, [stored])
            else:
                time.sleep(POLL_S)  # it is on its way from one tier to another
        raise OutOfHostMemory(
            f"session {self.session.id} cannot be saved: other sessions take its room on the host as fast as it is "
            "made; nothing was written, try again, or raise host_bytes",
            needed_bytes=stored.size_bytes,
            free_bytes=pager.tiers.host.free_bytes,
        )

    def close(self) -> None:
        """The host may give up what was held."""
        with self.session._pager.lock:
            for stored in self._held:
                with stored.lock:
                    stored.readers -= 1
            self._held.clear()
            self.session._pager.lock.notify_all()

    def table(self, table: BlockTable) -> dict[str, Any]:
        rows = [row[: table.layout.count(n)] for row, n in zip(table.blocks, table.lengths, strict=True)]
        return {"lengths": list(table.lengths), "blocks": [[self.block(block) for block in row] for row in rows]}

    def story(self, story: Story, prefix: str) -> dict[str, Any]:
        names: dict[str, Any] = {"ids": None}
        if story.ids:
            names["ids"] = self._add(f"{prefix}.ids", torch.cat(story.ids, dim=1))
        for field in STORY:
            names[field] = self._add(f"{prefix}.{field}", getattr(story, field))
        return names

    def checkpoint(self, point: Checkpoint, number: int) -> dict[str, Any]:
        prefix = f"checkpoint.{number}"
        meaning: dict[str, Any] = {
            "id": point.id,
            "layer": point.layer,
            "edits": [edit.describe() for edit in point.edits],
            "story": self.story(point.story, prefix),
            "table": self.table(point.table),
        }
        if point.boundary is not None:
            self._hold(point.boundary, point.boundary.size_bytes)
            meaning["boundary"] = self._add(f"{prefix}.boundary", point.boundary.tensor())
            for field in ("ids", "mask", "positions"):
                meaning[f"inputs_{field}"] = self._add(f"{prefix}.inputs.{field}", getattr(point.inputs, field))
        return meaning

    def _add(self, name: str, tensor: torch.Tensor | None) -> str | None:
        if tensor is None:
            return None
        self.tensors[name] = tensor.detach().cpu()
        return name


def save_session(session: Session, folder: str | Path) -> None:
    """Write `session` and its checkpoints to `folder`, which must not exist yet.

    Raises:
        UsageError: the folder exists.
        CapacityError: the host has no room for what is still on the device only, or the folder's file system is full.
        DeviceError: the file system failed otherwise. Nothing is left of what was written; the session is as it was.
    """
    folder = Path(folder)
    with taken(session._pager.saving):  # two that hold a part of what they need of the host would wait for each other
        if folder.exists():
            raise UsageError(f"{folder} exists already; save to a new folder")
        try:
            _save(session, folder)
        except OSError as error:
            raise _not_saved(session, folder, error) from error


def _not_saved(session: Session, folder: Path, error: OSError) -> DjinnError:
    told = f"session {session.id}, {session.state.value}, was not saved to {folder}: {error}; it is as it was"
    if error.errno != errno.ENOSPC:
        return DeviceError(f"{told}; save to another file system")
    needed_bytes = sum(block.end_bytes() for block in session._holding.table)
    free_bytes = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    return OutOfDisk(f"{told}; make room, or save elsewhere", needed_bytes=needed_bytes, free_bytes=free_bytes)


def _save(session: Session, folder: Path) -> None:
    holding = session._holding
    holding.wait_issued()
    write_back(session._pager, holding, list(holding.mapped.values()))
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    collector = _Collector(session)
    try:
        with Interruptible():
            meaning = _meaning(session, collector)
            meaning["tensors_blake2b"] = write_tensors(partial / TENSORS, collector.tensors)
            _write_json(partial / MEANING, meaning)
        os.rename(partial, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        collector.close()


def _meaning(session: Session, collector: _Collector) -> dict[str, Any]:
    layout = asdict(session._holding.layout)
    points = session.checkpoints
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model_digest(session.model),
        "layout": {key: layout[key] for key in LAYOUT},
        "story": collector.story(session._story, "session"),
        "table": collector.table(session._holding.table),
        "checkpoints": [collector.checkpoint(point, number) for number, point in enumerate(points)],
        "stopped": points.index(session.stopped) if session.stopped is not None else None,
    }


def _digest(meaning: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meaning, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_json(path: Path, meaning: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**meaning, "blake2b": _digest(meaning)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# loading


@dataclass
class _Loader:
    """What is being put together: tensors by name, blocks and boundaries into a holding."""

    sessions: Sessions
    holding: Holding
    file: TensorFile
    blocks: dict[str, Block]
    boundaries: list[Boundary]

    def small(self, name: str | None) -> torch.Tensor | None:
        return None if name is None else self.file.read(name).to(self.sessions.pager.device.torch_device)

    def block(self, name: str, layer: int, index: int) -> Block:
        if name in self.blocks:
            return self.blocks[name]
        block = self.blocks[name] = Block(self.holding.layout, layer, index)
        size_bytes = self.file.size_bytes(name)
        if size_bytes > block.size_bytes:
            raise IntegrityError(f"{self.file.path}: {name} has {size_bytes} bytes, its place has {block.size_bytes}")
        block.host = self.sessions.pager.tiers.allocate(block.size_bytes, self.holding.id)
        with Interruptible():
            self.file.read_into(name, block.host.tensor[:size_bytes])
        block.host_valid_bytes = size_bytes
        return block

    def fill(self, table: BlockTable, meaning: Mapping[str, Any]) -> None:
        rows = [
            [self.block(name, layer, index) for index, name in enumerate(row)]
            for layer, row in enumerate(meaning["blocks"])
        ]
        table.assign(meaning["lengths"], rows)
        short = [block for block in table if block.stored_bytes < table.end_bytes(block)]  # others may spill it already
        if short or [len(row) for row in table.blocks] != [table.layout.count(n) for n in table.lengths]:
            raise IntegrityError(f"{self.file.path} holds fewer bytes of KV than its lengths say")

    def story(self, names: Mapping[str, Any]) -> Story:
        ids = self.small(names["ids"])
        fields = {field: self.small(names[field]) for field in STORY}
        if fields["rng"] is not None:
            fields["rng"] = fields["rng"].cpu()
        return Story(ids=() if ids is None else (ids,), **fields)

    def checkpoint(self, meaning: Mapping[str, Any]) -> Checkpoint:
        table = BlockTable(self.holding.layout)
        self.fill(table, meaning["table"])
        point = Checkpoint(meaning["layer"], None, None, table, self.story(meaning["story"]))
        edits = tuple(Recorded(what) for what in meaning["edits"])
        if meaning["layer"] is None:
            return replace(point, edits=edits)
        boundary = self._boundary(meaning["boundary"])
        inputs = PassInputs(*(self.small(meaning[f"inputs_{field}"]) for field in ("ids", "mask", "positions")))
        return replace(point, boundary=boundary, inputs=inputs, edits=edits)

    def _boundary(self, name: str) -> Boundary:
        boundary = Boundary(self.file.shape(name), self.file.dtype(name), None)
        self.boundaries.append(boundary)
        boundary.host = self.sessions.pager.tiers.allocate(boundary.size_bytes, self.holding.id)
        with Interruptible():
            self.file.read_into(name, boundary.host.tensor[: boundary.size_bytes])
        boundary.host_valid_bytes = boundary.size_bytes
        return boundary


def load_session(folder: str | Path, model: PreTrainedModel, sessions: Sessions) -> Session:
    """The session saved in `folder`, on the same model; it is paused and off the device: resume it.

    Raises:
        IntegrityError: the folder is damaged, no saved session, or of another model; nothing was opened.
        CapacityError: there is no room for it.
    """
    folder = Path(folder)
    meaning = _read_meaning(folder, model)
    with Uninterrupted():
        return _load(folder, meaning, model, sessions)


def _load(folder: Path, meaning: dict[str, Any], model: PreTrainedModel, sessions: Sessions) -> Session:
    layout = meaning["layout"]
    holding = sessions.open_holding(model, max_length=layout["max_length"], batch_size=layout["batch_size"])
    loader = None
    try:
        if {key: getattr(holding.layout, key) for key in LAYOUT} != layout:
            raise IntegrityError(f"{folder} holds KV of layout {layout}, the model has {holding.layout}")
        holding.go(SessionState.PAUSED, "be loaded")
        holding.go(SessionState.SWAPPED, "be loaded")
        with TensorFile(folder / TENSORS, meaning["tensors_blake2b"]) as file:
            loader = _Loader(sessions, holding, file, {}, [])
            loader.fill(holding.table, meaning["table"])
            with sessions.pager.lock:
                holding.forget_bytes()
            session = sessions.adopt(model, holding, loader.story(meaning["story"]))
            for entry in meaning["checkpoints"]:
                sessions.pager.add_checkpoint(holding, loader.checkpoint(entry))
        if meaning["stopped"] is not None:
            session.stopped = holding.checkpoints[meaning["stopped"]]
        act()
        return session
    except (KeyError, TypeError, IndexError, ValueError) as error:
        _give_up(sessions, holding, loader)
        raise IntegrityError(f"{folder} is not a session that this version can read: {error!r}") from error
    except BaseException:
        _give_up(sessions, holding, loader)
        raise


def _give_up(sessions: Sessions, holding: Holding, loader: _Loader | None) -> None:
    sessions.pager.close_session(holding)
    if loader is not None:
        with sessions.pager.lock:
            for stored in (*loader.blocks.values(), *loader.boundaries):
                sessions.pager.tiers.discard(stored)


def _read_meaning(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    path = folder / MEANING
    try:
        meaning = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder} is no saved session: {error}") from error
    if not isinstance(meaning, dict) or meaning.get("format") != FORMAT or meaning.get("version") != VERSION:
        raise IntegrityError(f"{path} is not a {FORMAT} of version {VERSION}")
    if meaning.pop("blake2b", None) != _digest(meaning):
        raise IntegrityError(f"{path} is damaged: its content does not match its checksum")
    ours = model_digest(model)
    if meaning["model"] != ours:
        raise IntegrityError(
            f"{folder} was saved with another model (digest {meaning['model']}, this one is {ours}); load the same "
            "weights, dtype and config"
        )
    return meaning
