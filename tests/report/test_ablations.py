"""Ablations beside the papers' tables."""

from __future__ import annotations

import re

import pytest

from pipeline.ablations.definitions import list_ablations, read_ablation
from pipeline.errors import PipelineError
from pipeline.files import write_json
from tests.report.helpers import PUBLISHED, Tree, checked, section, text_of, write_published


def test_ablations_that_have_run_stand_beside_the_paper(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    variants = [
        {"label": "without <b>", "params": {"train.max_paste": 1, "train.flip": None}},
        {"label": "with", "params": {}},
    ]
    run_one = {"experiment": "x", "encoder": "tiny/tiny", "metrics": {"miou": 11.16, "ap": None}}
    write_json(
        tree.reports_dir / "ablations/copy_paste.json",
        {
            "ablation": "copy_paste",
            "bench": "voc",
            "params": {"train.stop_gradient": True},
            "variants": [variants[0] | run_one, variants[1]],
        },
    )
    page = tree.report()
    checked(page)
    shown = section(page, "ablations")
    first, *others = re.split(r"<details>", shown)
    text = text_of(first)
    assert (
        "without &lt;b&gt; train.max_paste: 1, train.flip: null 11.2 \u2013 \u2013 \u2013" in text
    )
    assert "with as in params.yaml not run" in text
    assert "voc, tiny/tiny, all with train.stop_gradient: true" in text
    assert "ZUTIS, Table 8" in text
    assert "with copy-paste 63.7 30.9" in text
    assert " ".join(read_ablation("copy_paste").carries_over.split()[:6]) in text
    assert len(others) == len(list_ablations()) - 1
    assert all("not run: <code>pipeline ablate" in other for other in others)


def test_ablations_are_listed_as_not_run_without_results_and_tables(page: str) -> None:
    shown = section(page, "ablations")
    for name in list_ablations():
        assert f"<code>pipeline ablate {name}</code>" in shown
    assert "ZUTIS, Table" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"k\.json: key 'bench' is missing"),
        ("{", r"k\.json: not valid JSON"),
    ],
)
def test_damaged_results_of_an_ablation_are_named(tree: Tree, content: str, message: str) -> None:
    path = tree.reports_dir / "ablations/k.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(PipelineError, match=message):
        tree.report()
