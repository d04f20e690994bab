"""Masks with labels and scores -> objects: crops, suppression, order. No torch.

Letters: N masks, h w token grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.predictions import Instance

Suppression = Literal["none", "hard", "linear", "gaussian"]

MAX_OVERLAP = 0.3
SIGMA = 0.5
MIN_SCORE = 0.001
EPSILON = 1e-7


@dataclass(frozen=True)
class Crop:
    """A mask that is not empty, cut out along its box: rows `top` and columns `left` onwards."""

    top: int
    left: int
    inside: NDArray[np.bool_]

    @property
    def bbox_xyxy(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1, both ends inclusive."""
        height, width = self.inside.shape
        return self.left, self.top, self.left + width - 1, self.top + height - 1


def crop_of(inside: NDArray[np.bool_], top: int, left: int) -> Crop | None:
    """The mask (h', w') whose corner is at `top` and `left`, cut to its box; None if empty."""
    occupied_rows = occupied(inside, 1)
    if not occupied_rows.any():
        return None
    box = _extent(occupied_rows), _extent(occupied(inside, 0))
    # A copy: the crop outlives the pixels around it.
    return Crop(top + box[0].start, left + box[1].start, inside[box].copy())


def occupied(masks: NDArray[np.bool_], axis: int | tuple[int, int]) -> NDArray[np.bool_]:
    """Where there is anything along an axis."""
    return np.asarray(np.logical_or.reduce(masks, axis=axis))


def _extent(occupied: NDArray[np.bool_]) -> slice:
    """From the first to the last True; there is one."""
    places = np.flatnonzero(occupied)
    return slice(int(places[0]), int(places[-1]) + 1)


def near(
    reached: NDArray[np.bool_], lower: NDArray[np.int64], upper: NDArray[np.int64]
) -> list[slice]:
    """For each mask, the target cells of an axis that take from a `reached` source cell.

    An axis that shrinks may skip all of them; then one cell stands for none.

    Args:
        reached: (N, n) source cells.
        lower: (m,) source cell at or before each target cell.
        upper: (m,) source cell after it.
    """
    first = reached.argmax(1)
    last = reached.shape[1] - 1 - reached[:, ::-1].argmax(1)
    start = np.searchsorted(upper, first).clip(max=len(lower) - 1)
    stop = np.searchsorted(lower, last, side="right")
    ends = np.stack((start, np.maximum(stop, start + 1)), axis=1)
    return [slice(*pair) for pair in ends.tolist()]


def suppressed_instances(
    crops: Sequence[Crop | None],
    label_ids: NDArray[np.int64],
    scores: NDArray[np.float64],
    size: tuple[int, int],
    *,
    embeddings: NDArray[np.float32] | None = None,
    suppression: Suppression = "hard",
    max_overlap: float = MAX_OVERLAP,
    sigma: float = SIGMA,
    min_score: float = MIN_SCORE,
) -> list[Instance]:
    """The objects that are left of N masks, by falling score, of equals the earlier one first.

    Args:
        crops: the masks; None for an empty one, which is dropped.
        label_ids: (N,) 1 or more.
        scores: (N,).
        size: (H, W) of the image.
        embeddings: (N, C) unit means of the features inside, which the objects keep; None for none.
        suppression: among masks of one label. "hard" removes masks that overlap a better one,
            "linear" and "gaussian" lower their scores, "none" keeps all.
        max_overlap: IoU up to which "hard" and "linear" leave a score alone.
        sigma: width of "gaussian": the factor is exp(-IoU^2 / sigma).
        min_score: scores that fall to this or below are dropped by suppression.

    Raises:
        ValueError: `suppression` is unknown.
    """
    if suppression not in get_args(Suppression):
        raise ValueError(f"suppression {suppression!r} is none of {get_args(Suppression)}")
    kept = [i for i, crop in enumerate(crops) if crop is not None]
    masks = [crop for crop in crops if crop is not None]
    label_ids, final_scores = label_ids[kept], scores[kept]
    found = [None if embeddings is None else embeddings[place] for place in kept]
    if suppression != "none":
        decay = partial(_decay, suppression=suppression, max_overlap=max_overlap, sigma=sigma)
        for label_id in np.unique(label_ids):
            members = np.flatnonzero(label_ids == label_id)
            final_scores[members] = _suppressed_scores(
                [masks[i] for i in members], final_scores[members], decay, min_score=min_score
            )
    order = [i for i in np.argsort(-final_scores, kind="stable") if final_scores[i] >= 0]
    return [
        Instance(
            label_id=int(label_ids[i]),
            score=float(final_scores[i]),
            crop=masks[i].inside,
            bbox_xyxy=masks[i].bbox_xyxy,
            size=size,
            embedding=found[i],
        )
        for i in order
    ]


def _suppressed_scores(
    masks: list[Crop],
    scores: NDArray[np.float64],
    decay: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    min_score: float,
) -> NDArray[np.float64]:
    """Take the best remaining mask, weaken the others by it, and so on; -1 where dropped."""
    scores, result = scores.copy(), np.full_like(scores, -1.0)
    boxes = np.array([mask.bbox_xyxy for mask in masks])
    areas = np.array([np.count_nonzero(mask.inside) for mask in masks])
    remaining = np.ones(len(scores), dtype=bool)
    while remaining.any():
        best = int(np.argmax(np.where(remaining, scores, -np.inf)))
        result[best] = scores[best]
        remaining[best] = False
        touching = ((boxes[:, :2] <= boxes[best, 2:]) & (boxes[best, :2] <= boxes[:, 2:])).all(1)
        others = np.flatnonzero(remaining & touching)
        shared = np.array([_shared_pixels(masks[best], masks[i]) for i in others], dtype=np.int64)
        scores[others] *= decay(shared / (areas[best] + areas[others] - shared + EPSILON))
        remaining &= scores > min_score
    return result


def _shared_pixels(first: Crop, second: Crop) -> int:
    """Pixels of both masks, whose boxes intersect."""
    a, b = first.bbox_xyxy, second.bbox_xyxy
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    part, other = (
        mask.inside[y0 - mask.top : y1 - mask.top + 1, x0 - mask.left : x1 - mask.left + 1]
        for mask in (first, second)
    )
    return int(np.count_nonzero(part & other))


def _decay(
    iou: NDArray[np.float64], *, suppression: Suppression, max_overlap: float, sigma: float
) -> NDArray[np.float64]:
    """Factor on the score of a mask that overlaps a better one by `iou`."""
    if suppression == "gaussian":
        return np.exp(-(iou**2) / sigma)
    lowered = 1 - iou if suppression == "linear" else np.zeros_like(iou)
    return np.where(iou > max_overlap, lowered, 1.0)
