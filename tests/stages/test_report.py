"""The report page: complete, self-contained, escaped, deterministic, and content with less."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.pictures.report import category_colour
from tests.report.helpers import (
    CATEGORIES,
    EVIL,
    MAX_PAGE_BYTES,
    Tree,
    checked,
    section,
    text_of,
    write_archive_shards,
    write_stats,
    write_tree,
)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Output of every stage; see `write_tree`."""
    return write_tree(tmp_path)


@pytest.fixture
def page(tree: Tree) -> str:
    return tree.report()


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    checker = checked(page)
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert "script" not in checker.counts
    for reference in checker.references:
        assert reference.startswith("data:") or reference[1:] in checker.ids
    assert not re.search(r"url\(|@import|https?://", page)
    assert checker.images
    assert all(image["alt"] for image in checker.images)
    assert "not run" not in page.split('<section id="ablations">')[0]


def test_headline_names_categories_index_and_scores_beside_the_baseline(page: str) -> None:
    header = text_of(page.split("<header>")[1].split("</header>")[0])
    assert "3 categories from 2,000 unlabelled images" in header
    assert "cat" in header
    assert "dog &amp; &lt;b&gt;" in header
    assert "bird" in header
    for score in ("47.5", "36.5", "12.3", "+35.2"):
        assert score in header


def test_values_are_escaped(page: str) -> None:
    assert EVIL not in page
    assert CATEGORIES[1] not in page
    assert "dog &amp; &lt;b&gt;&#34;pup&#34;&lt;/b&gt;" in page
    for name in ("pipeline", "scores", "predictions"):
        assert "&lt;script&gt;" in section(page, name)


def test_equal_inputs_give_equal_bytes_even_after_a_first_run(tree: Tree) -> None:
    first = tree.report()
    assert (tree.reports_dir / "stats" / "report.json").is_file()
    assert tree.report() == first


@pytest.mark.parametrize(
    ("missing", "section_name"),
    [
        ("reports/stats", "pipeline"),
        ("reports/metrics", "scores"),
        ("reports/metrics/audit_photos.json", "scores"),
        ("reports/overlays", "predictions"),
        ("data/labels", "archives"),
        ("data/labels", "labels"),
        ("data/archives.parquet", "archives"),
        ("reports/live", "training"),
    ],
)
def test_what_is_missing_is_shown_as_not_run(tree: Tree, missing: str, section_name: str) -> None:
    path = tree.root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = tree.report()
    checked(page)
    assert "not run" in section(page, section_name)


def test_page_without_params_and_plots(tree: Tree) -> None:
    tree.params_path.unlink()
    shutil.rmtree(tree.reports_dir / "plots")
    page = tree.report()
    assert "3 categories" in page
    assert "No params file was found" in page
    assert "training saw" not in page


@pytest.fixture
def leftovers(tree: Tree) -> Tree:
    """The tree, and in it what a preset with other worlds, sources, benches and audits left."""
    reports_dir = tree.reports_dir
    for prefix in ("world", "embed", "score", "audit"):
        stats = {"items": 999_000, "seconds": 9e6, "skipped": 1, "skipped_items": []}
        write_json(reports_dir / f"stats/{prefix}-old.json", {"stage": prefix} | stats)
    metrics = {"miou": 99.91, "baseline_miou": 99.92, "groups": {}, "n_images": 1}
    write_json(reports_dir / "metrics/old.json", metrics)
    write_json(reports_dir / "metrics/audit_old.json", {"mask_iou": 99.93})
    shutil.copytree(reports_dir / "overlays/voc", reports_dir / "overlays/old")
    (reports_dir / "plots/old_per_class.csv").write_text("category,iou\nold class,1\n")
    return tree


def test_what_the_params_do_not_name_is_not_shown(leftovers: Tree) -> None:
    page = leftovers.report()
    for name in ("old.json", "audit_old.json"):
        (leftovers.reports_dir / "metrics" / name).unlink()
    for path in leftovers.reports_dir.glob("stats/*-old.json"):
        path.unlink()
    shutil.rmtree(leftovers.reports_dir / "overlays/old")
    (leftovers.reports_dir / "plots/old_per_class.csv").unlink()
    assert leftovers.report() == page


