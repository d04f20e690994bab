from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.labels import IGNORE_INDEX
from pipeline.training.copy_paste import (
    Canvas,
    Cutout,
    copy_paste,
    cut_out,
    make_canvas,
    object_box,
)
from pipeline.training.transforms import (
    Box,
    ColourChange,
    Sample,
    View,
    bounding_box,
    draw_colour_change,
    draw_view,
)


class RecordedRandom(random.Random):
    """Python's generator, remembering every integer it gave."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls: list[list[int]] = []

    def randint(self, a: int, b: int) -> int:
        value = super().randint(a, b)
        self.calls.append([a, b, value])
        return value


def canvas(semantic: np.ndarray, *, colour: int = 0, num_instances: int = 1) -> Canvas:
    image = np.full((*semantic.shape, 3), colour, dtype=np.uint8)
    instances = (semantic > 0).astype(np.int16)
    return Canvas(image, semantic.astype(np.int16), instances, num_instances)


def cutout(semantic: np.ndarray, *, colour: int = 0, whole: bool = False) -> Cutout | None:
    box = object_box(semantic, keep_last_row_column=whole)
    if box is None:
        return None
    return Cutout(np.full((*box.shape, 3), colour, dtype=np.uint8), semantic[box.slices])


def photo(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_it_is(height: int, width: int) -> View:
    return View(height, width, crop=Box(0, 0, height, width), mirrored=False)


def square(
    label_id: int, *, size: int = 12, top: int = 2, left: int = 3, side: int = 4
) -> np.ndarray:
    semantic = np.zeros((size, size), dtype=np.int16)
    semantic[top : top + side, left : left + side] = label_id
    return semantic


def test_last_row_and_column_are_kept_on_request() -> None:
    assert object_box(square(5)) == Box(2, 3, 5, 6)
    assert object_box(square(5), keep_last_row_column=True) == Box(2, 3, 6, 7)
    assert object_box(square(0)) is None
    assert object_box(square(-1)) is None


def test_object_as_large_as_the_canvas_covers_it() -> None:
    full = cutout(np.full((12, 12), 2), colour=7, whole=True)
    image, semantic, masks = copy_paste(canvas(square(1)), [full], random.Random(1))
    assert (image == 7).all()
    assert (semantic == 2).all()
    assert masks.sum((1, 2)).tolist() == [0, 144]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_one_pixel_thin_objects_vanish_but_draw(shape: tuple[int, int]) -> None:
    semantic = np.zeros((12, 12), dtype=np.int16)
    semantic[4 : 4 + shape[0], 4 : 4 + shape[1]] = 3
    rng = RecordedRandom(0)
    _, pasted, masks = copy_paste(canvas(np.zeros((12, 12))), [cutout(semantic)], rng)
    assert [call[:2] for call in rng.calls] == [[0, 13 - shape[0]], [0, 13 - shape[1]]]
    assert not pasted.any()
    assert not masks.any()


def test_nothing_pastes_and_draws_nothing() -> None:
    rng = RecordedRandom(0)
    image, semantic, masks = copy_paste(canvas(square(4), colour=3), [None], rng)
    assert rng.calls == []
    assert (image == 3).all()
    np.testing.assert_array_equal(semantic, square(4))
    assert masks.shape == (2, 12, 12)
    assert not masks[1].any()


def test_later_objects_cover_earlier_ones_and_keep_what_is_around_them() -> None:
    ring = np.full((12, 12), 2, dtype=np.int16)
    ring[3:9, 3:9] = 0
    cutouts = [cutout(ring, colour=5, whole=True), cutout(square(3, side=12, top=0, left=0))]
    image, semantic, masks = copy_paste(canvas(square(1), colour=1), cutouts[:1], random.Random(0))
    np.testing.assert_array_equal(masks[1], ring == 2)
    np.testing.assert_array_equal(image[..., 1], np.where(ring == 2, 5, 1))
    np.testing.assert_array_equal(semantic, np.where(ring == 2, 2, square(1)))
    _, _, masks = copy_paste(canvas(square(1)), cutouts, random.Random(0))
    assert masks[2].sum() == 121
    assert not (masks[2] & masks[:2].any(0)).any()


def test_instances_are_numbered_after_those_of_the_canvas() -> None:
    ids = np.zeros((12, 12), dtype=np.int16)
    ids[0:2, 0:2], ids[10:, 10:] = 1, 2
    semantic = (ids > 0) * np.int16(6)
    below = Canvas(np.zeros((12, 12, 3), np.uint8), semantic, ids, num_instances=2)
    pasted = cutout(square(7, side=3), colour=1, whole=True)
    _, _, masks = copy_paste(below, [pasted], random.Random(3))
    assert masks.shape == (3, 12, 12)
    assert masks[2].sum() == 9
    assert (masks.sum(0) <= 1).all()


def test_more_instances_than_a_byte_counts() -> None:
    dots = [cutout(square(1, side=1), whole=True)] * 300
    masks = copy_paste(canvas(square(1)), dots, random.Random(0))[2]
    assert masks.shape == (301, 12, 12)
    assert masks[-1].sum() == 1
    assert (masks.sum(0) <= 1).all()


def test_canvas_without_instances_and_inputs_untouched() -> None:
    below = canvas(np.zeros((12, 12)), num_instances=0)
    image, semantic, masks = copy_paste(below, [cutout(square(7), colour=200)], random.Random(3))
    assert masks.shape == (1, 12, 12)
    np.testing.assert_array_equal(image[..., 0] == 200, masks[0])
    np.testing.assert_array_equal(semantic == 7, masks[0])
    assert not below.image.any()
    assert not below.semantic.any()
    assert not below.instances.any()
    alone = copy_paste(below, [], random.Random(3))[2]
    assert alone.shape == (0, 12, 12)
    assert alone.dtype == bool


def test_canvas_shows_void_and_no_instance_where_it_is_padded() -> None:
    ones = np.ones((4, 6), dtype=np.uint8)
    view = View(4, 6, crop=Box(-4, 0, 4, 8), mirrored=True)
    shown = make_canvas(Sample(photo(4, 6), ones * np.uint8(200), ones), view, ColourChange())
    assert shown.image.shape == (8, 8, 3)
    assert shown.semantic.dtype == np.int16
    expected = np.full((8, 8), IGNORE_INDEX)
    expected[4:, :6] = 200
    np.testing.assert_array_equal(shown.semantic, expected)
    np.testing.assert_array_equal(shown.instances, expected == 200)


@pytest.mark.parametrize("shape", [(40, 64), (64, 30), (9, 7), (1, 1)])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("is_occupied_known", [False, True])
def test_a_cutout_is_cut_out_of_what_a_canvas_would_show(
    shape: tuple[int, int], whole: bool, is_occupied_known: bool
) -> None:
    rng = random.Random(0)
    ids = np.random.default_rng(3).integers(0, 4, [(length + 7) // 8 for length in shape])
    ids = ids.repeat(8, axis=0).repeat(8, axis=1)[: shape[0], : shape[1]]
    semantic = np.random.default_rng(3).choice([-1, 0, 4, 9], shape)
    occupied = None
    if is_occupied_known:
        ids[: shape[0] // 4], ids[:, shape[1] // 2 + 1 :] = 0, 0
        occupied = bounding_box(ids > 0)
    sample = Sample(photo(*shape), semantic, ids, num_instances=3, occupied=occupied)
    num_objects = 0
    for _ in range(60):
        view = draw_view(*shape, scale_range=(0.1, 2.0), crop_size=24, flip=0.5, rng=rng)
        change = draw_colour_change(jitter=0.5, greyscale=0.2, blur=0.6, rng=rng)
        shown = make_canvas(sample, view, change)
        instance = rng.randint(1, 3)
        expected = np.where(shown.instances == instance, shown.semantic, 0)
        box = object_box(expected, keep_last_row_column=whole)
        cut = cut_out(sample, view, change, instance=instance, keep_last_row_column=whole)
        assert (cut is None) == (box is None)
        if cut is not None and box is not None:
            num_objects += 1
            np.testing.assert_array_equal(cut.semantic, expected[box.slices])
            # Rounding, spread by the three factors of the jitter, each up to 1.8.
            spread = 2 * 1.8**3 if change.jitter else 2
            pixels, expected_pixels = (a.astype(int) for a in (cut.image, shown.image[box.slices]))
            np.testing.assert_allclose(pixels, expected_pixels, rtol=0, atol=spread)
    assert num_objects > 9


@pytest.mark.parametrize("occupied", [None, Box(2, 2, 20, 20)])
def test_an_object_out_of_sight_or_void_is_nothing(occupied: Box | None) -> None:
    ids = np.zeros((20, 20), dtype=np.uint8)
    ids[15:, 15:], ids[2:6, 2:9] = 1, 2
    semantic = np.where(ids == 2, -1, ids * np.int16(5))
    sample = Sample(photo(20, 20), semantic, ids, num_instances=2, occupied=occupied)
    corner = View(20, 20, crop=Box(0, 0, 12, 12), mirrored=False)
    assert cut_out(sample, corner, ColourChange(), instance=1) is None
    nothing_there = replace(sample, occupied=Box(15, 15, 20, 20))
    assert cut_out(nothing_there, corner, ColourChange(), instance=1) is None
    assert cut_out(sample, as_it_is(20, 20), ColourChange(), instance=2) is None
    cut = cut_out(sample, as_it_is(20, 20), ColourChange(), instance=1)
    assert cut is not None
    assert cut.semantic.tolist() == [[5] * 4] * 4
