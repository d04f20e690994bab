from __future__ import annotations

import colorsys
import random

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.training.transforms import (
    BLUR_SIGMA,
    Box,
    ColourChange,
    View,
    bounding_box,
    draw_colour_change,
    draw_view,
    pad_box,
    view_image,
    view_mask,
)

SIZES = [(64, 48), (32, 32), (20, 60), (60, 20), (150, 9), (7, 9), (1, 1)]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_it_is(height: int, width: int) -> View:
    return View(height, width, crop=Box(0, 0, height, width), mirrored=False)


def drawn_view(
    height: int, width: int, rng: random.Random, *, size: int = 32, flip: float = 0.5
) -> View:
    return draw_view(height, width, scale_range=(0.3, 1.7), crop_size=size, flip=flip, rng=rng)


def drawn_box(view: View, rng: random.Random) -> Box:
    """A box of the crop that has some of the image, often up to the crop's edge, or no pixel."""
    crop, seen = view.crop, view.visible
    top, left = rng.randrange(seen.top, seen.bottom), rng.randrange(seen.left, seen.right)
    return Box(
        rng.choice((crop.top, top)),
        rng.choice((crop.left, left)),
        rng.choice((crop.bottom, top + 1, top)),
        rng.choice((crop.right, left + 1)),
    )


def jittered(image: Image.Image, seed: int) -> np.ndarray:
    change = draw_colour_change(jitter=1.0, greyscale=0.0, blur=0.0, rng=random.Random(seed))
    view = as_it_is(image.height, image.width)
    return view_image(image, view, change, view.crop)


def plain_crop(image: Image.Image, view: View) -> np.ndarray:
    """The whole crop, pixel by pixel: resized, mirrored, padded with the image's mean."""
    mean = np.asarray(image).reshape(-1, 3).mean(axis=0)
    resized = np.asarray(image.resize((view.width, view.height), Image.Resampling.BILINEAR))
    crop = np.empty((*view.crop.shape, 3), dtype=np.uint8)
    for row, column in np.ndindex(*view.crop.shape):
        y, x = row + view.crop.top, column + view.crop.left
        if 0 <= y < view.height and 0 <= x < view.width:
            crop[row, column] = resized[y, view.width - 1 - x if view.mirrored else x]
        else:
            crop[row, column] = mean
    return crop


def assert_same_but_for_rounding(
    pixels: np.ndarray, expected: np.ndarray, *, spread: float = 1.0
) -> None:
    """Rows are resized first or columns, by what is less work, and both passes round."""
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max(initial=0) <= 2 * spread
    assert difference.sum() <= difference.size


def plain_colours(crop: np.ndarray, change: ColourChange) -> np.ndarray:
    """Greyscale and blur of the whole crop, the latter as in the published code for 384 pixels."""
    image = Image.fromarray(crop)
    if change.greyscale:
        image = image.convert("L").convert("RGB")
    pixels = np.asarray(image)
    return cv2.GaussianBlur(pixels, (39, 39), change.blur_sigma) if change.blur_sigma else pixels


def test_scale_rounds_down_and_stops_at_one_pixel() -> None:
    view = draw_view(33, 5, scale_range=(0.1, 0.1), crop_size=3, flip=0.0, rng=random.Random(0))
    assert (view.height, view.width) == (3, 1)
    assert view_mask(np.ones((33, 5), np.int16), view, view.visible).shape == (3, 1)


def test_scale_draws_from_its_range() -> None:
    rng = random.Random(0)
    heights = [
        draw_view(100, 8, scale_range=(0.5, 1.5), crop_size=8, flip=0.0, rng=rng).height
        for _ in range(60)
    ]
    assert 50 <= min(heights) < 65
    assert 135 < max(heights) <= 150


def test_crop_reaches_both_ends() -> None:
    rng = random.Random(0)
    views = [
        draw_view(34, 32, scale_range=(1.0, 1.0), crop_size=32, flip=0.0, rng=rng)
        for _ in range(40)
    ]
    assert {view.crop.top for view in views} == {0, 1, 2}
    assert {view.crop.left for view in views} == {0}


