"""A project with the output of every stage, and the report's page on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.helpers import Tree, write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Output of every stage; see `write_tree`."""
    return write_tree(tmp_path)


@pytest.fixture
def page(tree: Tree) -> str:
    return tree.report()