def test_scores_for_development_are_left_out(leftovers: Tree) -> None:
    lines = leftovers.params_path.read_text()
    old = "old: {format: voc, root: voc, categories: voc, development: true}"
    leftovers.params_path.write_text(lines.replace("benches: {", f"benches: {{{old}, "))
    page = leftovers.report()
    assert not re.search(r"99\.9|old class", page)
    assert "999,000" in section(page, "pipeline")
    leftovers.params_path.write_text(leftovers.params_path.read_text().replace("true", "false"))
    assert "99.9" in leftovers.report()


def test_what_the_params_do_not_name_may_be_damaged(leftovers: Tree) -> None:
    reports_dir = leftovers.reports_dir
    page = leftovers.report()
    for path in [*reports_dir.glob("*/*old.json"), reports_dir / "overlays/old/index.json"]:
        path.write_text("{")
    assert leftovers.report() == page


def test_without_params_everything_is_shown(leftovers: Tree) -> None:
    leftovers.params_path.unlink()
    page = leftovers.report()
    checked(page)
    assert page.count("999,000") == 4
    assert "1,001,000 unlabelled images" in page
    for score in ("99.9", "old class", '<th scope="col">old</th>'):
        assert score in section(page, "scores")
    assert "Best, old" in section(page, "predictions")


def test_params_that_name_no_bench_show_none(tree: Tree) -> None:
    lines = tree.params_path.read_text().splitlines()
    tree.params_path.write_text("\n".join(line for line in lines if "benches" not in line))
    page = tree.report()
    assert "Benchmarks: not run" in section(page, "scores")
    assert "Overlays of predictions: not run" in section(page, "predictions")
    assert "47.5" not in page
    assert "image-" not in page


def test_stats_alone_make_a_page(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    write_stats(tree)
    assert "0 categories" in tree.report()


def test_nothing_at_all_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    with pytest.raises(PipelineError, match=r"nothing to report on.*dvc repro"):
        tree.report()
    assert not tree.out_path.exists()


def test_category_keeps_its_colour_in_every_section(page: str) -> None:
    chip = f'--colour:{category_colour(3)}"></i><span>bird</span>'
    for name in ("scores", "archives", "labels"):
        assert chip in section(page, name)


def test_settings_are_listed(page: str) -> None:
    notes = text_of(page.split('<footer id="notes">')[1])
    assert "iterations 1,234" in notes
    assert "training target fused" in notes
    assert "seed 7" in notes


@pytest.mark.parametrize("size", [(1, 1), (3, 400)])
def test_images_of_odd_sizes(tree: Tree, size: tuple[int, int]) -> None:
    write_archive_shards(tree, CATEGORIES, per_category=1, size=size)
    checked(tree.report())


def test_hundreds_of_categories(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    names = [f"category {number}" for number in range(300)]
    write_archive_shards(tree, names, per_category=1, size=(6, 8))
    page = tree.report()
    checked(page)
    assert "and 200 more archives" in section(page, "archives")
    assert "and 200 more" in page.split("</header>")[0]


def test_page_stays_small_whatever_the_images(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    names = [f"category {number}" for number in range(25)]
    write_archive_shards(tree, names, per_category=8, size=(96, 120))
    rng = np.random.default_rng(0)
    overlays_dir = tree.reports_dir / "overlays/voc"
    overlays_dir.mkdir(parents=True)
    blocks = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((600, 600), Image.Resampling.NEAREST).save(
        overlays_dir / "0.png"
    )
    entry = {"file": "0.png", "image_id": "0", "miou": 1.0}
    kinds = ["best"] * 6 + ["worst"] * 6
    write_json(overlays_dir / "index.json", [entry | {"kind": kind} for kind in kinds])
    assert len(tree.report().encode()) < MAX_PAGE_BYTES