def test_padding_is_at_one_end_of_a_side() -> None:
    rng = random.Random(0)
    corners = set()
    for _ in range(40):
        view = draw_view(8, 8, scale_range=(1.0, 1.0), crop_size=16, flip=0.5, rng=rng)
        assert view.visible == view.whole
        corners.add((view.crop.top, view.crop.left))
    assert corners == {(0, 0), (0, -8), (-8, 0), (-8, -8)}


@pytest.mark.parametrize(("probability", "expected"), [(0.0, {False}), (1.0, {True})])
def test_flip_has_its_probability(probability: float, expected: set[bool]) -> None:
    rng = random.Random(0)
    views = [drawn_view(20, 30, rng, flip=probability) for _ in range(20)]
    assert {view.mirrored for view in views} == expected


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_is_resized_mirrored_cropped_and_padded_with_its_mean(
    height: int, width: int
) -> None:
    rng = random.Random(5)
    for _ in range(8):
        view = drawn_view(height, width, rng)
        image = photo(height, width)
        pixels = view_image(image, view, ColourChange(), view.crop)
        assert_same_but_for_rounding(pixels, plain_crop(image, view))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_follow_the_image(height: int, width: int) -> None:
    """Doubled blocks of one colour: nearest neighbours of the mask have the colour of the image."""
    codes = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    image = Image.fromarray(np.stack([codes] * 3, axis=-1))
    for mirrored in (False, True):
        view = View(height, width, Box(0, 0, height, width), mirrored)
        pixels = view_image(image, view, ColourChange(), view.crop)
        np.testing.assert_array_equal(view_mask(codes, view, view.crop), pixels[..., 0])
    large = View(2 * height, 2 * width, Box(0, 0, 2 * height, 2 * width), mirrored=False)
    doubled = codes.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(view_mask(codes, large, large.crop), doubled)
    part = Box(height // 2, width // 2, 2 * height, 2 * width)
    np.testing.assert_array_equal(view_mask(codes, large, part), doubled[part.slices])


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.77, 1.0, 1.6, 2.0])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (300, 200)])
def test_blur_is_that_of_opencv_but_for_rounding(height: int, width: int, sigma: float) -> None:
    image, view = photo(height, width), as_it_is(height, width)
    pixels = view_image(image, view, ColourChange(blur_sigma=sigma), view.crop)
    expected = cv2.GaussianBlur(np.asarray(image), (39, 39), sigma)
    # OpenCV rounds the weights to 8 bits, which noise shows most.
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("sigma", [0.0, *BLUR_SIGMA, 1.4, 1.5])
@pytest.mark.parametrize("greyscale", [False, True])
def test_boxes_are_greyed_and_blurred_as_the_whole_crop_is(sigma: float, greyscale: bool) -> None:
    rng = random.Random(1)
    change = ColourChange(greyscale=greyscale, blur_sigma=sigma)
    for height, width in SIZES * 4:
        view, image = drawn_view(height, width, rng), photo(height, width)
        expected = plain_colours(plain_crop(image, view), change)
        whole = view_image(image, view, change, view.crop)
        assert_same_but_for_rounding(whole, expected)
        box = drawn_box(view, rng)
        part = view_image(image, view, change, box)
        assert part.dtype == np.uint8
        assert_same_but_for_rounding(part, expected[box.seen_from(view.crop).slices])


