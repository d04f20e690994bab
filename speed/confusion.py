"""Confusion matrix of a batch of label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.labels import LABEL_TYPE
from pipeline.scoring.confusion import ConfusionMatrix
from speed.harness import Bench, Pair
from speed.inputs import ellipses

NUM_CLASSES = 21
OBJECTS = 5
SHIFT = 8
RIGHT = 0.7
VOID = 0.05


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


def _label_maps(rng: np.random.Generator, side: int) -> tuple[NDArray[np.int64], ...]:
    """Targets and predictions (8, H, W): objects, found a little aside, some as another class."""
    targets, predictions = np.zeros((2, 8, side, side), np.int64)
    for image in range(8):
        for mask in ellipses(image, OBJECTS, (side, side)):
            label, other = rng.integers(1, NUM_CLASSES, 2)
            targets[image][mask] = label
            found = np.roll(mask, rng.integers(-SHIFT, SHIFT + 1, 2), axis=(0, 1))
            predictions[image][found] = label if rng.random() < RIGHT else other
    targets[:, : int(VOID * side)] = -1
    return targets, predictions


def _prepare(_: Path, quick: bool) -> Pair:
    targets, predictions = _label_maps(np.random.default_rng(0), 32 if quick else 384)
    # What each side is handed: torch's argmax there, label maps of int16 here.
    our_targets, our_predictions = targets.astype(LABEL_TYPE), predictions.astype(LABEL_TYPE)

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
        title=f"confusion matrix: 8 x 384 x 384 pixels, {NUM_CLASSES} classes, {OBJECTS} objects",
        target=5.0,
        stretch=6.0,
        prepare=_prepare,
    )
]
