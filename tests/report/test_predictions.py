"""Which pictures of predictions are shown, and where."""

from __future__ import annotations

import re

from pipeline.files import write_json
from tests.report.helpers import Tree, section, text_of


def test_best_and_worst_predictions_are_shown_apart_from_others(page: str) -> None:
    predictions = section(page, "predictions")
    assert predictions.count("<img") == 3
    assert predictions.index("image-best-0") < predictions.index("image-best-1")
    assert "image-spread-3" not in predictions
    assert "90.5 mIoU" in predictions
    assert "\u2013 mIoU" in predictions


def header_pictures(page: str) -> list[str]:
    return re.findall(r"Prediction on image ([\w-]+)", page.split("</header>")[0])


def test_header_shows_predictions_that_are_neither_best_nor_worst(tree: Tree) -> None:
    path = tree.reports_dir / "overlays/voc/index.json"
    scores = [10.0, 60.0, 20.0, None, 50.0, 40.0, 30.0]
    entries = [
        {"file": "0.png", "image_id": f"at-{score}".replace(".0", ""), "miou": score, "kind": kind}
        for kind in ("best", "spread", "worst")
        for score in (scores if kind == "spread" else [99.0])
    ]
    write_json(path, entries)
    page = tree.report()
    assert header_pictures(page) == ["at-40", "at-20"]
    assert "6 images picked evenly" in text_of(page)


def test_header_shows_the_only_picture_once_and_none_without_a_score(tree: Tree) -> None:
    path = tree.reports_dir / "overlays/voc/index.json"
    entry = {"file": "0.png", "image_id": "only", "miou": 50.0, "kind": "spread"}
    write_json(path, [entry])
    assert header_pictures(tree.report()) == ["only"]
    write_json(path, [entry | {"miou": None}])
    assert header_pictures(tree.report()) == []
