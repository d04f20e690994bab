"""What cannot be read is named."""

from __future__ import annotations

import re

import pytest

from pipeline.errors import PipelineError
from tests.report.helpers import Tree


@pytest.mark.parametrize(
    ("damaged", "content"),
    [
        ("metrics/voc.json", "{"),
        ("metrics/voc.json", "[]"),
        ("stats/mask.json", "[]"),
        ("overlays/voc/index.json", '[{"file": "0.png"}]'),
        ("overlays/voc/0.png", "no picture"),
        ("plots/voc_per_class.csv", "name,score\ncat,1\n"),
        ("live/plots/metrics/train/loss.tsv", "a\tb\n1\t2\n"),
    ],
)
def test_damaged_input_is_an_error_that_names_the_file(
    tree: Tree, damaged: str, content: str
) -> None:
    (tree.reports_dir / damaged).write_text(content)
    with pytest.raises(PipelineError, match=re.escape(damaged)):
        tree.report()
    assert not tree.out_path.exists()
