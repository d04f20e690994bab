"""Pictures: the right colour at the right place, at a size that can be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.labels import IGNORE_INDEX
from pipeline.pictures import overlays as viz

NAMES = ["cat", "dog"]


@dataclass
class Drawn:
    label_id: int
    score: float
    mask: np.ndarray
    bbox_xyxy: tuple[int, int, int, int]


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def quadrants(values: list[int]) -> np.ndarray:
    """96 x 96 map with one value a quadrant, row by row."""
    return np.array(values).reshape(2, 2).repeat(48, axis=0).repeat(48, axis=1)


def pixel(picture: Image.Image, row: int, column: int) -> list[int]:
    """Colour of the displayed pixel at the middle of a pixel of a 96-pixel image."""
    return np.asarray(picture)[row * 3 + 1, column * 3 + 1].tolist()


def mixed(colour: tuple[int, ...], alpha: float, base: float = 100) -> list[int]:
    return [round(base * (1 - alpha) + value * alpha) for value in colour]


def test_colours_differ_and_are_never_grey() -> None:
    colours = viz.colour_map(600)
    assert colours.shape == (600, 3)
    assert colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours[:40].tolist()}) == 40
    spread = colours[1:].max(axis=1).astype(int) - colours[1:].min(axis=1)
    assert spread.min() > 50
    assert viz.colour_map(0).shape == (0, 3)


# What is left of linear RGB without red and without green receptors (Machado et al., 2009).
PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)
DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)
TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)


def seen(colours: np.ndarray, vision: np.ndarray) -> np.ndarray:
    """CIELAB (K, 3) of sRGB colours (K, 3) to eyes that `vision` (3, 3) describes."""
    rgb = colours / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ vision.T, 0, 1) @ np.array(TO_XYZ).T / WHITE
    curve = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = curve.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def nearest(colours: np.ndarray, vision: np.ndarray) -> float:
    """The least distance of two colours; 2.3 is just noticeable, side by side."""
    lab = seen(colours, vision)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(distances[np.triu_indices(len(lab), 1)].min())


@pytest.mark.parametrize("vision", [np.eye(3), PROTANOPIA, DEUTERANOPIA])
def test_twelve_categories_are_told_apart_with_any_colour_vision(vision: np.ndarray) -> None:
    colours = viz.colour_map(13)[1:]
    assert nearest(colours, np.array(vision)) > 25
    # Nor are they like void, background, or what lies below them.
    greys = np.repeat(np.arange(0, 256, 15), 3).reshape(-1, 3)
    for grey_or_void in (*greys, np.array(viz.VOID_COLOUR)):
        assert min(nearest(np.stack([colour, grey_or_void]), np.eye(3)) for colour in colours) > 20


def test_red_and_green_are_not_told_apart_by_the_simulated_eyes() -> None:
    red_and_olive = np.array([(163, 0, 0), (114, 108, 0)])
    assert nearest(red_and_olive, np.eye(3)) > 50
    assert nearest(red_and_olive, np.array(DEUTERANOPIA)) < 25


def test_a_label_id_keeps_its_colour_whatever_comes_after_it() -> None:
    few, many = viz.colour_map(4), viz.colour_map(300)
    assert few.tolist() == many[:4].tolist()
    assert viz.colour_map(1).tolist() == [[0, 0, 0]]


def test_semantic_colours_labels_only() -> None:
    labels = quadrants([0, 1, 2, IGNORE_INDEX])
    picture = viz.overlay_semantic(grey(96, 96), labels, viz.colour_map(3))
    assert picture.size == (288, 288)
    assert pixel(picture, 10, 10) == [100, 100, 100]
    assert pixel(picture, 10, 80) == mixed(viz.colour_map(3)[1], 0.55)
    assert pixel(picture, 80, 10) == mixed(viz.colour_map(3)[2], 0.55)
    assert pixel(picture, 80, 80) == mixed(viz.VOID_COLOUR, 0.55)


def test_the_legend_names_what_occurs() -> None:
    image, palette = grey(96, 96), viz.colour_map(3)
    none = viz.overlay_semantic(image, quadrants([0, 0, 0, 0]), palette, names=NAMES)
    one = viz.overlay_semantic(image, quadrants([0, 2, 0, 2]), palette, names=NAMES)
    assert none.size == (288, 288)
    assert one.height > 288
    strip = np.asarray(one)[288:].reshape(-1, 3).tolist()
    assert palette[2].tolist() in strip
    assert palette[1].tolist() not in strip


def test_errors_have_a_colour_each() -> None:
    target = quadrants([1, 1, 0, 2])
    prediction = quadrants([1, 0, 2, 1])
    target[:4, :4] = IGNORE_INDEX
    prediction[90:, :4] = 0
    picture = viz.overlay_errors(grey(96, 96), prediction, target)
    pale = int(100 * (1 - viz.FADED) + 255 * viz.FADED)
    for (row, column), colour in {
        (10, 10): viz.CORRECT,
        (10, 80): viz.MISSED,
        (80, 10): viz.FALSE,
        (80, 80): viz.CONFUSED,
        (1, 1): viz.VOID_COLOUR,
    }.items():
        assert pixel(picture, row, column) == mixed(colour, 0.6, pale)
    assert pixel(picture, 93, 1) == [pale] * 3
    assert picture.height > 288


def test_instances_are_outlined_and_the_best_lies_on_top() -> None:
    best, other = np.zeros((96, 96), bool), np.zeros((96, 96), bool)
    best[30:60, 30:60], other[30:90, 30:90] = True, True
    drawn = [Drawn(2, 0.9, best, (30, 30, 59, 59)), Drawn(1, 0.5, other, (30, 30, 89, 89))]
    picture = viz.overlay_instances(grey(96, 96), drawn, names=NAMES)
    first, second = (tuple(colour) for colour in viz.colour_map(3)[1:].tolist())
    assert pixel(picture, 10, 10) == [100, 100, 100]
    assert pixel(picture, 50, 50) == mixed(first, 0.5)
    assert pixel(picture, 75, 75) == mixed(second, 0.5)
    assert np.asarray(picture)[59 * 3 + 2, 50 * 3].tolist() == list(first)
    assert np.asarray(picture)[89 * 3 + 2, 50 * 3].tolist() == list(second)
    assert [255, 255, 255] in np.asarray(picture)[85:110].reshape(-1, 3).tolist()


def test_no_instance_is_the_image_alone() -> None:
    picture = viz.overlay_instances(grey(96, 96), [], names=NAMES)
    assert np.array_equal(np.asarray(picture), np.asarray(viz.displayed(grey(96, 96))))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((96, 96), (288, 288)),
        ((1, 1), (288, 288)),
        ((2, 5), (288, 720)),
        ((300, 400), (300, 400)),
        ((3200, 100), (1600, 50)),
        ((1, 900), (1, 900)),
    ],
)
def test_pictures_have_a_size_to_look_at(size: tuple[int, int], shown: tuple[int, int]) -> None:
    labels = np.ones(size, dtype=int)
    mask = Drawn(1, 0.5, labels > 0, (0, 0, size[1] - 1, size[0] - 1))
    for picture in (
        viz.displayed(grey(*size)),
        viz.overlay_semantic(grey(*size), labels, viz.colour_map(2)),
        viz.overlay_instances(grey(*size), [mask], names=NAMES),
    ):
        assert picture.size == shown[::-1]


def test_a_grid_keeps_every_picture() -> None:
    colours = ["red", "lime", "blue"]
    sizes = [(4, 4), (2, 6), (3, 3)]
    pictures = [Image.new("RGB", *item) for item in zip(sizes, colours, strict=True)]
    result = np.asarray(viz.grid(pictures, columns=2)).reshape(-1, 3).tolist()
    assert [result.count(colour) for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255])] == [
        16,
        12,
        9,
    ]


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\): expected the image's \(3, 2\)"):
        viz.overlay_semantic(grey(3, 2), np.zeros((2, 3), int), viz.colour_map(2))


def test_context_is_black() -> None:
    labels, palette = quadrants([0, 1, 2, IGNORE_INDEX]), viz.colour_map(3)
    picture = viz.overlay_semantic(grey(96, 96), labels, palette, names=NAMES, context=[1])
    assert pixel(picture, 10, 80) == [0, 0, 0]
    assert pixel(picture, 80, 10) == mixed(palette[2], 0.55)
    assert pixel(picture, 10, 10) == [100, 100, 100]
    strip = np.asarray(picture)[288:].reshape(-1, 3).tolist()
    assert [0, 0, 0] in strip
    assert viz.colour_map(3).tolist() == palette.tolist()

    drawn = [
        Drawn(1, 0.9, labels == 1, (48, 0, 95, 47)),
        Drawn(2, 0.8, labels == 2, (0, 48, 47, 95)),
    ]
    objects = viz.overlay_instances(grey(96, 96), drawn, names=NAMES, context=[1])
    assert pixel(objects, 30, 70) == mixed((0, 0, 0), 0.5)
    assert pixel(objects, 80, 30) == mixed(palette[2], 0.5)
