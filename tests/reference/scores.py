"""The running score of semantic segmentation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from pipeline.scoring.confusion import ConfusionMatrix

from .checks import Parts, Result, close, equal
from .vectors import Vectors

SCORE_BOUND = 1e-12
SCORES = {
    "Pixel Acc": "pixel_acc",
    "Mean Acc": "mean_acc",
    "Mean IoU": "miou",
}


def running_score(vectors: Vectors) -> Parts:
    """Confusion matrix and scores after each update."""
    yield "updates", partial(_updates, vectors)


def _updates(vectors: Vectors) -> Iterator[Result]:
    io, record = vectors.io, vectors.record
    matrix = ConfusionMatrix(record["n_classes"])
    for index, step in enumerate(record["cumulative_scores_after_each_update"]):
        name = f"{vectors.name}/{index}"
        labels, predictions = io[f"labels.{index}"].numpy(), io[f"preds.{index}"].numpy()
        matrix.update(target=labels, prediction=predictions)
        yield equal(f"{vectors.name}/confusion.{index}", matrix.counts, io[f"confusion.{index}"])
        scores = matrix.compute()
        for published, ours in SCORES.items():
            value = getattr(scores, ours)
            label = f"{name}/{published}"
            yield close(label, value, step["scores"][published], bound=SCORE_BOUND)
        weighted = float(np.nansum(matrix.counts.sum(axis=1) * scores.iou) / matrix.counts.sum())
        expected = step["scores"]["FreqW Acc"]
        yield close(f"{name}/FreqW Acc", weighted, expected, bound=SCORE_BOUND)
        iou = _with_nan([step["class_iou"][str(i)] for i in range(record["n_classes"])])
        yield equal(f"{name}/class_iou.absent", np.isnan(scores.iou), np.isnan(iou))
        present = ~np.isnan(iou)
        yield close(f"{name}/class_iou", scores.iou[present], iou[present], bound=SCORE_BOUND)


def _with_nan(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])
