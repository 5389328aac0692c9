"""The public names, which way imports point, and what the code must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import djinn_core
from djinn_core import errors

ROOT = Path(djinn_core.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

# What each room may import, besides itself, `errors` and `interrupts`. One way: from the first to the last.
ROOMS = {
    "cli": {"service", "runtime", "sessions", "memory", "models", "weights", "device", "certificate", "machine"},
    "service": {"runtime", "sessions", "memory", "models"},
    "runtime": {"proof", "loading", "context", "sessions", "weights", "models", "memory", "device", "turn", "door"},
    "proof": {"loading", "sessions", "weights", "models", "memory", "device"},
    "loading": {"weights", "models", "memory", "device"},
    "context": {"device"},
    "certificate": {"certify", "machine", "memory", "device"},
    "certify": {"machine", "memory", "device"},
    "machine": set(),
    "sessions": {"weights", "models", "memory", "device", "turn"},
    "weights": {"memory", "device"},
    "models": {"door"},
    "memory": {"device"},
    "device": set(),
    "turn": set(),
    "door": set(),
    "errors": set(),
    "interrupts": set(),
}


def room_of(path):
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def imported_rooms(path):
    """Rooms that a file imports when it runs; what stands under TYPE_CHECKING is for readers."""
    tree = ast.parse(path.read_text())
    for_readers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_readers:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "djinn_core" else [f"djinn_core.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
        for name in names:
            if name.startswith("djinn_core."):
                yield name.split(".")[1]


def test_every_public_name_is_there_and_nothing_else_is_promised():
    assert list(djinn_core.__all__) == sorted(djinn_core.__all__)
    for name in djinn_core.__all__:
        assert getattr(djinn_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        djinn_core.nothing  # noqa: B018


def test_every_error_is_public():
    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree <= set(djinn_core.__all__)


def test_errors_need_no_torch():
    code = "import sys, djinn_core.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ROOMS, f"{room} is a new room: say what it may import"
    wrong = set(imported_rooms(path)) - ROOMS[room] - {room, "errors", "interrupts"}
    assert not wrong, f"{room} must not import {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_loaded_from_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"} & set(modules)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), "stored state is safetensors and JSON"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_five_hundred_lines(path):
    assert len(path.read_text().splitlines()) <= 500
