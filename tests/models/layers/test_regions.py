"""Names of whole regions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.models.layers.regions import majority_of_regions


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
