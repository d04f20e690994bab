"""Categories without a pixel."""

from __future__ import annotations

import numpy as np

from pipeline.formats.labels import Predicted


def test_background_and_void_are_no_category_and_one_pixel_is_enough() -> None:
    predicted = Predicted(["cat", "dog", "bus"])
    assert predicted.never() == ["cat", "dog", "bus"]
    predicted.add(np.zeros((3, 5), np.int16))
    labels = np.full((4, 2), -1, np.int16)
    labels[3, 1] = 3
    predicted.add(labels)
    assert predicted.never() == ["cat", "dog"]
    predicted.add(np.array([[1, 2]], np.uint8))
    assert predicted.never() == []
