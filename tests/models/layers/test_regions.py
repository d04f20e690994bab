"""Names of whole regions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.models.layers.regions import (
    boxes_of_regions,
    majority_of_regions,
    regions_of_one_label,
    shares_of_regions,
)


class TestMajorityOfRegions:
    def vote(self, *rows: list[int]) -> list[list[int]]:
        labels = np.array(rows, dtype=np.int16)
        voted = majority_of_regions(labels)
        assert voted.dtype == labels.dtype
        return voted.tolist()

    def test_a_region_takes_what_most_of_it_has_and_others_keep_theirs(self) -> None:
        assert self.vote([1, 1, 2, 0, 2], [1, 0, 0, 0, 2], [0, 0, 3, 0, 0]) == [
            [1, 1, 1, 0, 2],
            [1, 0, 0, 0, 2],
            [0, 0, 3, 0, 0],
        ]

    def test_half_is_no_majority(self) -> None:
        for row in ([1, 1, 2, 2, 0], [3, 2, 2, 1], [1, 0, 2]):
            assert self.vote(row) == [row]

    def test_corners_do_not_connect(self) -> None:
        assert self.vote([1, 1, 0], [0, 0, 2]) == [[1, 1, 0], [0, 0, 2]]

    @pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (4, 7)])
    def test_background_alone_stays(self, shape: tuple[int, int]) -> None:
        labels = np.zeros(shape, dtype=np.int16)
        np.testing.assert_array_equal(majority_of_regions(labels), labels)


class TestRegionsOfOneLabel:
    def number(self, *rows: list[int], smallest: int = 1) -> list[list[int]]:
        return regions_of_one_label(np.array(rows, dtype=np.int16), smallest).tolist()

    def test_equal_labels_that_touch_by_their_sides(self) -> None:
        assert self.number([2, 2, 0, 1], [1, 2, 0, 0], [1, 0, 2, 2]) == [
            [3, 3, 0, 1],
            [2, 3, 0, 0],
            [2, 0, 4, 4],
        ]

    def test_small_ones_have_no_number(self) -> None:
        assert self.number([2, 2, 0, 1], [1, 2, 0, 0], [1, 0, 2, 2], smallest=2) == [
            [2, 2, 0, 0],
            [1, 2, 0, 0],
            [1, 0, 3, 3],
        ]
        assert self.number([1, 0, 1], smallest=2) == [[0, 0, 0]]

    def test_boxes_and_places_on_the_grid(self) -> None:
        numbers = np.array([[1, 1, 0, 0], [1, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2]])
        np.testing.assert_allclose(
            boxes_of_regions(numbers), [(0, 0, 0.5, 0.5), (0.25, 0.75, 1, 1)]
        )
        np.testing.assert_allclose(
            shares_of_regions(numbers, (2, 2)), [[[1, 0], [0, 0]], [[0, 1 / 3], [0, 2 / 3]]]
        )
        np.testing.assert_allclose(
            shares_of_regions(numbers, (3, 1)), [[[1], [0], [0]], [[1 / 3], [1 / 3], [1 / 3]]]
        )

    def test_none(self) -> None:
        numbers = np.zeros((3, 2), dtype=np.intp)
        assert boxes_of_regions(numbers).shape == (0, 4)
        assert shares_of_regions(numbers, (1, 1)).shape == (0, 1, 1)
