from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest

from pipeline.data.labels import IGNORE_INDEX
from pipeline.data.transforms import (
    Sample,
    mean_colour,
    random_blur,
    random_colour_jitter,
    random_crop,
    random_flip,
    random_greyscale,
    random_scale,
)


def coded_sample(height: int, width: int) -> Sample:
    """Blocks of 4 x 4 pixels whose colour, label id and instance id agree."""
    rows, columns = np.mgrid[:height, :width] // 4
    code = (rows * 7 + columns) % 50
    image = np.stack([code * 5, code, 255 - code], axis=-1).astype(np.uint8)
    return Sample(image, (code + 300).astype(np.int16), (code + 1).astype(np.int16), 50)


def assert_agree(sample: Sample) -> None:
    code = sample.instances.astype(int) - 1
    inside = code >= 0
    np.testing.assert_array_equal(sample.semantic[inside], code[inside] + 300)
    assert (sample.semantic[~inside] == IGNORE_INDEX).all()
    np.testing.assert_array_equal(sample.image[inside][:, 1], code[inside])


def test_scale_keeps_image_and_masks_aligned() -> None:
    scaled = random_scale(coded_sample(40, 24), (2.0, 2.0), random.Random(0))
    assert scaled.image.shape == (80, 48, 3)
    assert scaled.image.dtype == np.uint8
    assert scaled.semantic.dtype == np.int16
    centre = scaled.semantic[4::8, 4::8]
    np.testing.assert_array_equal(centre, coded_sample(40, 24).semantic[2::4, 2::4])
    np.testing.assert_array_equal(scaled.image[4::8, 4::8, 1].astype(int) + 300, centre)


def test_scale_rounds_down_and_stops_at_one_pixel() -> None:
    small = random_scale(coded_sample(33, 5), (0.1, 0.1), random.Random(0))
    assert small.image.shape == (3, 1, 3)
    assert small.semantic.shape == small.instances.shape == (3, 1)


def test_scale_draws_from_its_range() -> None:
    rng = random.Random(0)
    heights = [
        random_scale(coded_sample(100, 8), (0.5, 1.5), rng).image.shape[0] for _ in range(60)
    ]
    assert min(heights) >= 50
    assert max(heights) <= 150
    assert min(heights) < 65
    assert max(heights) > 135


@pytest.mark.parametrize(
    ("height", "width"), [(64, 48), (32, 32), (20, 60), (60, 20), (7, 9), (1, 1)]
)
def test_crop_has_its_size_and_stays_aligned(height: int, width: int) -> None:
    rng = random.Random(5)
    for _ in range(8):
        cropped = random_crop(coded_sample(height, width), 32, rng)
        assert cropped.image.shape == (32, 32, 3)
        assert cropped.semantic.shape == cropped.instances.shape == (32, 32)
        assert_agree(cropped)
        inside = cropped.instances > 0
        assert inside.sum() == min(height, 32) * min(width, 32)


def test_crop_pads_with_the_mean_colour_at_every_corner() -> None:
    sample = coded_sample(8, 8)
    rng = random.Random(0)
    corners = set()
    for _ in range(40):
        cropped = random_crop(sample, 16, rng)
        padding = cropped.instances == 0
        assert (cropped.image[padding] == mean_colour(sample.image)).all()
        corners.add(tuple(np.argwhere(~padding)[0].tolist()))
    assert corners == {(0, 0), (0, 8), (8, 0), (8, 8)}


def test_crop_reaches_both_ends() -> None:
    image = np.zeros((34, 32, 3), dtype=np.uint8)
    rows = np.repeat(np.arange(34, dtype=np.int16)[:, None], 32, axis=1)
    rng = random.Random(0)
    crops = [random_crop(Sample(image, rows, rows), 32, rng) for _ in range(40)]
    assert {int(crop.semantic[0, 0]) for crop in crops} == {0, 1, 2}
    assert {int(crop.semantic[-1, 0]) for crop in crops} == {31, 32, 33}


def test_flip_mirrors_everything() -> None:
    sample = coded_sample(12, 20)
    flipped = random_flip(sample, 1.0, random.Random(0))
    np.testing.assert_array_equal(flipped.image[:, 0], sample.image[:, -1])
    assert_agree(flipped)
    assert random_flip(sample, 0.0, random.Random(0)) is sample


def test_colour_jitter_is_uint8_changes_colours_and_depends_on_the_generator_only() -> None:
    image = coded_sample(24, 17).image
    first, again, other = (random_colour_jitter(image, 1.0, random.Random(s)) for s in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != image).any()
    assert random_colour_jitter(image, 0.0, random.Random(1)) is image


def test_colour_jitter_turns_hues_by_about_a_fifth_at_most() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2], image[2:] = (150, 90, 90), (90, 130, 130)
    hues = []
    for seed in range(200):
        jittered = random_colour_jitter(image, 1.0, random.Random(seed))
        hue, saturation, value = colorsys.rgb_to_hsv(*(jittered[0, 0] / 255.0))
        if saturation > 0.1 and 0.1 < value < 0.95:
            hues.append((hue + 0.5) % 1 - 0.5)
    assert len(hues) > 100
    assert -0.26 < min(hues) < -0.12
    assert 0.12 < max(hues) < 0.26


def test_colour_jitter_leaves_greys_grey_and_spreads_their_brightness() -> None:
    image = np.full((6, 5, 3), 100, dtype=np.uint8)
    jittered = [random_colour_jitter(image, 1.0, random.Random(seed)) for seed in range(60)]
    levels = [int(array[0, 0, 1]) for array in jittered]
    assert all(np.ptp(array) <= 1 for array in jittered)
    assert 18 <= min(levels) < 40
    assert 160 < max(levels) <= 182


def test_greyscale_and_blur() -> None:
    image = coded_sample(24, 17).image
    grey = random_greyscale(image, 1.0, random.Random(0))
    assert (grey == grey[..., :1]).all()
    assert grey.shape == image.shape
    blurred = random_blur(image, 1.0, random.Random(0))
    steps = [np.abs(np.diff(array.astype(int), axis=1)).max() for array in (image, blurred)]
    assert blurred.shape == image.shape
    assert steps[1] < steps[0]
    assert random_greyscale(image, 0.0, random.Random(0)) is image
    assert random_blur(image, 0.0, random.Random(0)) is image


def test_mean_colour_of_a_large_image_does_not_overflow() -> None:
    assert mean_colour(np.full((700, 700, 3), 255, dtype=np.uint8)).tolist() == [255, 255, 255]
