"""The documents name what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.paths import TESTS

DOCS = TESTS.parent / "docs"
TEST_NAME = re.compile(r"`([\w/]+\.py)::(?:\w+::)?(test_\w+)`")


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_faults_names_a_test() -> None:
    text = (DOCS / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| Test |" not in line]
    assert len(rows) > 50
    for row in rows:
        named = TEST_NAME.findall(row)
        assert named, row
        for file, name in named:
            assert name in functions(TESTS / file), row
