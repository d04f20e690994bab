"""The page of all commands, made from the command line itself."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import typer

from pipeline.cli import app

HEAD = """\
# Commands

Made from `pipeline --help` and that of every command. Options of `pipeline` itself stand before the
command. `pipeline --install-completion` adds completion to your shell.
"""


def commands_page() -> str:
    """Every command with its help, arguments and options."""
    return "\n".join([HEAD, *_command(typer.main.get_command(app), "pipeline", 2)])


def _command(command: Any, path: str, level: int) -> Iterator[str]:
    """A command and those below it."""
    context = command.context_class(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"{'#' * level} {path}\n"
    yield f"{command.help or ''}\n"
    yield f"```text\n{usage}\n```\n"
    records = [(param, param.get_help_record(context)) for param in command.params]
    rows = [_row(param, record) for param, record in records if record]
    if rows:
        yield "| argument or option | what it is |\n|---|---|"
        yield "\n".join(rows) + "\n"
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _command(child, f"{path} {name}", min(level + 1, 4))


def _row(param: Any, record: tuple[str, str]) -> str:
    names, text = (" ".join(part.split()) for part in record)
    variable = f" Also ${param.envvar}." if getattr(param, "envvar", None) else ""
    cell = html.escape(text, quote=False).replace("|", "\\|")
    return f"| `{names}` | {cell}{variable} |"
