"""Scores of label maps: IoU, accuracy, and IoU apart for seen and unseen categories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.predictions import StoredPrediction
from pipeline.scoring.confusion import ConfusionMatrix, SemanticScores, harmonic_mean
from pipeline.scoring.task import ScoringTask, Truth


@dataclass
class SemanticPart:
    """Confusion matrices of the network and, where there is one, of the baseline."""

    network: ConfusionMatrix
    baseline: ConfusionMatrix | None


class SemanticScorer:
    """One confusion matrix over all images; with a single category also the `iou` of it."""

    def __init__(self, task: ScoringTask) -> None:
        self._task = task
        self._network = self._matrix()
        self._baseline: ConfusionMatrix | None = None

    def measure(self, truth: Truth, prediction: StoredPrediction) -> SemanticPart:
        network, baseline = self._matrix(), None
        network.update(target=truth.semantic, prediction=prediction.labels)
        if prediction.baseline is not None:
            baseline = self._matrix()
            baseline.update(target=truth.semantic, prediction=prediction.baseline)
        return SemanticPart(network, baseline)

    def add(self, part: SemanticPart) -> None:
        self._network.merge(part.network)
        if part.baseline is not None:
            self._baseline = self._baseline or self._matrix()
            self._baseline.merge(part.baseline)

    def compute(self) -> dict[str, float]:
        scores = self._network.compute()
        metrics = {
            "miou": scores.miou,
            "pixel_acc": scores.pixel_acc,
            "mean_acc": scores.mean_acc,
            **self._single(scores),
            **self._seen_and_unseen(),
        }
        if self._baseline is not None:
            baseline = self._baseline.compute()
            for name, value in {"miou": baseline.miou, **self._single(baseline)}.items():
                metrics[f"baseline_{name}"] = value
        return metrics

    def confusion(self) -> NDArray[np.int64]:
        """(1 + K, 1 + K) pixels by true (row) and predicted (column) label id."""
        return self._network.counts

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        unknown = np.full(self._task.num_categories + 1, np.nan)
        baseline = unknown if self._baseline is None else self._baseline.compute().iou
        return {"iou": self._network.compute().iou, "baseline_iou": baseline}

    def _single(self, scores: SemanticScores) -> dict[str, float]:
        return {"iou": float(scores.iou[1])} if self._task.num_categories == 1 else {}

    def _seen_and_unseen(self) -> dict[str, float]:
        if not self._task.unseen:
            return {}
        seen = self._network.compute(self._task.seen)
        unseen = self._network.compute(self._task.unseen)
        return {
            "miou_seen": seen.miou,
            "miou_unseen": unseen.miou,
            "hiou": harmonic_mean(seen.miou, unseen.miou),
            "pixel_acc_seen": seen.pixel_acc,
            "pixel_acc_unseen": unseen.pixel_acc,
            "mean_acc_seen": seen.mean_acc,
            "mean_acc_unseen": unseen.mean_acc,
        }

    def _matrix(self) -> ConfusionMatrix:
        return ConfusionMatrix(self._task.num_categories + 1)
