"""Run-length coded masks, through pycocotools: COCO's format, small enough to store and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MAX_RUN_BITS = 60  # of a number in compressed code
MIN_POLYGON = 6  # numbers: three points


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


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> bytes | None:
    """Compressed code of polygons or of a run-length code of either kind; None without a pixel.

    Raises:
        KeyError, ValueError: neither, or it does not fit an image of `size` (H, W).
    """
    if isinstance(segmentation, list):
        code = _encode_polygons(segmentation, size)
    elif isinstance(segmentation, dict):
        code = _encode_runs(segmentation, size)
    else:
        raise ValueError(
            f"its segmentation is {short_repr(segmentation)}, neither polygons nor a run-length "
            "code"
        )
    return code["counts"] if code and coco_mask.area(code) else None


def _with_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _with_text(code: dict[str, Any]) -> Rle:
    return {
        "size": [int(side) for side in code["size"]],
        "counts": code["counts"].decode("ascii"),
    }


def _encode_runs(segmentation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    stored, counts = segmentation["size"], segmentation["counts"]
    if not _all_of(stored, int) or stored != list(size):
        raise ValueError(
            f"its run-length code has size {short_repr(stored)}, the image {list(size)}"
        )
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not _all_of(runs, int) or min(runs, default=0) < 0:
        raise ValueError("the counts of its run-length code are not whole numbers")
    # pycocotools leaves what too few runs do not reach to chance.
    if sum(runs) != size[0] * size[1]:
        raise ValueError(
            f"the counts of its run-length code add up to {sum(runs)} pixels, the image has "
            f"{size[0] * size[1]}"
        )
    return coco_mask.frPyObjects({"size": stored, "counts": runs}, *size)


def _all_of(values: Any, *kinds: type) -> bool:
    """Whether it is a list of values of exactly these types."""
    return isinstance(values, list) and set(map(type, values)) <= {*kinds}


def _decompress(counts: str) -> list[int]:
    """Runs of COCO's compressed code.

    A run is written as its difference to the last but one, in groups of five bits, the lowest
    first: a character is 48 + group + 32 if more follow, the top bit of the last is the sign.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"its run-length code has the character {character!r}")
        value |= (group & 31) << shift
        shift += 5
        if shift > MAX_RUN_BITS:
            raise ValueError("its run-length code has a number of too many digits")
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("its run-length code is cut short")
    return runs


def _encode_polygons(polygons: list[Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """Code of the union of polygons; one of fewer than three points encloses nothing.

    pycocotools would take four numbers for a box.
    """
    height, width = size
    kept = []
    for polygon in polygons:
        if not _all_of(polygon, int, float) or len(polygon) % 2:
            raise ValueError("a polygon of its segmentation is not a list x, y, x, y, ...")
        x, y = polygon[::2], polygon[1::2]
        # Far outside, pycocotools would trace lines of any length.
        if not (_within(x, width) and _within(y, height)):
            raise ValueError(f"a polygon lies outside its image of {width}x{height} pixels")
        if len(polygon) >= MIN_POLYGON:
            kept.append(polygon)
    return coco_mask.merge(coco_mask.frPyObjects(kept, height, width)) if kept else None


def _within(coordinates: Sequence[float], side: int) -> bool:
    """Whether all lie within one image side of the image."""
    return -side <= min(coordinates, default=0) and max(coordinates, default=0) <= 2 * side
