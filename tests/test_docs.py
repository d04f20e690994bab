"""The documents name what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.paths import ROOT, TESTS

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
PATH = re.compile(r"(?<![\w/.-])((?:pipeline|tests|speed|docs|models/demo)/[\w./-]*[\w/])")
# By `python -m speed.gpu`, where there is a GPU.
WRITTEN_LATER = ["speed/results/bench-gpu.json"]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {(page.parent / name).resolve() for name in LINK.findall(text)}
    named = {ROOT / name for name in PATH.findall(text)} - {ROOT / name for name in WRITTEN_LATER}
    assert not [str(path) for path in links | named if not path.exists()]
