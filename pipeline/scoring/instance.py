"""Scores of instance masks: COCO's average precision and recall, with and without categories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.predictions import StoredPrediction
from pipeline.formats.rle import Rle, RleObject, encode_mask, intersect, mask_area
from pipeline.scoring.average_precision import MaskAP, Matches, PrecisionRecall, match_objects
from pipeline.scoring.task import ScoringTask, Truth


@dataclass(frozen=True)
class InstancePart:
    """Matches within categories, and regardless of them; of the baseline if it has objects."""

    aware: Matches
    agnostic: Matches
    baseline: InstancePart | None = None


class InstanceScorer:
    """Mask AP and AR.

    Void pixels are cut out of targets and predictions alike before they are compared; what has no
    pixel left is not counted, neither as found, nor as missed, nor as wrong. The AP of a baseline's
    objects, where there are any, stand beside those of the network as `baseline_ap` and so on.
    """

    def __init__(self, task: ScoringTask) -> None:
        self._task = task
        self._network = _Sums(task)
        self._baseline: _Sums | None = None

    def measure(self, truth: Truth, prediction: StoredPrediction) -> InstancePart:
        targets = [
            RleObject(
                target.label_id, encode_mask(target.mask), crowd=target.crowd, area=target.area
            )
            for target in truth.instances
        ]
        scored = encode_mask(~truth.void) if truth.void.any() else None
        targets = _cut(targets, scored)
        below = prediction.baseline_objects
        return _match(
            targets,
            _cut(prediction.objects or [], scored),
            baseline=None if below is None else _match(targets, _cut(below, scored)),
        )

    def add(self, part: InstancePart) -> None:
        self._network.add(part)
        if part.baseline is not None:
            self._baseline = self._baseline or _Sums(self._task)
            self._baseline.add(part.baseline)

    def compute(self) -> dict[str, float]:
        metrics = self._network.compute()
        if self._baseline is not None:
            baseline = self._baseline.compute().items()
            metrics |= {f"baseline_{key}": value for key, value in baseline if key[:2] == "ap"}
        return metrics

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        return {"ap": np.concatenate([[np.nan], self._network.category_ap()])}


class _Sums:
    """Precision and recall of the objects of one predictor."""

    def __init__(self, task: ScoringTask) -> None:
        self._task = task
        self._aware = MaskAP(task.num_categories)
        self._agnostic = MaskAP(1)

    def add(self, part: InstancePart) -> None:
        self._aware.add(part.aware)
        self._agnostic.add(part.agnostic)

    def category_ap(self) -> NDArray[np.float64]:
        return self._aware.compute().category_ap()

    def compute(self) -> dict[str, float]:
        aware, agnostic = self._aware.compute(), self._agnostic.compute()
        return {
            **_aps(aware),
            **{f"ap_{area[0]}": aware.ap(area=area) for area in ("small", "medium", "large")},
            **_ars(aware),
            **{f"{name}_agnostic": value for name, value in _aps(agnostic).items()},
            **{f"{name}_agnostic": value for name, value in _ars(agnostic).items()},
            **self._seen_and_unseen(aware),
        }

    def _seen_and_unseen(self, scores: PrecisionRecall) -> dict[str, float]:
        """AP of categories apart; what counts as a false object is the same as for all."""
        if not self._task.unseen:
            return {}
        parts = {"seen": self._task.seen - {0}, "unseen": self._task.unseen}
        return {
            f"{name}_{part}": value
            for part, label_ids in parts.items()
            for name, value in _aps(scores, label_ids).items()
        }


def _aps(scores: PrecisionRecall, label_ids: Iterable[int] | None = None) -> dict[str, float]:
    chosen = None if label_ids is None else set(label_ids)
    return {
        "ap": scores.ap(label_ids=chosen),
        "ap50": scores.ap(iou=0.5, label_ids=chosen),
        "ap75": scores.ap(iou=0.75, label_ids=chosen),
    }


def _ars(scores: PrecisionRecall) -> dict[str, float]:
    return {f"ar{bound}": scores.ar(bound) for bound in (1, 10, 100)}


def _match(
    targets: Sequence[RleObject],
    predictions: Sequence[RleObject],
    baseline: InstancePart | None = None,
) -> InstancePart:
    return InstancePart(
        match_objects(targets, predictions),
        match_objects(targets, predictions, by_category=False),
        baseline,
    )


def _cut(objects: Iterable[RleObject], scored: Rle | None) -> list[RleObject]:
    """Objects without their void pixels; those that lose their last one are left out."""
    if scored is None:
        return list(objects)
    kept = []
    for item in objects:
        rle = intersect(item.rle, scored)
        if mask_area(rle) or not mask_area(item.rle):
            kept.append(RleObject(item.label_id, rle, item.score, item.crowd))
    return kept
