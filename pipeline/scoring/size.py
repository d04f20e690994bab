"""Scores of label maps by the size of the objects (ImageNet-S; ZUTIS, Table 5)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.predictions import StoredPrediction
from pipeline.scoring.confusion import SizeIou
from pipeline.scoring.task import ScoringTask, Truth


class SizeScorer:
    """mIoU of small, medium-small, medium-large and large objects, see `SizeIou`."""

    def __init__(self, task: ScoringTask) -> None:
        self._num_classes = task.num_categories + 1
        self._sizes = SizeIou(self._num_classes)

    def measure(self, truth: Truth, prediction: StoredPrediction) -> SizeIou:
        sizes = SizeIou(self._num_classes)
        sizes.update(target=truth.semantic, prediction=prediction.labels)
        return sizes

    def add(self, part: SizeIou) -> None:
        self._sizes.merge(part)

    def compute(self) -> dict[str, float]:
        return {f"miou_{size}": miou for size, miou in self._sizes.compute().items()}

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        return {}
