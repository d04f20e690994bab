"""COCO's mask average precision and recall, matched image by image through pycocotools.

`match_objects` compares the objects of one image and keeps, of each prediction, its score and
whether it is right; `MaskAP` collects these and accumulates as COCOeval does: precision at 101
recall points, predictions of equal score in the order in which they came.

Letters: K categories, N predictions of an image, A area ranges, T IoU thresholds, M bounds on the
number of predictions of a category in an image.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.formats.rle import RleObject, coco_annotation

AREAS = ("all", "small", "medium", "large")
MAX_PREDICTIONS = (1, 10, 100)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)

# `rank` is the place among the predictions of a category in an image, from 0. Bit t of `right` and
# `wrong`, by area range, belongs to IoU threshold t; a prediction to ignore is neither.
RECORD = np.dtype(
    [
        ("label_id", "<u2"),
        ("rank", "u1"),
        ("score", "<f8"),
        ("right", "<u2", (len(AREAS),)),
        ("wrong", "<u2", (len(AREAS),)),
    ]
)


@dataclass(frozen=True)
class Matches:
    """What one image adds to the precision and recall of the categories that occur in it.

    Attributes:
        records: (N,) of dtype `RECORD`, by label id and rank.
        num_targets: label id -> (A,) number of true objects that count in each area range.
    """

    records: NDArray[np.void]
    num_targets: dict[int, NDArray[np.int64]]


def match_objects(
    targets: Sequence[RleObject], predictions: Sequence[RleObject], *, by_category: bool = True
) -> Matches:
    """Compare the objects of one image, as COCOeval does.

    At every IoU threshold the predictions of a category, the best first, each take the true object
    that they overlap most and that no better one took. Of a category at most 100 count. Areas
    are in pixels: small below 32 x 32, large above 96 x 96. A crowd is no object to find, and
    predictions inside it are ignored, as are those outside the area range that match nothing. A
    true object without a pixel is one that nothing can match.

    Args:
        targets: the true objects.
        predictions: the predicted ones; of equal scores the first counts as better.
        by_category: only objects of one category match. Otherwise all are taken for label id 1, in
            the order of their label ids.

    Raises:
        ValueError: masks of different sizes.
    """
    _check_sizes([*targets, *predictions])
    label_ids = [1]
    if by_category:
        label_ids = sorted({item.label_id for item in (*targets, *predictions)})
    if not (targets or predictions):
        return Matches(np.empty(0, dtype=RECORD), {})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(targets), _index(predictions), "segm")
        evaluation.params.catIds = sorted({item.label_id for item in (*targets, *predictions)})
        evaluation.params.useCats = int(by_category)
        for area_range in (evaluation.params.areaRng[0], evaluation.params.areaRng[-1]):
            area_range[1] = math.inf  # COCOeval's own end, 1e10, would leave an object out of all
        evaluation.evaluate()
    # One entry a category and, within it, area range: there is one image.
    entries = evaluation.evalImgs
    parts = {
        label_id: entries[start : start + len(AREAS)]
        for label_id, start in zip(label_ids, range(0, len(entries), len(AREAS)), strict=True)
    }
    return Matches(
        records=np.concatenate([_records(label_id, part) for label_id, part in parts.items()]),
        num_targets={
            label_id: np.array([np.count_nonzero(area["gtIgnore"] == 0) for area in part])
            for label_id, part in parts.items()
        },
    )


class MaskAP:
    """Precision and recall over images.

    In memory stay 27 bytes a prediction and a count a category; no mask does.
    """

    def __init__(self, num_categories: int) -> None:
        """Start from nothing; label ids go from 1 to `num_categories`."""
        self._num_targets = np.zeros((num_categories + 1, len(AREAS)), dtype=np.int64)
        self._records = bytearray()

    def add(self, matches: Matches) -> None:
        """Add one image.

        Raises:
            ValueError: a label id is out of range.
        """
        num_categories = len(self._num_targets) - 1
        if outside := [i for i in matches.num_targets if not 1 <= i <= num_categories]:
            raise ValueError(f"label id {outside[0]}: expected 1 to {num_categories}")
        for label_id, counts in matches.num_targets.items():
            self._num_targets[label_id] += counts
        self._records += matches.records.tobytes()

    def compute(self) -> PrecisionRecall:
        """Precision and recall of everything added so far."""
        num_categories = len(self._num_targets) - 1
        precision = np.full((num_categories, len(AREAS), len(IOU_THRESHOLDS)), np.nan)
        recall = np.full((num_categories, len(MAX_PREDICTIONS), len(IOU_THRESHOLDS)), np.nan)
        records = np.frombuffer(bytes(self._records), dtype=RECORD)
        order = np.argsort(records["label_id"], kind="stable")
        ends = np.searchsorted(records["label_id"][order], np.arange(num_categories + 2))
        for label_id in np.flatnonzero(self._num_targets[:, 0]):
            part = records[order[ends[label_id] : ends[label_id + 1]]]
            part = part[np.argsort(-part["score"], kind="stable")]
            for area, num_targets in enumerate(self._num_targets[label_id]):
                if num_targets:
                    precision[label_id - 1, area] = _mean_precision(part, area, num_targets)
            for place, bound in enumerate(MAX_PREDICTIONS):
                found = _bits(part["right"][part["rank"] < bound, 0]).sum(axis=1)
                recall[label_id - 1, place] = found / self._num_targets[label_id, 0]
        return PrecisionRecall(precision, recall)


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall in [0, 1]; NaN for a category without a true object.

    Attributes:
        precision: (K, A, T), the mean over 101 recall points.
        recall: (K, M, T) when an image has at most 1, 10 or 100 predictions of the category.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def ap(
        self,
        *,
        iou: float | None = None,
        area: str = "all",
        label_ids: Collection[int] | None = None,
    ) -> float:
        """Mean over the categories that have objects, and over the IoU thresholds.

        Args:
            iou: one of 0.50, 0.55, ..., 0.95; None for their mean.
            area: a name of `AREAS`.
            label_ids: the categories that count, from 1; None for all.
        """
        values = self.precision[_rows(label_ids), AREAS.index(area)]
        return _mean(values if iou is None else values[:, np.isclose(IOU_THRESHOLDS, iou)])

    def ar(self, max_predictions: int = 100) -> float:
        """Mean recall over categories and IoU thresholds, for a bound of `MAX_PREDICTIONS`."""
        return _mean(self.recall[:, MAX_PREDICTIONS.index(max_predictions)])

    def category_ap(self) -> NDArray[np.float64]:
        """(K,) AP of each category."""
        return self.precision[:, 0].mean(axis=1)


def _rows(label_ids: Collection[int] | None) -> Any:
    return slice(None) if label_ids is None else np.array(sorted(label_ids), dtype=np.int64) - 1


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _check_sizes(objects: Sequence[RleObject]) -> None:
    sizes = {tuple(item.rle["size"]) for item in objects}
    if len(sizes) > 1:
        raise ValueError(f"masks of different sizes: {', '.join(map(str, sorted(sizes)))}")


def _index(objects: Sequence[RleObject]) -> COCO:
    """pycocotools' index; also over no annotation at all, which its `loadRes` refuses."""
    height, width = objects[0].rle["size"] if objects else (0, 0)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": height, "width": width}],
        "annotations": [
            coco_annotation(
                item.rle,
                annotation_id=number,
                image_id=1,
                category_id=item.label_id,
                score=item.score,
                crowd=item.crowd,
                area=item.area,
            )
            for number, item in enumerate(objects, start=1)
        ],
        "categories": [{"id": label_id} for label_id in {item.label_id for item in objects}],
    }
    coco.createIndex()
    return coco


