"""Every driver function that the code names exists in the installed bindings; a machine without a GPU can check it."""

import ast
from pathlib import Path

import pytest
from cuda.bindings import driver

PACKAGE = Path(__file__).resolve().parents[2] / "djinn_core"


def names_in(source: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "driver"
    }


@pytest.mark.parametrize("path", sorted(p for p in PACKAGE.rglob("*.py") if "bindings import driver" in p.read_text()))
def test_every_driver_name_exists(path):
    names = names_in(path.read_text())
    assert names, f"{path} imports the driver and uses none of it"
    missing = sorted(name for name in names if not hasattr(driver, name))
    assert not missing, f"{path.name} names {missing}, which cuda.bindings.driver does not have"
