"""The page of a notebook: its text and its commands."""

from __future__ import annotations

import json
from pathlib import Path

SHELL = "!"


def notebook_page(path: Path) -> str:
    """A notebook's cells as Markdown: text as it is, commands of the shell and Python as code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    note = f"This page is the notebook [{path.name}]({path.name}), which the tests run."
    return "\n\n".join([parts[0], note, *parts[1:]])


def _cell(kind: str, source: str) -> str:
    if kind == "markdown":
        return source
    lines = source.splitlines()
    if all(line.startswith((SHELL, "%", "#")) or not line for line in lines):
        commands = [line.removeprefix(SHELL).removeprefix("%") for line in lines]
        return "\n".join(["```sh", *commands, "```"])
    return "\n".join(["```python", source, "```"])
