"""Run-length coded masks, through pycocotools: COCO's format, small enough to store and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask


class Rle(TypedDict):
    """COCO's compressed run-length code: size is [H, W], runs go down the columns."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class RleObject:
    """An object as a run-length coded mask.

    Attributes:
        label_id: 1 or more.
        rle: its mask.
        score: of a prediction; no matter for a true object.
        crowd: of a true object, see `match_objects`.
        area: pixels that the object is said to have; None for those of its mask.
    """

    label_id: int
    rle: Rle
    score: float = 1.0
    crowd: bool = False
    area: float | None = None


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Run-length code of a mask (H, W), with text counts, as JSON needs them."""
    return _with_text(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def encode_crop(
    crop: NDArray[np.bool_], bbox_xyxy: tuple[int, int, int, int], size: tuple[int, int]
) -> Rle:
    """Run-length code of a mask that lies within a box: `encode_mask` without the pixels around.

    Args:
        crop: (y1 - y0 + 1, x1 - x0 + 1), the mask within its box.
        bbox_xyxy: x0, y0, x1, y1 of the box, both ends inclusive.
        size: (H, W) of the image.
    """
    left, top, _, _ = bbox_xyxy
    height, width = size
    # A frame above and below, so that every column has as many ends of runs as starts.
    columns = np.zeros((crop.shape[1], crop.shape[0] + 2), dtype=bool)
    columns[:, 1:-1] = crop.T
    changes = columns[:, 1:] != columns[:, :-1]
    column, row = np.divmod(np.flatnonzero(changes), changes.shape[1])
    turns = (left + column) * height + top + row
    # A run over the bottom of a column and the top of the next one is a single run.
    joined = np.flatnonzero(turns[1:] == turns[:-1])
    turns = np.delete(turns, np.concatenate((joined, joined + 1)))
    counts = np.diff(turns, prepend=0, append=height * width)
    counts = counts[:-1] if counts[-1] == 0 else counts
    plain = {"size": [height, width], "counts": counts.tolist()}
    return _with_text(coco_mask.frPyObjects(plain, height, width))


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """Mask (H, W) of a run-length code."""
    mask: NDArray[np.uint8] = coco_mask.decode(_with_bytes(rle))
    return mask.astype(bool)


def intersect(first: Rle, second: Rle) -> Rle:
    """Run-length code of the pixels that two masks of one size share."""
    return _with_text(coco_mask.merge([_with_bytes(first), _with_bytes(second)], intersect=True))


def mask_ious(first: Sequence[Rle], second: Sequence[Rle]) -> NDArray[np.float64]:
    """IoU (M, N) of masks; 0 of two from images of different sizes."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    no_crowd = [0] * len(second)
    ious = coco_mask.iou([*map(_with_bytes, first)], [*map(_with_bytes, second)], no_crowd)
    return np.maximum(np.asarray(ious, dtype=np.float64), 0)


def mask_area(rle: Rle) -> int:
    """Number of pixels of a run-length coded mask."""
    return int(coco_mask.area(_with_bytes(rle)))


def mask_box_xywh(rle: Rle) -> list[float]:
    """Box [x, y, width, height] around a run-length coded mask, zeros for an empty one."""
    return [float(value) for value in coco_mask.toBbox(_with_bytes(rle))]


def coco_annotation(
    rle: Rle,
    *,
    annotation_id: int,
    image_id: int,
    category_id: int,
    score: float | None = None,
    crowd: bool = False,
    area: float | None = None,
) -> dict[str, Any]:
    """One entry of the `annotations` of a COCO file; ids start at 1, `area` None is the mask's."""
    annotation: dict[str, Any] = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "area": mask_area(rle) if area is None else area,
        "bbox": mask_box_xywh(rle),
        "iscrowd": int(crowd),
    }
    if score is not None:
        annotation["score"] = score
    return annotation


def _with_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _with_text(code: dict[str, Any]) -> Rle:
    return {
        "size": [int(side) for side in code["size"]],
        "counts": code["counts"].decode("ascii"),
    }
