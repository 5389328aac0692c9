"""What the documents show is there: names, links, commands, and Python that runs."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import djinn_core

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = runpy.run_path(str(ROOT / ".ci" / "readme_commands.py"))["commands"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def page_id(page: Path) -> str:
    return page.name


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def test_the_api_page_names_what_is_public_and_nothing_else() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"`djinn\.(\w+)", page)) == set(djinn_core.__all__)


def test_the_api_page_draws_the_error_tree_as_it_is() -> None:
    rows = re.findall(r"^\| `djinn\.(\w+)` \| ?`?(\w*)`? \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {name for name in djinn_core.__all__ if name in vars(djinn_core.errors)}
    for name, parent in rows:
        assert getattr(djinn_core, name).__base__.__name__ == (parent or "Exception")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert not target.startswith("http"), f"{target}: a page here leads to files of this repository"
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_lines_are_short_outside_of_tables(page: Path) -> None:
    long = [n for n, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120 and line[0] != "|"]
    assert not long


def test_every_command_of_the_readme_can_be_run() -> None:
    commands = list(COMMANDS((ROOT / "README.md").read_text()))
    assert {"make reproduce", "make test"} <= set(commands)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= set(targets), command
        elif program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).is_file(), command
        elif program != "source":
            assert program in ("python", "snakemake", "djinn"), f"{command}: not something that set-up installs"


def test_only_commands_of_shell_blocks_are_taken() -> None:
    shown = "```python\n$ no\n```\n$ no\n```console\n$ make a\nits output\n$ djinn b \\\n    --c\n```\n"
    assert list(COMMANDS(shown)) == ["make a", "djinn b --c"]
    with pytest.raises(ValueError, match="not closed"):
        list(COMMANDS("```sh\n$ make a\n"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_id)
def test_python_on_the_page_runs(page: Path) -> None:
    program = "\n".join(blocks(page, "python"))
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=page_id)
def test_examples_run(example: Path) -> None:
    subprocess.run([sys.executable, str(example)], cwd=ROOT, check=True, timeout=280)
