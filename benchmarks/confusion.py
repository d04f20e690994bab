"""Confusion matrix of a batch of label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Bench, Pair
from pipeline.metrics.semantic import ConfusionMatrix

NUM_CLASSES = 21
VOID_SHARE = 0.05
RIGHT_SHARE = 0.7


def published_confusion(
    targets: NDArray[np.int64], predictions: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Image by image: valid pixels, one bin for each pair of labels, summed as floats."""
    matrix = np.zeros((num_classes, num_classes))
    for target, prediction in zip(targets, predictions, strict=True):
        target, prediction = target.flatten(), prediction.flatten()
        valid = (target >= 0) & (target < num_classes)
        pairs = num_classes * target[valid].astype(int) + prediction[valid]
        matrix += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return matrix


def _prepare(_: Path, quick: bool) -> Pair:
    side = 32 if quick else 384
    rng = np.random.default_rng(0)
    # Labels come in patches of 16 x 16 pixels.
    coarse = rng.integers(0, NUM_CLASSES, (8, side // 16, side // 16))
    targets = coarse.repeat(16, axis=1).repeat(16, axis=2)
    wrong = rng.random(targets.shape) > RIGHT_SHARE
    predictions = np.where(wrong, rng.integers(0, NUM_CLASSES, targets.shape), targets)
    targets[rng.random(targets.shape) < VOID_SHARE] = -1
    # What each side is handed: torch's argmax there, label maps of int32 here.
    our_targets, our_predictions = targets.astype(np.int32), predictions.astype(np.int32)

    def ours() -> NDArray[np.int64]:
        matrix = ConfusionMatrix(NUM_CLASSES)
        matrix.update(target=our_targets, prediction=our_predictions)
        return matrix.counts

    def check(published: NDArray[np.float64], ours: NDArray[np.int64]) -> str:
        assert np.array_equal(published, ours), "other counts"
        return "same counts"

    return Pair(lambda: published_confusion(targets, predictions, NUM_CLASSES), ours, check)


BENCHES = [
    Bench(
        name="confusion",
        title=f"confusion matrix: 8 x 384 x 384 pixels, {NUM_CLASSES} classes",
        target=5.0,
        stretch=6.0,
        prepare=_prepare,
    )
]
