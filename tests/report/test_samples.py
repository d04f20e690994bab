"""Strips of the archives, and samples with their pseudo-masks and pseudo-labels."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

from pipeline.formats.tables import read_archives, write_archives
from pipeline.report.samples import read_samples
from pipeline.training.targets import training_target
from tests.report.helpers import CATEGORIES, Tree, section, text_of, write_archive_shards


def test_strips_show_the_first_images_and_negatives(page: str) -> None:
    archives = section(page, "archives")
    assert archives.count("<img") == 14
    text = text_of(archives)
    assert "negatives 2 images 0.499 0.498" in text
    assert "bird 4 images 0.499 0.498 0.497 0.496 negatives" in text


def test_samples_cover_categories_and_ranks(page: str) -> None:
    labels = section(page, "labels")
    assert set(re.findall(r"rank (\d+)", labels)) == {"1", "2", "3", "4"}
    for name in ("cat", "dog", "bird"):
        assert f"dense labels over the image of {name}" in labels
    num_samples = labels.count("<h3>")
    for caption in ("image", "pseudo-mask", "dense labels", "training saw"):
        assert labels.count(f"<figcaption>{caption}</figcaption>") == num_samples
    assert "target <b>fused</b>" in labels


def test_images_missing_from_the_shards_are_left_out(tree: Tree) -> None:
    write_archive_shards(tree, CATEGORIES, per_category=3, size=(8, 8))
    rows_of_more = tree.archives_path.read_bytes()
    write_archive_shards(tree, CATEGORIES[:1], per_category=2, size=(8, 8))
    tree.archives_path.write_bytes(rows_of_more)
    assert section(tree.report(), "archives").count("<img") == 2


def test_similarities_that_imported_archives_do_not_tell_are_unknown(tree: Tree) -> None:
    rows = [replace(row, similarity=math.nan) for row in read_archives(tree.archives_path)]
    write_archives(tree.archives_path, rows)
    page = tree.report()
    assert "similarity unknown" in text_of(section(page, "labels"))
    assert "bird 4 images unknown unknown" in text_of(section(page, "archives"))


def test_all_objects_of_a_mask_are_shown(tree: Tree) -> None:
    shown = []
    for several_objects in (False, True):
        write_archive_shards(
            tree, CATEGORIES, per_category=2, size=(8, 12), several_objects=several_objects
        )
        shown.append(section(tree.report(), "labels"))
    assert shown[0] == shown[1]


def test_labels_of_masks_that_were_made_anew_at_another_size_are_left_out(tree: Tree) -> None:
    masks_dir, older_dir = tree.labels_dir, tree.root / "older"
    masks_dir.rename(older_dir)
    write_archive_shards(tree, CATEGORIES, per_category=2, size=(40, 60))
    archives = read_archives(tree.archives_path)
    for labels_dir, titles in (
        (masks_dir, ("image", "pseudo-mask", "dense labels", "training saw")),
        (older_dir, ("image", "pseudo-mask")),
    ):
        make_target = partial(training_target, target="fused")
        found = read_samples(masks_dir, labels_dir, archives, make_target)
        assert {tuple(sample["pictures"]) for sample in found["samples"]} == {titles}
