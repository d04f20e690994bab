"""All scores of a benchmark: over all images, over groups of them, and by class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks import Example
from pipeline.formats.predictions import StoredPrediction
from pipeline.scoring.instance import InstanceScorer
from pipeline.scoring.semantic import SemanticPart, SemanticScorer
from pipeline.scoring.size import SizeScorer
from pipeline.scoring.task import Scorer, ScoringTask, Truth

# By the names of `metrics` of a benchmark.
SCORERS: dict[str, Callable[[ScoringTask], Scorer[Any]]] = {
    "semantic": SemanticScorer,
    "instance": InstanceScorer,
    "size": SizeScorer,
}
GROUP_SCORES = ("miou", "ap", "ap50", "baseline_miou")


class ScoreBoard:
    """Running scores over all images and over each group.

    Attributes:
        image_miou: image id -> mIoU, of images that show an object: without one, background alone
            is right. Empty where no semantic masks are scored.
    """

    def __init__(
        self,
        task: ScoringTask,
        *,
        metrics: Sequence[str],
        groups: Mapping[str, Collection[str]],
    ) -> None:
        """Start from nothing.

        Args:
            task: the label ids that count.
            metrics: names of `SCORERS`.
            groups: name -> ids of the images that are scored apart as well.
        """
        self._task = task
        self._members = dict(groups)
        self._whole = _Scorers(task, metrics)
        self._groups = {name: _Scorers(task, metrics) for name in groups}
        self.image_miou: dict[str, float] = {}

    def add(self, example: Example, prediction: StoredPrediction) -> None:
        """Score one image.

        Raises:
            PipelineError: its masks have another size than the image.
        """
        height, width = prediction.labels.shape
        truth = Truth(example, self._task, size=(height, width))
        parts = self._whole.measure(truth, prediction)
        self._whole.add(parts)
        for name, members in self._members.items():
            if example.image_id in members:
                self._groups[name].add(parts)
        semantic = parts.get("semantic")
        if isinstance(semantic, SemanticPart) and (truth.semantic > 0).any():
            self.image_miou[example.image_id] = semantic.network.compute().miou

    def compute(self) -> dict[str, Any]:
        """Metrics as percentages, the main ones of the groups under `groups`."""
        metrics = self._whole.compute()
        if self._groups:
            metrics["groups"] = {
                name: {
                    key: value
                    for key, value in group.compute().items()
                    if key in (*GROUP_SCORES, "n_images")
                }
                for name, group in self._groups.items()
            }
        return metrics

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """Metric -> (1 + K,) scores in [0, 1] by label id, NaN where there was nothing to score."""
        return self._whole.per_class()

    def confusion(self) -> NDArray[np.int64]:
        """(1 + K, 1 + K) pixels by true (row) and predicted (column) label id.

        All 0 where no semantic masks are scored.
        """
        return self._whole.confusion()


class _Scorers:
    """Scorers over one set of images."""

    def __init__(self, task: ScoringTask, metrics: Sequence[str]) -> None:
        self._scorers = {name: SCORERS[name](task) for name in metrics}
        self._num_labels = 1 + task.num_categories
        self._num_images = 0

    def measure(self, truth: Truth, prediction: StoredPrediction) -> dict[str, Any]:
        return {name: scorer.measure(truth, prediction) for name, scorer in self._scorers.items()}

    def add(self, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            self._scorers[name].add(part)
        self._num_images += 1

    def compute(self) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for scorer in self._scorers.values():
            scores |= {name: percent(value) for name, value in scorer.compute().items()}
        return scores | {"n_images": self._num_images}

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        columns: dict[str, NDArray[np.float64]] = {}
        for scorer in self._scorers.values():
            columns |= scorer.per_class()
        return columns

    def confusion(self) -> NDArray[np.int64]:
        scorer = self._scorers.get("semantic")
        if isinstance(scorer, SemanticScorer):
            return scorer.confusion()
        return np.zeros((self._num_labels, self._num_labels), np.int64)


def percent(score: float) -> float:
    """A score in [0, 1] as a percentage with two decimals; NaN stays NaN."""
    return round(100 * float(score), 2)
