"""What set-up says about a machine that lacks something: one line, with the package, and it stops only if it must."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "envs" / "check_host.sh"


def check(
    folder: Path, *, python: str | None, compiler: bool = True, name: str = "python3"
) -> subprocess.CompletedProcess[str]:
    """Run the script on a machine that has nothing but `folder` on its PATH."""
    (folder / "sh").symlink_to(shutil.which("sh"))
    (folder / "cat").symlink_to(shutil.which("cat"))
    if python is not None:
        (folder / name).write_text(python)
        (folder / name).chmod(0o755)
    if compiler:
        (folder / "g++").write_text("#!/bin/sh\n")
        (folder / "g++").chmod(0o755)
    return subprocess.run(["sh", SCRIPT, name], env={"PATH": str(folder)}, capture_output=True, text=True)


def real(before: str = "") -> str:
    """This Python, behind a script that can pretend."""
    return f'#!/bin/sh\n{before}\nexec {sys.executable} "$@"\n'


def test_no_python(tmp_path: Path) -> None:
    said = check(tmp_path, python=None)
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "apt-get install python3 python3-venv" in said.stderr


@pytest.mark.parametrize("path", ["python3.12", "/usr/bin/python3.12"])
def test_another_version_has_packages_of_its_own(path: str, tmp_path: Path) -> None:
    said = check(tmp_path, python=None, name=f"{tmp_path}{path}" if path[0] == "/" else path)
    assert said.stderr.endswith("; install it with: apt-get install python3.12 python3.12-venv\n")
    (tmp_path / "g").mkdir()
    bare = real('case "$2" in *ensurepip*) exit 1;; esac')
    said = check(tmp_path / "g", python=bare, name="python3.12")
    assert said.stderr.endswith("; install it with: apt-get install python3.12-venv\n")
    (tmp_path / "h").mkdir()
    said = check(tmp_path / "h", python=real('[ "$1" = - ] && exit 1'), name="python3.12")
    assert said.returncode == 0 and " python3.12-dev" in said.stderr


def test_python_too_old(tmp_path: Path) -> None:
    old = '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n'
    said = check(tmp_path, python=old)
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "3.11 or newer is needed, Python 3.9.2 is here" in said.stderr


def test_no_venv_stops_before_anything_else(tmp_path: Path) -> None:
    said = check(tmp_path, python=real('case "$2" in *ensurepip*) exit 1;; esac'), compiler=False)
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "apt-get install python3-venv" in said.stderr


def test_no_compiler_is_a_notice(tmp_path: Path) -> None:
    said = check(tmp_path, python=real(), compiler=False)
    assert said.returncode == 0
    assert said.stderr.count("\n") == 1
    assert "apt-get install g++" in said.stderr
    assert "deepspeed_nvme will be reported as unsupported" in said.stderr


@pytest.mark.parametrize("missing", ["g++", "python3-dev"])
def test_a_new_python_needs_a_compiler_and_the_headers(missing: str, tmp_path: Path) -> None:
    new = 'case "$2" in *"3, 14"*) exit 1;; esac; ' + ('[ "$1" = - ] && exit 1' if missing == "python3-dev" else "")
    said = check(tmp_path, python=real(new), compiler=missing != "g++")
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "3.14 and newer need" in said.stderr and f" {missing}" in said.stderr


@pytest.mark.skipif(not os.path.exists("/usr/include/libaio.h"), reason="libaio-dev is not installed here")
def test_nothing_is_said_when_nothing_is_missing(tmp_path: Path) -> None:
    said = check(tmp_path, python=real())
    assert (said.returncode, said.stderr) == (0, "") or "python3-dev" in said.stderr


def test_libaio_is_named(tmp_path: Path) -> None:
    said = check(tmp_path, python=real())
    assert ("libaio-dev" in said.stderr) == (not os.path.exists("/usr/include/libaio.h"))
