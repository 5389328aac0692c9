"""YAML that people write, read strictly: each key is text and is given once, and a wrong file is one line of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"


class SettingsError(Exception):
    """A setting is unknown, of the wrong type, or out of range; the message has the key and what is allowed."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (TEXT, MERGE):
                said = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {said} is not text; put a name, or quote it", problem_mark=key.start_mark
                )
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value}: given twice, first in line {lines[key.value]}; give it once",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return node


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; `where` begins the error's line.

    Raises:
        SettingsError: it is not YAML, or a key is not text or is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(filter(None, (error.context, error.problem)))
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{where}{line}: {said}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise SettingsError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise SettingsError(f"{where}: nested too deeply") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingsError: with the path, and the line where there is one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8: {error.reason} at byte {error.start:,}; save it as UTF-8") from error
    content = parse(text, str(path))
    if content is None:
        raise SettingsError(f"{path}: is empty, wanted a mapping")
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: holds a {type(content).__name__}, wanted a mapping")
    return content