def _records(label_id: int, entries: Sequence[dict[str, Any]]) -> NDArray[np.void]:
    """Records of a category's predictions from COCOeval's entries, one an area range."""
    scores = entries[0]["dtScores"]
    records = np.zeros(len(scores), dtype=RECORD)
    records["label_id"] = label_id
    records["rank"] = np.arange(len(scores))
    records["score"] = scores
    weights = 1 << np.arange(len(IOU_THRESHOLDS))[:, None]
    for area, entry in enumerate(entries):
        matched, ignored = entry["dtMatches"] > 0, entry["dtIgnore"] > 0
        records["right"][:, area] = ((matched & ~ignored) * weights).sum(axis=0)
        records["wrong"][:, area] = ((~matched & ~ignored) * weights).sum(axis=0)
    return records


def _bits(flags: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """(T, N) booleans of flags (N,)."""
    return (flags >> np.arange(len(IOU_THRESHOLDS), dtype=np.uint16)[:, None]) & 1 > 0


def _mean_precision(
    records: NDArray[np.void], area: int, num_targets: np.int64
) -> NDArray[np.float64]:
    """(T,) mean over `RECALL_POINTS` of the best precision at that recall or a higher one."""
    means = np.zeros(len(IOU_THRESHOLDS))
    rights, wrongs = _bits(records["right"][:, area]), _bits(records["wrong"][:, area])
    for threshold, (right, wrong) in enumerate(zip(rights, wrongs, strict=True)):
        found, false = np.cumsum(right, dtype=float), np.cumsum(wrong, dtype=float)
        precision = found / (found + false + np.spacing(1))
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(found / num_targets, RECALL_POINTS, side="left")
        means[threshold] = envelope[places[places < len(envelope)]].sum() / len(RECALL_POINTS)
    return means
