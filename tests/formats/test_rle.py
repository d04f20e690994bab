"""Run-length codes against pycocotools."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.formats.rle import (
    coco_annotation,
    decode_mask,
    encode_crop,
    encode_mask,
    intersect,
    mask_area,
    mask_box_xywh,
)


def block(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((40, 60), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_codes_survive_json_and_give_mask_area_and_box() -> None:
    mask = block(3, 5, 10, 20)
    mask[4, 6] = False
    rle = json.loads(json.dumps(encode_mask(mask)))
    assert rle["size"] == [40, 60]
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)
    np.testing.assert_array_equal(decode_mask(rle), mask)
    assert decode_mask(rle).dtype == bool
    assert mask_area(rle) == 199
    assert mask_box_xywh(rle) == [5.0, 3.0, 20.0, 10.0]


def test_an_empty_mask_has_no_area() -> None:
    rle = encode_mask(np.zeros((2, 3), bool))
    assert mask_area(rle) == 0
    assert mask_box_xywh(rle) == [0.0] * 4
    assert not decode_mask(rle).any()


def test_intersection_is_that_of_the_pixels(rng: np.random.Generator) -> None:
    first, second = rng.random((2, 13, 7)) < 0.5
    shared = intersect(encode_mask(first), encode_mask(second))
    assert shared == encode_mask(first & second)


def test_an_annotation_is_cocos() -> None:
    annotation = coco_annotation(
        encode_mask(block(0, 0, 2, 3)), annotation_id=4, image_id=7, category_id=2, crowd=True
    )
    assert annotation["area"] == 6
    assert (annotation["id"], annotation["image_id"], annotation["category_id"]) == (4, 7, 2)
    assert annotation["iscrowd"] == 1
    assert "score" not in annotation


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 13, 7), (0, 2, 13, 3), (4, 0, 1, 1), (12, 6, 1, 1), (0, 6, 5, 1), (6, 1, 7, 6)],
)
def test_a_crop_has_the_code_of_its_whole_mask(
    rng: np.random.Generator, top: int, left: int, height: int, width: int
) -> None:
    """Runs that go on from the bottom of a column to the top of the next one included."""
    for share in (0.0, 0.3, 0.9, 1.0):
        mask = np.zeros((13, 7), dtype=bool)
        crop = rng.random((height, width)) < share
        mask[top : top + height, left : left + width] = crop
        box = (left, top, left + width - 1, top + height - 1)
        assert encode_crop(crop, box, (13, 7)) == encode_mask(mask)
