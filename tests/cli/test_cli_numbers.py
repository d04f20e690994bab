"""Options that are numbers: what none of them takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli import app


def float_options(group: typer.Typer, *words: str) -> Iterator[list[str]]:
    """The words of each command with each of its options that is a float."""
    for command in group.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        hints = get_type_hints(command.callback, include_extras=True)
        for option, hint in hints.items():
            kind = get_args(hint)[0] if get_args(hint) else hint
            if kind is float or float in get_args(kind):
                yield [*words, name, f"--{option.replace('_', '-')}"]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from float_options(inner.typer_instance, *words, *filter(None, [inner.name]))


def test_all_are_found() -> None:
    found = {words[-1] for words in float_options(app)}
    assert found == {*("--max-gb", "--unused-days", "--timeout", "--fps", "--min-score", "--split")}


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("words", list(float_options(app)), ids=" ".join)
def test_what_is_no_finite_number_is_refused(tmp_path: Path, words: list[str], number: str) -> None:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "PIPELINE_CACHE": str(tmp_path)}
    result = CliRunner().invoke(app, [*words, number], env=environment)
    assert result.exit_code == 2
    assert f"Invalid value for '{words[-1]}'" in result.output
