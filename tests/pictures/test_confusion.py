"""Picture of a confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.confusion import (
    DARKEST,
    NO_PIXEL,
    PAPER,
    UNSEEN,
    describe_pairs,
    draw_confusion,
)

NAMES = ["background", "cat", "dog", "bird"]


def pixels_of(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2) rows and columns of the pixels of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(axis=2))


def test_cells_have_the_colour_of_their_share_with_unseen_classes_last() -> None:
    counts = np.diag([5, 7, 9, 0])
    counts[1, 1], counts[1, 3] = 0, 7
    plain, boxed = draw_confusion(counts, NAMES), draw_confusion(counts, NAMES, {1})
    # Of the legend, one square is as dark as a cell; of its kind, the cells are the larger ones.
    cell = 28**2
    for picture in (plain, boxed):
        assert 3 * cell - 200 < len(pixels_of(picture, DARKEST)) - 130 < 3 * cell + 200
        assert len(pixels_of(picture, NO_PIXEL)) > 3 * cell
    assert not len(pixels_of(plain, UNSEEN))
    rows, columns = pixels_of(boxed, UNSEEN).max(axis=0)
    dark = pixels_of(boxed, DARKEST)
    in_row = dark[(dark[:, 0] < rows) & (dark[:, 0] > rows - 28)]
    # The unseen cat is taken for the bird, now third of four.
    assert columns - 56 < in_row[:, 1].min() <= in_row[:, 1].max() < columns - 27


def test_pairs_in_words() -> None:
    counts = np.array([[90, 10, 0, 0], [1, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    assert describe_pairs(counts, NAMES) == [
        "cat taken for background: 50.0 %",
        "background taken for cat: 10.0 %",
    ]


@pytest.mark.parametrize("num_classes", [1, 2, 21, 171, 400, 3000])
def test_a_picture_of_any_number_of_classes_can_be_looked_at(num_classes: int) -> None:
    counts = np.eye(num_classes, dtype=np.int64)
    names = [f"{number} {'long ' * 20}" for number in range(num_classes)]
    unseen = set(range(0, num_classes, 7))
    picture = draw_confusion(counts, names, unseen)
    assert 200 < picture.height < 4000
    assert 200 < picture.width < 4000
    assert len(pixels_of(picture, UNSEEN))
    same = draw_confusion(counts, names, unseen)
    assert picture.tobytes() == same.tobytes()


def test_without_any_pixel_nothing_is_dark() -> None:
    picture = draw_confusion(np.zeros((4, 4), np.int64), NAMES)
    assert len(pixels_of(picture, NO_PIXEL)) > 3 * 28**2
    assert len(pixels_of(picture, DARKEST)) < 200
    assert len(pixels_of(picture, PAPER))
