"""What the page says about the stages' runs."""

from __future__ import annotations

import re

from pipeline.files import read_json, write_json
from tests.report.helpers import Tree, section, text_of


def test_dag_shows_counts_and_what_was_skipped(page: str) -> None:
    pipeline = section(page, "pipeline")
    stages = re.findall(r"<h3>(\w+)</h3>", pipeline)
    assert stages == [
        "embed",
        "retrieve",
        "mask",
        "pseudo_label",
        "train",
        "predict_bench",
        "score",
        "report",
    ]
    text = text_of(pipeline)
    assert "photos images 1,500 skipped 0 cached 40" in text
    assert "iterations 1,234" in text
    assert "audit photos" in text
    assert "overlaps 3" in text
    assert "empty masks" not in text
    details = pipeline.split("<details>")[1]
    assert "2 skipped by embed (tars)" in details
    assert "00000.tar:a.jpg" in details
    assert "truncated" in details


def test_warnings_of_a_stage_are_shown(tree: Tree) -> None:
    path = tree.reports_dir / "stats" / "retrieve.json"
    assert "no image is left" not in section(tree.report(), "pipeline")
    write_json(path, {**read_json(path), "warnings": ["no image is left for cat & <b>"]})
    assert "no image is left for cat &amp; &lt;b&gt;" in section(tree.report(), "pipeline")


def test_long_list_of_skipped_items_is_cut(tree: Tree) -> None:
    items = [{"item": f"photo-{number}", "reason": "empty file"} for number in range(1000)]
    write_json(
        tree.reports_dir / "stats" / "mask.json",
        {"stage": "mask", "items": 0, "skipped": 4000, "seconds": 1.0, "skipped_items": items},
    )
    pipeline = section(tree.report(), "pipeline")
    assert "photo-199<" in pipeline
    assert "photo-200<" not in pipeline
    assert "and 3800 more" in pipeline


def test_demo_world_is_a_stage_of_its_own_once_it_was_drawn(tree: Tree) -> None:
    write_json(
        tree.reports_dir / "stats" / "world-demo.json",
        {"stage": "world", "items": 10, "skipped": 0, "seconds": 1.0, "skipped_items": []},
    )
    assert "<h3>world</h3>" in section(tree.report(), "pipeline")


def test_files_that_were_left_out_are_shown(tree: Tree) -> None:
    write_json(
        tree.reports_dir / "stats" / "mask.json",
        {"stage": "mask", "items": 1, "skipped": 0, "left_out": {".svg": 1, ".heic": 3}},
    )
    assert "left out 3 .heic, 1 .svg" in text_of(section(tree.report(), "pipeline"))


def test_categories_that_are_never_predicted_are_named(tree: Tree) -> None:
    path = tree.reports_dir / "stats" / "score-voc.json"
    content = {"stage": "score", "items": 3, "skipped": 0, "skipped_items": []}
    write_json(path, content | {"never_predicted": ["cat", "bird"]})
    assert "never predicted cat, bird" in text_of(section(tree.report(), "pipeline"))


def test_the_region_bank_is_a_stage_with_its_number_of_regions_where_it_is_on(tree: Tree) -> None:
    counts = {"regions": 1234, "sampled": 5}
    write_json(
        tree.reports_dir / "stats" / "bank.json",
        {"stage": "bank", "items": 10, "skipped": 0, "counts": counts, "skipped_items": []},
    )
    assert "<h3>bank</h3>" not in section(tree.report(), "pipeline")
    with tree.params_path.open("a") as params:
        params.write("\nbank: {weight: 0.25}\n")
    page = tree.report()
    assert "<h3>bank</h3>" in section(page, "pipeline")
    assert "regions 1,234" in text_of(section(page, "pipeline"))
    assert "region bank, weight in labels" in page
