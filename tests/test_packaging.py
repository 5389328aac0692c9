"""The lock, the conda files and the package's own ranges say the same, and none of them names a host."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "envs" / "requirements.txt"
CONDA = sorted((ROOT / "envs").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_lock_has_versions_and_nothing_else() -> None:
    for line in LOCK.read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line


@pytest.mark.parametrize("file", CONDA, ids=lambda file: file.name)
def test_conda_files_pin_what_the_lock_pins(file: Path) -> None:
    pins = yaml.safe_load(file.read_text())["dependencies"][-1]["pip"]
    after = file.with_suffix(".post-deploy.sh")
    if after.exists():
        pins += re.findall(r"\S+==\S+", after.read_text())
    assert pins
    for pin in pins:
        name, version = pin.split("==")
        assert lock()[canonicalize_name(name)] == version, pin


@pytest.mark.parametrize("group", ["dependencies", *PROJECT["optional-dependencies"]])
def test_the_package_admits_what_the_lock_pins(group: str) -> None:
    for text in PROJECT["dependencies"] if group == "dependencies" else PROJECT["optional-dependencies"][group]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(lock()[canonicalize_name(requirement.name)]), text


def test_every_environment_of_a_rule_exists() -> None:
    rules = list((ROOT / "workflow" / "rules").glob("*.smk"))
    assert rules
    for rule in rules:
        for name in re.findall(r'conda:\s*"([^"]+)"', rule.read_text()):
            assert (rule.parent / name).resolve() in CONDA, f"{rule.name} names {name}"