def test_boxes_are_jittered_as_the_whole_crop_is() -> None:
    rng = random.Random(2)
    for seed, (height, width) in enumerate(SIZES * 4):
        view, image = drawn_view(height, width, rng), photo(height, width)
        change = draw_colour_change(jitter=1.0, greyscale=0.2, blur=0.5, rng=random.Random(seed))
        whole = view_image(image, view, change, view.crop)
        for _ in range(4):
            box = drawn_box(view, rng)
            part = view_image(image, view, change, box)
            expected = whole[box.seen_from(view.crop).slices]
            # Brightness, contrast and saturation spread differences, each by up to 1.8.
            assert_same_but_for_rounding(part, expected, spread=1.8**3)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_contrast_is_about_the_mean_of_the_padded_crop(height: int, width: int) -> None:
    image, view = photo(height, width), drawn_view(height, width, random.Random(4))
    mean = plain_crop(image, view).reshape(-1, 3).mean(axis=0).astype(np.uint8)
    level = round(float(mean @ [0.299, 0.587, 0.114]))
    flat = view_image(image, view, ColourChange(jitter=(("contrast", 0.0),)), view.crop)
    assert np.abs(flat.astype(int) - level).max() <= 1
    assert len(np.unique(flat)) == 1


def test_mean_of_a_large_white_image_does_not_overflow() -> None:
    white = Image.new("RGB", (700, 700), (255, 255, 255))
    view = View(700, 700, Box(-20, 0, 680, 700), mirrored=False)
    change = ColourChange(jitter=(("contrast", 0.5),))
    assert (view_image(white, view, change, Box(-20, 0, 5, 5)) == 255).all()


def test_colour_change_depends_on_the_generator_only_and_leaves_its_input_alone() -> None:
    image = photo(24, 17)
    before = np.array(image)
    first, again, other = (jittered(image, seed) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == before.shape
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != before).any()
    np.testing.assert_array_equal(np.array(image), before)


def test_colour_changes_have_their_probabilities() -> None:
    rng = random.Random(0)
    nothing = [draw_colour_change(jitter=0.0, greyscale=0.0, blur=0.0, rng=rng) for _ in range(20)]
    assert set(nothing) == {ColourChange()}
    everything = [
        draw_colour_change(jitter=1.0, greyscale=1.0, blur=1.0, rng=rng) for _ in range(99)
    ]
    orders = {tuple(name for name, _ in change.jitter) for change in everything}
    assert len(orders) == 24
    assert {frozenset(order) for order in orders} == {
        frozenset({"brightness", "contrast", "saturation", "hue"})
    }
    assert all(change.greyscale for change in everything)
    sigmas = [change.blur_sigma for change in everything]
    assert 0.1 <= min(sigmas) < 0.3
    assert 1.8 < max(sigmas) <= 2.0


def test_colour_jitter_turns_hues_by_about_a_fifth_at_most() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2], pixels[2:] = (150, 90, 90), (90, 130, 130)
    image = Image.fromarray(pixels)
    hues = []
    for seed in range(200):
        hue, saturation, value = colorsys.rgb_to_hsv(*(jittered(image, seed)[0, 0] / 255.0))
        if saturation > 0.1 and 0.1 < value < 0.95:
            hues.append((hue + 0.5) % 1 - 0.5)
    assert len(hues) > 100
    assert -0.26 < min(hues) < -0.12
    assert 0.12 < max(hues) < 0.26


def test_colour_jitter_leaves_greys_grey_and_spreads_their_brightness() -> None:
    image = Image.new("RGB", (5, 6), (100, 100, 100))
    changed = [jittered(image, seed) for seed in range(60)]
    levels = [int(array[0, 0, 1]) for array in changed]
    assert all(np.ptp(array) <= 1 for array in changed)
    assert 18 <= min(levels) < 40
    assert 160 < max(levels) <= 182


def test_bounding_box() -> None:
    inside = np.zeros((5, 7), dtype=bool)
    assert bounding_box(inside) is None
    inside[1, 6] = inside[3, 2] = True
    assert bounding_box(inside) == Box(top=1, left=2, bottom=4, right=7)
    assert bounding_box(inside[:2, 6:]) == Box(1, 0, 2, 1)


def test_pad_box_fills_what_is_beyond_the_array() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert pad_box(array, Box(0, 1, 2, 3), 9).tolist() == [[1, 2], [4, 5]]
    padded = pad_box(array, Box(-1, 2, 2, 5), 9)
    assert padded.dtype == np.int16
    assert padded.tolist() == [[9, 9, 9], [2, 9, 9], [5, 9, 9]]
