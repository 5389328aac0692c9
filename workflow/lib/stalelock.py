"""Snakemake's lock of a folder, when the Snakemake that took it was killed.

A kill leaves the lock behind, and the next run would refuse to start until someone types `--unlock`. The lock is
removed only when no other Snakemake process works in the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from workflow.lib.children import ancestors


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove the locks in `folder` that nobody holds; returns what was removed."""
    locks = sorted((folder / ".snakemake" / "locks").glob("*.lock"))
    if not locks or others(folder):
        return []
    for lock in locks:
        lock.unlink(missing_ok=True)
    return locks


def others(folder: Path) -> list[int]:
    """Snakemake processes at work in `folder`, this one and its parents left out."""
    own = {os.getpid(), *ancestors()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            there = (entry / "cwd").resolve()
        except OSError:  # it has ended, or it is another user's
            continue
        named = any(Path(os.fsdecode(word)).name == "snakemake" for word in words[:3])
        if named and there == folder.resolve():
            found.append(int(entry.name))
    return sorted(found)
