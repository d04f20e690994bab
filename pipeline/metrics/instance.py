"""Run-length coded masks, and COCO's mask average precision through pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class Target(Protocol):
    """A true object: label id and mask (H, W) bool."""

    @property
    def label_id(self) -> int: ...

    @property
    def mask(self) -> NDArray[np.bool_]: ...


class ScoredInstance(Target, Protocol):
    """A predicted object: a `Target` with a score."""

    @property
    def score(self) -> float: ...


class Rle(TypedDict):
    """COCO's compressed run-length code: size is [H, W], runs go down the columns."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class InstanceScores:
    """Average precision in [0, 1]; NaN where there is no true object.

    Attributes:
        ap: mean over IoU thresholds 0.50 to 0.95 and over the categories that have objects.
        ap50: at IoU 0.50.
        ap75: at IoU 0.75.
        ap_agnostic: like `ap`, with all categories taken for one; the next two likewise.
    """

    ap: float
    ap50: float
    ap75: float
    ap_agnostic: float
    ap50_agnostic: float
    ap75_agnostic: float


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Run-length code of a mask (H, W), with text counts, as JSON needs them."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "size": [int(side) for side in code["size"]],
        "counts": code["counts"].decode("ascii"),
    }


def mask_area(rle: Rle) -> int:
    """Number of pixels of a run-length coded mask."""
    return int(coco_mask.area({"size": rle["size"], "counts": rle["counts"].encode("ascii")}))


def mask_box_xywh(rle: Rle) -> list[float]:
    """Box [x, y, width, height] around a run-length coded mask, zeros for an empty one."""
    box = coco_mask.toBbox({"size": rle["size"], "counts": rle["counts"].encode("ascii")})
    return [float(value) for value in box]


def coco_annotation(
    rle: Rle,
    *,
    annotation_id: int,
    image_id: int,
    category_id: int,
    score: float | None = None,
) -> dict[str, Any]:
    """One entry of the `annotations` of a COCO file; ids start at 1."""
    annotation: dict[str, Any] = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "area": mask_area(rle),
        "bbox": mask_box_xywh(rle),
        "iscrowd": 0,
    }
    if score is not None:
        annotation["score"] = score
    return annotation


class MaskAP:
    """Collects run-length coded objects image by image; only the codes stay in memory."""

    def __init__(self, categories: Sequence[str]) -> None:
        """Args: categories: names, in the order of the label ids from 1."""
        self._categories = [
            {"id": label_id, "name": name} for label_id, name in enumerate(categories, start=1)
        ]
        self._images: dict[str, dict[str, int]] = {}
        self._targets: list[dict[str, Any]] = []
        self._predictions: list[dict[str, Any]] = []

    def add(
        self,
        image_id: str,
        *,
        size: tuple[int, int],
        targets: Iterable[Target],
        predictions: Iterable[ScoredInstance],
        void: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add one image.

        Void pixels are cut out of targets and predictions alike before they are compared; what
        has no pixel left is not counted, neither as found, nor as missed, nor as wrong.

        Args:
            image_id: any name, once.
            size: (H, W) of all masks.
            targets: the true objects.
            predictions: the predicted ones.
            void: (H, W) pixels that are not scored.

        Raises:
            ValueError: an image added twice, a mask of another size, an unknown label id.
        """
        if image_id in self._images:
            raise ValueError(f"image {image_id!r} was added before")
        height, width = size
        coco_id = len(self._images) + 1
        self._images[image_id] = {"id": coco_id, "height": height, "width": width}
        for target in targets:
            self._append(self._targets, coco_id, size, target, void, None)
        for prediction in predictions:
            self._append(self._predictions, coco_id, size, prediction, void, prediction.score)

    def compute(self, image_ids: Collection[str] | None = None) -> InstanceScores:
        """Scores over all images, or over those named."""
        names = self._images if image_ids is None else set(image_ids) & set(self._images)
        kept = {self._images[name]["id"] for name in names}
        targets = self._coco(self._targets, kept)
        predictions = self._coco(self._predictions, kept)
        aware = _average_precision(targets, predictions, by_category=True)
        agnostic = _average_precision(targets, predictions, by_category=False)
        return InstanceScores(*aware, *agnostic)

    def _append(
        self,
        annotations: list[dict[str, Any]],
        coco_id: int,
        size: tuple[int, int],
        instance: Target,
        void: NDArray[np.bool_] | None,
        score: float | None,
    ) -> None:
        if instance.mask.shape != size:
            raise ValueError(f"mask {instance.mask.shape}: expected {size}")
        if not 1 <= instance.label_id <= len(self._categories):
            raise ValueError(f"label id {instance.label_id}: expected 1 to {len(self._categories)}")
        mask = instance.mask if void is None else instance.mask & ~void
        if not mask.any():
            return
        annotations.append(
            coco_annotation(
                encode_mask(mask),
                annotation_id=len(annotations) + 1,
                image_id=coco_id,
                category_id=instance.label_id,
                score=score,
            )
        )

    def _coco(self, annotations: list[dict[str, Any]], kept: set[int]) -> COCO:
        """pycocotools' index; also over no annotation at all, which its `loadRes` refuses."""
        coco = COCO()
        coco.dataset = {
            "images": [image for image in self._images.values() if image["id"] in kept],
            "annotations": [item.copy() for item in annotations if item["image_id"] in kept],
            "categories": self._categories,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _average_precision(
    targets: COCO, predictions: COCO, *, by_category: bool
) -> tuple[float, float, float]:
    """AP over all IoU thresholds, at 0.50 and at 0.75."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(targets, predictions, "segm")
        evaluation.params.useCats = int(by_category)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (
        float(value) if value >= 0 else float("nan") for value in evaluation.stats[:3]
    )
    return ap, ap50, ap75
