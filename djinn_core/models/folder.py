"""Which folder a checkpoint's name stands for, and which of its files leads to the weights.

Invariant: files are looked for and none is read, without torch and without the network, so that the pipeline refuses a
wrong name where it reads its settings. Lost: a resolver of its own there, which would one day find another folder than
`load` does.
"""

from __future__ import annotations

import re
from pathlib import Path

from djinn_core.errors import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str | Path) -> bool:
    """Whether it has the form owner/name."""
    return _HUB_ID.fullmatch(str(name)) is not None


def find_folder(name: str | Path) -> Path | None:
    """The folder of that path, else of that hub id in the local cache; None where there is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    return _cached(str(name)) if is_hub_id(name) else None


def weights_file(folder: Path) -> Path:
    """The single file if there is one, else the index of the shards, in the order of transformers.

    Raises:
        WeightsError: the folder holds neither.
    """
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".pth", ".pt"})
    raise WeightsError(
        f"{folder} holds neither {SINGLE} nor {INDEX}"
        + (f", only {', '.join(others[:5])}; convert it to safetensors" if others else "")
    )


def _cached(hub_id: str) -> Path | None:
    # here and not above: most settings name no checkpoint, and the import takes a tenth of a second
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
