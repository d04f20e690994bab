"""Augmentation of whole images, beside a plain reading of mmsegmentation's transforms."""

from __future__ import annotations

import colorsys
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.formats.labels import IGNORE_INDEX, LABEL_TYPE, UNLABELLED
from pipeline.training.augmentation import (
    PADDING,
    augment,
    change_hsv,
    distort,
    largest_share,
    resized_shape,
)
from pipeline.training.settings import Augmentation

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406]) * 255
PLAIN: dict[str, Any] = {
    "crop_size": 32,
    "base_size": None,
    "scale_range": [1.0, 1.0],
    "flip": 0.0,
    "photometric": 0.0,
}


def settings(**changes: Any) -> Augmentation:
    return Augmentation(**PLAIN | changes)


def ramps(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """An image whose red is its label, left to right 1 to `width`, and whose green is the row."""
    labels = np.tile(np.arange(1, width + 1, dtype=LABEL_TYPE), (height, 1))
    rows = np.tile(np.arange(height, dtype=np.uint8)[:, None], (1, width))
    pixels = np.stack([labels.astype(np.uint8), rows, np.full_like(rows, 7)], axis=-1)
    return Image.fromarray(pixels), labels


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "base_size", "factor", "expected"),
    [
        ((375, 500), [2048, 512], 1.0, (512, 683)),  # 500 * 512 / 375 = 682.67
        ((500, 375), [2048, 512], 1.0, (683, 512)),
        ((333, 500), [2048, 512], 0.5, (256, 384)),  # 384.38
        ((100, 1000), [2048, 512], 1.0, (205, 2048)),  # the long side decides; 204.8
        ((375, 500), [520, 520], 1.0, (390, 520)),
        ((480, 640), [520, 520], 0.999, (389, 519)),  # 519.48 is cut to 519; 389.25
        ((3, 2), [5, 5], 1.0, (5, 3)),  # 3.33
        ((4, 2), [5, 5], 1.0, (5, 3)),  # 2.5 goes up
        ((375, 500), None, 1.5, (562, 749)),  # 562.5 is cut to 562; 749.33
        ((1, 1), [2048, 512], 1.3, (665, 665)),
        ((1, 1), None, 0.5, (1, 1)),
        ((1, 200), [20, 10], 1.0, (1, 20)),
    ],
)
def test_sizes_are_rounded_half_up(
    shape: tuple[int, int],
    base_size: list[int] | None,
    factor: float,
    expected: tuple[int, int],
) -> None:
    assert resized_shape(shape, base_size, factor) == expected


