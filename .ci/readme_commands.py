"""The commands that a Markdown file shows: in fenced `console` or `sh` blocks, each line that starts with `$ `."""

import sys
from collections.abc import Iterator
from pathlib import Path


def commands(markdown: str) -> Iterator[str]:
    """Each command as one line, in the order of the file; a line that ends in a backslash goes on in the next.

    Raises:
        ValueError: a block is not closed, or one of its lines starts with `$` but shows no command.
    """
    inside = False
    shown = ""
    for line in markdown.splitlines():
        if line.startswith("```"):
            inside = not inside and line[3:].strip() in ("console", "sh")
        elif inside and shown:
            shown += line.strip()
        elif inside and line.startswith("$"):
            if not line.startswith("$ ") or not line[2:].strip():
                raise ValueError(f"not a command: {line!r}")
            shown = line[2:].strip()
        if shown.endswith("\\"):
            shown = shown[:-1]
        elif shown:
            yield shown
            shown = ""
    if inside or shown:
        raise ValueError("the last block of commands is not closed")


if __name__ == "__main__":
    for command in commands(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(command)
