from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.data.copy_paste import copy_paste
from pipeline.data.transforms import Sample


class RecordedRandom(random.Random):
    """Python's generator, remembering every integer it gave."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls: list[list[int]] = []

    def randint(self, a: int, b: int) -> int:
        value = super().randint(a, b)
        self.calls.append([a, b, value])
        return value


def sample(semantic: np.ndarray, *, colour: int = 0, num_instances: int = 1) -> Sample:
    image = np.full((*semantic.shape, 3), colour, dtype=np.uint8)
    instances = (semantic > 0).astype(np.int16)
    return Sample(image, semantic.astype(np.int16), instances, num_instances)


def square(
    label_id: int, *, size: int = 12, top: int = 2, left: int = 3, side: int = 4
) -> np.ndarray:
    semantic = np.zeros((size, size), dtype=np.int16)
    semantic[top : top + side, left : left + side] = label_id
    return semantic


def test_last_row_and_column_are_kept_on_request() -> None:
    samples = [sample(np.zeros((12, 12))), sample(square(5), colour=9)]
    cut = copy_paste(samples, random.Random(0))[2]
    whole = copy_paste(samples, random.Random(0), keep_last_row_column=True)[2]
    assert cut.sum((1, 2)).tolist() == [0, 9]
    assert whole.sum((1, 2)).tolist() == [0, 16]


def test_object_as_large_as_the_canvas_covers_it() -> None:
    samples = [sample(square(1)), sample(np.full((12, 12), 2), colour=7)]
    image, semantic, masks = copy_paste(samples, random.Random(1), keep_last_row_column=True)
    assert (image == 7).all()
    assert (semantic == 2).all()
    assert masks.sum((1, 2)).tolist() == [0, 144]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_one_pixel_thin_objects_vanish_but_draw(shape: tuple[int, int]) -> None:
    semantic = np.zeros((12, 12), dtype=np.int16)
    semantic[4 : 4 + shape[0], 4 : 4 + shape[1]] = 3
    rng = RecordedRandom(0)
    _, pasted, masks = copy_paste([sample(np.zeros((12, 12))), sample(semantic)], rng)
    assert [call[:2] for call in rng.calls] == [[0, 13 - shape[0]], [0, 13 - shape[1]]]
    assert not pasted.any()
    assert not masks.any()


def test_void_and_empty_samples_paste_and_draw_nothing() -> None:
    void = sample(np.full((12, 12), -1))
    rng = RecordedRandom(0)
    image, semantic, masks = copy_paste([sample(square(4), colour=3), void], rng)
    assert rng.calls == []
    assert (image == 3).all()
    np.testing.assert_array_equal(semantic, square(4))
    assert masks.shape == (2, 12, 12)
    assert not masks[1].any()


def test_instances_are_numbered_over_samples_of_several_objects() -> None:
    canvas_ids = np.zeros((12, 12), dtype=np.int16)
    canvas_ids[0:2, 0:2], canvas_ids[10:, 10:] = 1, 2
    canvas = Sample(np.zeros((12, 12, 3), np.uint8), (canvas_ids > 0) * np.int16(6), canvas_ids, 2)
    pasted = sample(square(7, side=3), colour=1)
    _, _, masks = copy_paste([canvas, pasted], random.Random(3), keep_last_row_column=True)
    assert masks.shape == (3, 12, 12)
    assert masks[2].sum() == 9
    assert (masks.sum(0) <= 1).all()


def test_canvas_without_instances_and_inputs_untouched() -> None:
    canvas = sample(np.zeros((12, 12)), num_instances=0)
    pasted = sample(square(7), colour=200)
    image, semantic, masks = copy_paste([canvas, pasted], random.Random(3))
    assert masks.shape == (1, 12, 12)
    np.testing.assert_array_equal(image[..., 0] == 200, masks[0])
    np.testing.assert_array_equal(semantic == 7, masks[0])
    assert not canvas.image.any()
    assert not canvas.semantic.any()
    alone = copy_paste([canvas], random.Random(3))[2]
    assert alone.shape == (0, 12, 12)
    assert alone.dtype == bool


def test_refuses_no_sample_and_unequal_sizes() -> None:
    with pytest.raises(ValueError, match="at least one"):
        copy_paste([], random.Random(0))
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(12, 12\)"):
        copy_paste([sample(np.zeros((12, 12))), sample(square(1, size=8))], random.Random(0))
