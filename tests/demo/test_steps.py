"""The documentation's pictures: one row an archive, masks and labels below their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.demo.steps import SIDE, draw_archives, draw_labels, draw_training
from pipeline.errors import PipelineError
from pipeline.formats.tables import write_archives
from pipeline.pictures.overlays import MARGIN
from pipeline.pictures.report import category_colour
from tests.report.helpers import Tree, write_tree

HEIGHT = round(SIDE * 20 / 30)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Three categories with four images of 20 x 30 each, and two negatives."""
    return write_tree(tmp_path)


def test_archives_are_rows_without_negatives(tree: Tree, tmp_path: Path) -> None:
    draw_archives(tree.archives_path, tree.labels_dir, tmp_path / "archives.png")
    with Image.open(tmp_path / "archives.png") as picture:
        assert picture.height == 3 * HEIGHT + 2 * MARGIN


def test_masks_have_the_colour_of_their_archive(tree: Tree, tmp_path: Path) -> None:
    draw_labels(tree.archives_path, tree.labels_dir, tree.labels_dir, tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    assert pixels.shape[0] == 3 * HEIGHT + 2 * MARGIN
    for number in range(3):
        column = slice(number * (SIDE + MARGIN), number * (SIDE + MARGIN) + SIDE)
        top = HEIGHT + MARGIN
        masked = pixels[top + HEIGHT // 4 + 3 : top + HEIGHT // 2 - 3, column].mean(axis=(0, 1))
        colour = np.array(ImageColor.getrgb(category_colour(number + 1)))
        others = [ImageColor.getrgb(category_colour(label_id)) for label_id in (1, 2, 3)]
        distances = [float(np.abs(masked - other).sum()) for other in others]
        assert np.argmin(distances) == number, (masked, colour)


def test_training_images_are_above_their_labels(tmp_path: Path) -> None:
    class Data:
        """Grey images with one object."""

        def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            labels = np.zeros((30, 30), np.int16)
            labels[10:20] = 1
            return np.full((30, 30, 3), 20 * number, np.uint8), labels, labels[None] > 0

    draw_training(Data(), tmp_path / "training.png")  # type: ignore[arg-type]
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.height == 2 * SIDE + MARGIN
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    above, below = pixels[:SIDE, :SIDE], pixels[SIDE + MARGIN :, :SIDE]
    assert np.ptp(above, axis=2).max() <= 3
    assert np.ptp(below[SIDE // 2], axis=1).min() > 20


def test_archives_of_other_shards_are_refused(tree: Tree, tmp_path: Path) -> None:
    write_archives(tree.archives_path, [])
    with pytest.raises(PipelineError, match=r"archives\.parquet: no image of it is in the mask"):
        draw_archives(tree.archives_path, tree.labels_dir, tmp_path / "archives.png")
    assert not (tmp_path / "archives.png").exists()
