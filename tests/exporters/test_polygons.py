"""Polygons of masks: pycocotools makes the same pixels of them, holes and parts included."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy import ndimage

from pipeline.exporters.polygons import Polygon, one_polygon, parts, polygons
from tests.exporters.hard_masks import drawn, hard_masks

MASKS = hard_masks()


def filled(found: list[Polygon], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels that pycocotools gives some polygons."""
    lists = [polygon.ravel().tolist() for polygon in found]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(lists, *shape))).astype(bool)


def area(polygon: Polygon) -> float:
    """Area, positive where the corners go clockwise as seen."""
    x, y = polygon.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


@pytest.mark.parametrize("name", MASKS)
def test_polygons_are_the_same_pixels(name: str) -> None:
    mask = MASKS[name]
    np.testing.assert_array_equal(filled(polygons(mask), mask.shape), mask)
    np.testing.assert_array_equal(filled([one_polygon(mask)], mask.shape), mask)


@pytest.mark.parametrize("name", MASKS)
def test_parts_and_holes_are_found(name: str) -> None:
    mask = MASKS[name]
    found = parts(mask)
    assert len(found) == ndimage.label(mask)[1]
    outside = ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))[1]
    assert sum(len(part.holes) for part in found) == outside - 1
    assert all(area(part.outline) > 0 for part in found)
    assert all(area(hole) < 0 for part in found for hole in part.holes)
    whole = sum(area(part.outline) + sum(map(area, part.holes)) for part in found)
    assert whole == mask.sum()


def test_a_rectangle_has_four_corners() -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 3:9] = True
    assert polygons(mask)[0].tolist() == [[3, 2], [9, 2], [9, 5], [3, 5]]


def test_a_hole_belongs_to_the_part_around_it() -> None:
    outer, inner = parts(drawn("#####\n#...#\n#.#.#\n#...#\n#####"))
    assert len(outer.holes) == 1
    assert inner.holes == []
    assert area(inner.outline) == 1


def test_an_empty_mask_has_no_polygon() -> None:
    empty = np.zeros((3, 4), bool)
    assert polygons(empty) == []
    assert one_polygon(empty).shape == (0, 2)
