"""The report's pictures: painted labels, thumbnails, data URIs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.report import (
    category_colour,
    enlarge_image,
    fit_image,
    paint_labels,
    picture,
)


def test_painted_labels_tell_background_category_and_ignored_apart() -> None:
    image = np.full((2, 9, 3), (200, 100, 0), dtype=np.uint8)
    labels = np.array([[0, 0, 0, 1, 1, 1, -1, -1, -1]] * 2)
    painted = paint_labels(image, labels).astype(int)
    assert painted.shape == image.shape
    background, category, ignored = painted[:, :3], painted[:, 3:6], painted[:, 6:]
    assert (background == background[..., :1]).all()
    assert background.min() > 150
    red = int(category_colour(1)[1:3], 16)
    assert (category[..., 0] > category[..., 1]).all()
    assert abs(category[0, 0, 0] - (0.25 * 100 + 0.75 * red)) <= 1
    assert set(np.unique(ignored)) == {70, 245}


def test_painting_labels_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        paint_labels(np.zeros((2, 2, 3), dtype=np.uint8), np.zeros((2, 3), dtype=int))


@pytest.mark.parametrize(
    ("size", "fitted"), [((200, 100), (50, 25)), ((1, 400), (1, 50)), ((20, 10), (20, 10))]
)
def test_fit_image_bounds_the_long_side(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_image(Image.new("RGB", size), 50).size == fitted


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((96, 96), (288, 288)), ((100, 30), (200, 60)), ((1, 1), (288, 288)), ((200, 9), (200, 9))],
)
def test_enlarge_image_repeats_pixels_a_whole_number_of_times(
    size: tuple[int, int], enlarged: tuple[int, int]
) -> None:
    pixels = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    result = enlarge_image(Image.fromarray(pixels), 288)
    assert result.size == enlarged
    factor = enlarged[0] // size[0]
    assert (np.asarray(result) == pixels.repeat(factor, axis=0).repeat(factor, axis=1)).all()


@pytest.fixture
def noise(rng: np.random.Generator) -> Callable[[int], Image.Image]:
    def make(side: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return make


def test_picture_lowers_quality_until_it_fits(noise: Callable[[int], Image.Image]) -> None:
    image = noise(96)
    best = picture(image, alt="noise", max_bytes=100_000)
    small = picture(image, alt="noise", max_bytes=5_000)
    assert len(str(small["uri"])) <= 5_000 * 4 / 3 + 40 < len(str(best["uri"]))
    assert (small["width"], small["height"], small["alt"]) == (96, 96, "noise")