@pytest.mark.parametrize(("height", "width"), [(20, 9), (9, 20), (1, 1), (32, 7), (33, 31)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_small_image_is_padded_at_the_right_and_bottom(
    height: int, width: int, flip: float
) -> None:
    image, labels = ramps(height, width)
    pixels, seen = augment(image, labels, settings(flip=flip), random.Random(0))
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert (seen.shape, seen.dtype) == ((32, 32), LABEL_TYPE)
    rows, columns = min(height, 32), min(width, 32)
    shown = labels[:rows, ::-1] if flip else labels[:rows]
    assert (seen[:rows, :columns] == shown[:, :columns]).all()
    assert (pixels[:rows, :columns, 0] == seen[:rows, :columns]).all()
    outside = np.ones((32, 32), dtype=bool)
    outside[:rows, :columns] = False
    assert (seen[outside] == IGNORE_INDEX).all()
    assert (pixels[outside] == PADDING).all()


def test_padding_is_within_half_a_level_of_imagenets_mean() -> None:
    assert np.abs(PADDING - IMAGENET_MEAN).max() < 0.5


def test_padding_keeps_its_colour_where_colours_change() -> None:
    image, labels = ramps(5, 5)
    changed = settings(photometric=1.0, brightness=200.0)
    for seed in range(5):
        pixels, _ = augment(image, labels, changed, random.Random(seed))
        assert (pixels[5:] == PADDING).all()
        assert (pixels[:5, 5:] == PADDING).all()


def test_crops_are_anywhere_and_labels_go_with_their_pixels() -> None:
    image, labels = ramps(40, 36)
    places = set()
    for seed in range(900):
        pixels, seen = augment(image, labels, settings(flip=0.5), random.Random(seed))
        assert (pixels[..., 0] == seen).all()
        step = int(seen[0, 1]) - int(seen[0, 0])
        assert (np.diff(seen, axis=1) == step).all()
        places.add((int(pixels[0, 0, 1]), int(seen[0].min()), step))
    assert places == set(product(range(9), range(1, 6), (-1, 1)))


def test_a_resized_part_is_that_of_the_whole_image_resized() -> None:
    image = Image.fromarray(noise(24, 31)).resize((62, 48), Image.Resampling.BICUBIC)
    labels = np.random.default_rng(1).integers(1, 9, (48, 62)).astype(LABEL_TYPE)
    changes: dict[str, Any] = {"base_size": [155, 120], "scale_range": [0.6, 0.6], "flip": 0.0}
    whole, whole_labels = augment(
        image, labels, settings(crop_size=120, **changes), random.Random(0)
    )
    assert (whole_labels != IGNORE_INDEX).sum() == 72 * 93
    small = np.asarray(image.resize((93, 72), Image.Resampling.BILINEAR))
    assert (whole[:72, :93] == small).all()
    for seed in range(20):
        part, part_labels = augment(
            image, labels, settings(crop_size=30, **changes), random.Random(seed)
        )
        found = [
            (top, left)
            for top, left in product(range(43), range(64))
            if (whole_labels[top : top + 30, left : left + 30] == part_labels).all()
        ]
        assert len(found) == 1
        top, left = found[0]
        difference = part.astype(int) - whole[top : top + 30, left : left + 30]
        assert np.abs(difference).max() <= 2


def shares_of_crops(labels: np.ndarray, num: int = 300, **changes: Any) -> list[float]:
    image = Image.new("RGB", labels.shape[::-1])
    changes = {"crop_size": 10} | changes
    return [
        largest_share(augment(image, labels, settings(**changes), random.Random(seed))[1])
        for seed in range(num)
    ]


def test_crops_of_almost_one_label_are_redrawn() -> None:
    labels = np.ones((10, 40), dtype=LABEL_TYPE)
    labels[:, 30:] = 2  # 31 places, of which 5 have a share of at most 0.75
    shares = shares_of_crops(labels)
    assert 0.7 < np.mean(np.array(shares) <= 0.75) < 0.95  # 1 - (26/31)^11 = 0.86
    drawn_once = np.mean(np.array(shares_of_crops(labels, max_share=1.0)) <= 0.75)
    assert 0.05 < drawn_once < 0.3  # 5/31


def test_the_share_is_at_most_the_given_one() -> None:
    labels = np.ones((10, 12), dtype=LABEL_TYPE)
    labels[:, 9:] = 2  # shares of 0.9, 0.8 and 0.7
    assert shares_of_crops(labels, 60, max_share=0.7).count(0.7) >= 55
    assert set(shares_of_crops(labels, 60, max_share=0.69)) == {0.9, 0.8, 0.7}


@pytest.mark.parametrize("label", [3, 0, UNLABELLED, IGNORE_INDEX])
def test_redraws_end_where_one_label_covers_everything(label: int) -> None:
    labels = np.full((30, 40), label, dtype=LABEL_TYPE)
    assert set(shares_of_crops(labels, 5)) == {1.0}
    labels[-1, -1] = 1 if label != 1 else 2
    assert max(shares_of_crops(labels, 5)) == 1.0


def test_void_does_not_count_and_unlabelled_does() -> None:
    assert largest_share(np.array([[1, 1, 1, 2], [IGNORE_INDEX] * 4], LABEL_TYPE)) == 0.75
    assert largest_share(np.array([[UNLABELLED] * 3, [1, 2, 3]], LABEL_TYPE)) == 0.5
    assert largest_share(np.array([[0, 0, 0, 1]], LABEL_TYPE)) == 0.75


def test_labels_are_looked_at_as_they_are_resized() -> None:
    labels = np.ones((10, 11), dtype=LABEL_TYPE)
    labels[:, 8:] = 2
    shown = shares_of_crops(labels, 40, crop_size=20, scale_range=[2.0, 2.0])
    assert set(shown) <= {0.8, 0.75, 0.7}  # of 22 columns, 16 of them ones
    assert shown.count(0.8) < 3


def plain_distort(pixels: np.ndarray, offset: float, gain: float) -> np.ndarray:
    def convert(values: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
        return np.clip(values.astype(np.float64) * alpha + beta, 0, 255).astype(np.uint8)

    pixels = convert(pixels, beta=offset)
    return convert(pixels, alpha=gain)


def plain_hsv(pixels: np.ndarray, saturation: float, turn: int) -> np.ndarray:
    changed = np.empty_like(pixels)
    for place in np.ndindex(pixels.shape[:2]):
        hue, strength, value = colorsys.rgb_to_hsv(*(pixels[place] / 255.0))
        rgb = colorsys.hsv_to_rgb((hue + turn / 180) % 1.0, min(strength * saturation, 1.0), value)
        changed[place] = np.rint(np.array(rgb) * 255.0)
    return changed


@pytest.mark.parametrize("saturation", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("turn", [-90, -18, -1, 0, 7, 17])
def test_hue_and_saturation_are_those_of_hsv(saturation: float, turn: int) -> None:
    pixels = noise(12, 15)
    pixels[0] = [[value, value, value] for value in range(0, 255, 17)]  # greys have no hue
    pixels[1, :6] = np.array([*product((0, 255), repeat=3)])[1:7]
    pixels[2, :3] = [[200, 200, 10], [10, 200, 200], [200, 10, 200]]  # of two largest values
    difference = change_hsv(pixels, saturation=saturation, turn=turn).astype(int)
    difference -= plain_hsv(pixels, saturation, turn)
    assert np.abs(difference).max() <= 1


def hsv_of_float32(pixels: np.ndarray, saturation: float, turn: int) -> np.ndarray:
    """The formula with every value in float32, and its modulo."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32), -1, 0)
    value = pixels.max(axis=-1).astype(np.float32)
    chroma = value - pixels.min(axis=-1)
    divisor = np.maximum(chroma, 1.0)
    hue = np.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor)
    hue = np.where(value == red, (green - blue) / divisor, hue)
    hue = np.mod(hue + np.float32(turn / 30), np.float32(6.0))
    chroma = np.minimum(np.float32(saturation) * chroma, value)
    shares = (np.abs(hue - 3.0) - 1.0, 2.0 - np.abs(hue - 2.0), 2.0 - np.abs(hue - 4.0))
    changed = [np.rint(value - chroma * (1.0 - np.clip(share, 0.0, 1.0))) for share in shares]
    return np.stack(changed, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("saturation", [0.0, 0.73, 1.0, 1.37])
@pytest.mark.parametrize("turn", [-90, -18, 0, 1, 17, 90])
def test_hue_and_saturation_keep_their_bytes(saturation: float, turn: int) -> None:
    few = np.array([*product(range(0, 256, 15), repeat=3)], np.uint8).reshape(18, -1, 3)
    for pixels in (few, few[:, ::-1], noise(40, 30), noise(1, 1), noise(0, 3)):
        changed = change_hsv(pixels, saturation=saturation, turn=turn)
        assert (changed == hsv_of_float32(pixels, saturation, turn)).all()


def test_brightness_and_contrast_are_cut_to_whole_levels_as_published() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)  # greys have no hue
    changed = settings(photometric=1.0, saturation=[1.0, 1.0], hue=0)
    for seed in range(20):
        mirror = random.Random(seed)
        mirror.random()
        offset = mirror.uniform(-32.0, 32.0)
        mirror.random()
        mirror.random()
        gain = mirror.uniform(0.5, 1.5)
        expected = plain_distort(pixels, offset, gain)
        assert (distort(pixels, changed, random.Random(seed)) == expected).all()


def test_contrast_comes_before_or_after_saturation_with_equal_chance() -> None:
    """A factor of 2 cuts a channel off at 255, and how much colour is left tells the order."""
    pixels = np.full((1, 1, 3), [200, 100, 100], np.uint8)
    changed = settings(
        photometric=1.0, brightness=0.0, contrast=[2.0, 2.0], saturation=[0.5, 0.5], hue=0
    )
    results = [
        tuple(distort(pixels, changed, random.Random(seed))[0, 0].tolist()) for seed in range(400)
    ]
    # Before: (255, 200, 200) to half of its saturation; after: (200, 150, 150) twice.
    assert set(results) == {(255, 228, 228), (255, 255, 255)}
    assert 0.4 < results.count((255, 255, 255)) / 400 < 0.6


def test_each_change_of_colours_has_its_chance() -> None:
    pixels = np.full((1, 1, 3), [150, 100, 100], np.uint8)
    plain: dict[str, Any] = {
        "brightness": 0.0,
        "contrast": [1.0, 1.0],
        "saturation": [1.0, 1.0],
        "hue": 0,
    }
    for changes in (
        {"brightness": 32.0},
        {"contrast": [0.5, 0.9]},
        {"saturation": [0.5, 0.9]},
        {"hue": 18},
    ):
        one = settings(photometric=0.5, **plain | changes)
        changed = [
            (distort(pixels, one, random.Random(seed)) != pixels).any() for seed in range(400)
        ]
        assert 0.4 < np.mean(changed) < 0.6
    assert (distort(pixels, settings(photometric=0.0), random.Random(0)) == pixels).all()


def test_the_hue_turns_by_whole_units_as_published() -> None:
    """numpy's randint(-18, 18): from -18 to 17."""
    pixels = np.full((1, 1, 3), [255, 0, 0], np.uint8)
    one = settings(
        photometric=1.0, brightness=0.0, contrast=[1.0, 1.0], saturation=[1.0, 1.0], hue=18
    )
    seen = {tuple(distort(pixels, one, random.Random(seed))[0, 0]) for seed in range(1500)}
    assert seen == {
        tuple(change_hsv(pixels, saturation=1.0, turn=turn)[0, 0]) for turn in range(-18, 18)
    }


def test_the_same_draws_give_the_same_bytes() -> None:
    image, labels = Image.fromarray(noise(50, 70)), np.zeros((50, 70), LABEL_TYPE)
    labels[:, :30] = 4
    first = [
        augment(image, labels, Augmentation(crop_size=40), random.Random(s)) for s in (1, 1, 2)
    ]
    assert (first[0][0] == first[1][0]).all()
    assert (first[0][1] == first[1][1]).all()
    assert (first[0][0] != first[2][0]).any()


def test_the_image_and_its_labels_stay_as_they_are() -> None:
    image, labels = ramps(20, 20)
    before = np.array(image), labels.copy()
    augment(image, labels, settings(photometric=1.0), random.Random(0))
    assert (np.array(image) == before[0]).all()
    assert (labels == before[1]).all()


def test_labels_of_another_size_are_refused() -> None:
    image, labels = ramps(20, 20)
    with pytest.raises(ValueError, match=r"image \(20, 20\) and labels \(19, 20\) differ"):
        augment(image, labels[1:], settings(), random.Random(0))


def test_the_defaults_are_the_published_numbers() -> None:
    assert Augmentation().model_dump() == {
        "crop_size": 512,
        "base_size": [2048, 512],
        "scale_range": [0.5, 2.0],
        "max_share": 0.75,
        "flip": 0.5,
        "photometric": 0.5,
        "brightness": 32.0,
        "contrast": [0.5, 1.5],
        "saturation": [0.5, 1.5],
        "hue": 18,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": 0},
        {"base_size": [512]},
        {"base_size": [0, 512]},
        {"scale_range": [2.0, 0.5]},
        {"scale_range": [0.0, 0.5]},
        {"max_share": 1.5},
        {"hue": 91},
        {"brightness": -1.0},
        {"contrast": [1.5, 0.5]},
        {"saturation": [-0.5, 1.5]},
    ],
)
def test_settings_out_of_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**changes)
