"""Which code and which libraries made a result.

The digest covers the code that an experiment runs: its own scripts and everything of this repository that they
import, however deep, found by reading the imports. A change to the figures does not make a measurement look old; a
change to the streamer does. It is the same list that Snakemake takes as the rule's inputs, and it needs no git.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("djinn_core", "workflow")
LIBRARIES = (
    "torch", "transformers", "accelerate", "deepspeed", "safetensors", "numpy", "cuda-bindings", "nvidia-ml-py",
    "nvidia-nvcomp-cu13", "snakemake",
)  # fmt: skip


def code_of(experiment: str, root: Path = ROOT) -> list[str]:
    """The files that `experiment` runs, relative to `root`, sorted: workflow/scripts/EXPERIMENT*.py, the folder
    workflow/scripts/EXPERIMENT*/, and what they import from this repository."""
    scripts = root / "workflow" / "scripts"
    waiting = sorted({*scripts.glob(f"{experiment}*.py"), *scripts.glob(f"{experiment}*/**/*.py")})
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        waiting.extend(_imported_files(file, root, file.stat().st_mtime_ns))
    return sorted(str(file.relative_to(root)) for file in seen)


def code_digest(experiment: str, root: Path = ROOT) -> str:
    """A digest over the names and bytes of `code_of(experiment)`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in code_of(experiment, root):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def _imported_files(file: Path, root: Path, changed_ns: int) -> tuple[Path, ...]:
    """The repository's files that `file` imports, at the top or inside functions; `changed_ns` keeps the cache true."""
    found: set[Path] = set()
    here = list(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.update(_files_of(alias.name.split("."), root))
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                found.update(_files_of([*module, alias.name], root))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and file.name == "__init__.py":
            # a package may import lazily, from a table of names
            name = node.value
            found.update(_files_of(here + name[1:].split(".") if name.startswith(".") else name.split("."), root))
    return tuple(sorted(found))


def _files_of(parts: list[str], root: Path) -> set[Path]:
    """The files that importing the dotted name runs: each package's __init__ on the way, and the module."""
    files: set[Path] = set()
    if not parts or parts[0] not in PACKAGES:
        return files
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if candidate.is_file():
                files.add(candidate)
    return files


def source_of(experiment: str, root: Path = ROOT) -> dict[str, Any]:
    """`commit` and `dirty` (None where this is no git checkout) and `digest`."""
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit.strip() if commit is not None else None,
        "dirty": bool(status.strip()) if status is not None else None,
        "digest": code_digest(experiment, root),
    }


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def libraries() -> dict[str, str]:
    """Versions of Python and of the libraries that a measurement may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
