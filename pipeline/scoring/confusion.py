"""Scores of semantic masks from one confusion matrix over a whole benchmark."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Size of an object: the largest share of the image that it may cover, in percent.
SIZES = {"s": 5, "ms": 25, "ml": 50, "l": 100}
BLOCK = 1 << 18  # pixels whose comparison stays in the processor's cache
WORST_PAIRS = 10
MOST_RUNS = 0.2  # of the pixels: with more, single pixels are counted faster


@dataclass(frozen=True)
class SemanticScores:
    """Scores in [0, 1]; NaN where nothing was there to score.

    Attributes:
        miou: mean of `iou` over the classes that occur in target or prediction.
        pixel_acc: share of true pixels that are right.
        mean_acc: mean recall over the classes that occur in the target.
        iou: (K,) intersection over union of each class; NaN for a class that never occurs.
    """

    miou: float
    pixel_acc: float
    mean_acc: float
    iou: NDArray[np.float64]


class ConfusionMatrix:
    """Counts of pixels by target (row) and prediction (column).

    >>> matrix = ConfusionMatrix(2)
    >>> matrix.update(target=np.array([0, 1, 1]), prediction=np.array([0, 1, 0]))
    >>> matrix.compute().miou
    0.5
    """

    def __init__(self, num_classes: int) -> None:
        """Start from nothing; `num_classes` counts the background as well."""
        self.num_classes = num_classes
        self.counts: NDArray[np.int64] = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, *, target: NDArray[np.integer], prediction: NDArray[np.integer]) -> None:
        """Add the pixels of one or more images.

        Args:
            target: integers of any shape; values outside [0, K) (void) are left out.
            prediction: integers of the same shape, in [0, K) wherever the target counts.

        Raises:
            ValueError: the shapes differ, or a counted prediction is out of range.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"target {target.shape} and prediction {prediction.shape} differ")
        rows, columns, lengths = _runs(target.ravel(), prediction.ravel())
        counted = (rows >= 0) & (rows < self.num_classes)
        if not counted.all():
            rows, columns = rows[counted], columns[counted]
            lengths = None if lengths is None else lengths[counted]
        if columns.size and not 0 <= columns.min() <= columns.max() < self.num_classes:
            raise ValueError(
                f"predictions from {columns.min()} to {columns.max()}: expected 0 to "
                f"{self.num_classes - 1}"
            )
        cells = rows * np.intp(self.num_classes) + columns
        counts = np.bincount(cells, lengths, minlength=self.num_classes**2)
        self.counts += counts.astype(np.int64).reshape(self.counts.shape)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix over the same classes."""
        self.counts += other.counts

    def compute(self, label_ids: Collection[int] | None = None) -> SemanticScores:
        """Scores of everything added so far.

        Args:
            label_ids: the classes whose IoU and recall are averaged and whose true pixels are
                counted; None for all. What is predicted on them is compared with all classes.
        """
        part = slice(None) if label_ids is None else sorted(label_ids)
        diagonal = np.diag(self.counts).astype(np.float64)
        in_target = self.counts.sum(axis=1)
        total = in_target[part].sum()
        iou = _ratio(diagonal, in_target + self.counts.sum(axis=0) - diagonal)
        return SemanticScores(
            miou=mean_known(iou[part]),
            pixel_acc=float(diagonal[part].sum() / total) if total else float("nan"),
            mean_acc=mean_known(_ratio(diagonal, in_target)[part]),
            iou=iou,
        )


class SizeIou:
    """Mean IoU by the size of what is to be found, as ImageNet-S reports it.

    A class is of one size in an image: that of the smallest share of `SIZES` which its pixels do
    not exceed. IoU at a size looks only at the pixels of classes of that size and of background, so
    what was painted over objects of another size does not count. As in the official evaluator
    (LUSSeg/ImageNet-S, evaluation/metric.py, to which data/data.py hands no void pixel) shares are
    of the scored pixels, the background is one of the classes, and the mean is over the classes
    with such pixels.
    """

    def __init__(self, num_classes: int) -> None:
        """Start from nothing; `num_classes` counts the background as well."""
        # Intersection, target and prediction, by size and class.
        self._counts = np.zeros((len(SIZES), 3, num_classes), dtype=np.int64)

    def update(self, *, target: NDArray[np.integer], prediction: NDArray[np.integer]) -> None:
        """Add the pixels of one image; see `ConfusionMatrix.update`."""
        num_classes = self._counts.shape[-1]
        scored = (target >= 0) & (target < num_classes)
        target, prediction = target[scored].astype(np.int64), prediction[scored].astype(np.int64)
        areas = np.bincount(target, minlength=num_classes)
        bounds = np.array(list(SIZES.values()))
        # 100 area <= percent total, in integers: exact at the bounds.
        sizes = np.searchsorted(bounds * target.size, 100 * areas, side="left")
        for size, counts in enumerate(self._counts):
            members = (sizes == size) & (areas > 0)
            members[0] = False
            if not members.any():
                continue
            members[0] = True
            counted = members[target]
            truth, found = target[counted], prediction[counted]
            for row, labels in zip(counts, (truth[truth == found], truth, found), strict=True):
                row += np.bincount(labels, minlength=num_classes)

    def merge(self, other: SizeIou) -> None:
        """Add the counts of another one over the same classes."""
        self._counts += other._counts

    def compute(self) -> dict[str, float]:
        """Size -> mean IoU in [0, 1]; NaN where no class has that size."""
        scores = {}
        for size, (shared, in_target, predicted) in zip(SIZES, self._counts, strict=True):
            iou = _ratio(shared, in_target + predicted - shared)
            scores[size] = mean_known(iou[in_target > 0])
        return scores


def _runs(
    target: NDArray[np.integer], prediction: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer] | None]:
    """Target, prediction and length of each run of equal pixels; no lengths for single pixels.

    Label maps consist of patches, so there are many times fewer runs than pixels to be counted.
    """
    starts = np.concatenate([np.zeros(min(1, target.size), np.intp), *_changes(target, prediction)])
    if len(starts) > target.size * MOST_RUNS:
        return target, prediction, None
    return target[starts], prediction[starts], np.diff(starts, append=target.size)


def _changes(
    target: NDArray[np.integer], prediction: NDArray[np.integer]
) -> Iterator[NDArray[np.intp]]:
    """Pixels that differ from the one before, a block at a time that fits the cache."""
    for start in range(1, target.size, BLOCK):
        stop = min(start + BLOCK, target.size)
        changed = target[start:stop] != target[start - 1 : stop - 1]
        changed |= prediction[start:stop] != prediction[start - 1 : stop - 1]
        yield np.flatnonzero(changed) + start


def shares(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Row-normalised counts (K, K): of the pixels of a true class, the share of each prediction.

    NaN in the row of a class without a pixel.
    """
    return _ratio(counts, np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape))


def worst_pairs(
    counts: NDArray[np.integer], num_pairs: int = WORST_PAIRS
) -> list[tuple[int, int, float]]:
    """True class, wrong prediction and share of the largest shares off the diagonal.

    Args:
        counts: (K, K) pixels by target (row) and prediction (column).
        num_pairs: how many at most; what never happened is no pair.

    Returns:
        Worst first; of equal shares that of more pixels, then in the order of the matrix.
    """
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    rows, columns = np.nonzero(wrong)
    pixels, share = wrong[rows, columns], shares(counts)[rows, columns]
    worst = np.lexsort((-pixels, -share))[:num_pairs]
    return [(int(rows[i]), int(columns[i]), float(share[i])) for i in worst]


def mean_known(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def harmonic_mean(first: float, second: float) -> float:
    """2 a b / (a + b), 0 if both are 0; NaN if one is."""
    total = first + second
    return 2 * first * second / total if total else 0.0


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Quotient, NaN where the denominator is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result
