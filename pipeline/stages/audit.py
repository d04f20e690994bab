"""Score archives, pseudo-masks and pseudo-labels where true masks of index images exist.

The truth is read here and nowhere else: no stage that trains sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.voc import CLASSES, OBJECTS, VocExample
from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import decode_png, resize_nearest
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap, Target
from pipeline.formats.shards import open_samples
from pipeline.formats.tables import read_archives
from pipeline.params.sections import AuditParams
from pipeline.scoring.confusion import ConfusionMatrix
from pipeline.training.settings import TargetSettings
from pipeline.training.targets import training_target
from pipeline.vocabulary.categories import load_category_set

MASK_MEMBERS = ("mask.png", "json")
TARGETS: tuple[Target, ...] = get_args(Target)


def run(
    *,
    name: str,
    audit: AuditParams,
    archives_path: Path,
    masks_dir: Path,
    labels_dir: Path,
    metrics_path: Path,
    params: TargetSettings,
    runtime: Runtime,  # noqa: ARG001 (every stage is handed one)
    stats_path: Path,
) -> None:
    """Write one flat JSON of percentages (two decimals, null where there was nothing to score).

    - `archive_precision`: archive images that show their category; `negative_precision`: negatives
      that show none.
    - `mask_iou`: mean over the archive images of the IoU of the pseudo-mask with all objects, of
      any category or none; `mask_iou_category`: with the objects of the archive's category. An
      image without such an object counts 0. Negatives are in none of these.
    - `label_miou_TARGET`: mIoU of what training would see, for each target of section `train`;
      pixels that a target ignores are not scored, `label_ignored_fused` is their share.

    Void pixels of the truth count nowhere. Pseudo-masks return to the original size by nearest
    neighbour. Categories of the truth that the archives do not have are background to the labels.

    Args:
        name: name of the audit, for messages.
        audit: its entry of params.yaml; `SegmentationClass/STEM.png` and
            `SegmentationObject/STEM.png` below its root, STEM that of the image file. Without the
            second folder, objects are the pixels of any category.
        archives_path: Parquet table of the archives.
        masks_dir: mask shards.
        labels_dir: label shards, joined to them by key.
        metrics_path: the JSON file to write.
        params: section `train`: how the target `fused` is made.
        runtime: not used.
        stats_path: counts of this run, JSON.

    Raises:
        PipelineError: no truth, a category that it lacks, or a mask of another size.
    """
    rows = read_archives(archives_path)
    store = open_samples(masks_dir, members=MASK_MEMBERS)
    labels = LabelStore(labels_dir)
    truth = _Truth(name, audit, labels.categories)
    metrics = _Metrics(len(labels.categories), params)
    with StageRun(
        "audit", stats_path=stats_path, total=len(rows) + len(store), unit="item"
    ) as stage:
        for row in rows:
            masks = truth.find(row.path, row.member)
            if masks is None:
                stage.skip(row.member or row.path, "no true mask")
                continue
            metrics.add_archive_image(row.label_id, masks)
            stage.advance()
        if not stage.items:
            raise PipelineError(
                f"audits.{name}.root: {audit.root / CLASSES} has a mask for none of the "
                f"{len(rows)} archive images; expected STEM.png for the image STEM.jpg"
            )
        for index in range(len(store)):
            fields = store.json(index)
            masks = truth.find(fields["path"], fields["member"])
            if masks is None:  # listed above already
                continue
            if fields["label_id"] != BACKGROUND:
                dense = labels.get(store.keys[index])
                pseudo = _read_pseudo(fields, store.member(index, "mask.png"), dense, masks)
                metrics.add_sample(fields["label_id"], pseudo, masks)
            stage.advance()
        write_json(metrics_path, metrics.compute())


def dry_run(
    dry: DryRun,
    *,
    name: str,
    audit: AuditParams,
    archives_path: Path,
    masks_dir: Path,
    labels_dir: Path,
) -> None:
    """Say what `run` would do.

    Raises:
        PipelineError: no truth, or a category that it lacks.
    """
    _Truth(name, audit, LabelStore(labels_dir).categories)
    num_images = len(read_archives(archives_path))
    num_samples = len(open_samples(masks_dir, members=MASK_MEMBERS))
    text = f": {num_images} archive images and {num_samples} samples, where there is truth"
    dry.items(num_images + num_samples, unit="items", text=text)


@dataclass(frozen=True)
class _TrueMasks:
    """The truth of one image.

    Attributes:
        semantic: (H, W) label ids of the archives; void is `IGNORE_INDEX`.
        objects: (H, W) bool, objects of any category or none.
        void: (H, W) bool, not scored.
        path: of the semantic mask, for messages.
    """

    semantic: LabelMap
    objects: NDArray[np.bool_]
    void: NDArray[np.bool_]
    path: Path


@dataclass(frozen=True)
class _PseudoMasks:
    """One sample of the label shards at the size of the truth: mask, label ids, confidence."""

    mask: NDArray[np.bool_]
    labels: LabelMap
    confidence: NDArray[np.float32]


class _Truth:
    """True masks by the stem of an image's file."""

    def __init__(self, name: str, audit: AuditParams, categories: Sequence[str]) -> None:
        self._root = audit.root
        if not (self._root / CLASSES).is_dir():
            raise PipelineError(
                f"audits.{name}.root: {self._root / CLASSES}: no such folder; expected true masks "
                "in PASCAL VOC's layout"
            )
        self._has_objects = (self._root / OBJECTS).is_dir()
        named = load_category_set(audit.categories)
        unknown = [category for category in categories if category not in named]
        if unknown:
            raise PipelineError(
                f"audits.{name}.categories: the archives' {', '.join(unknown)} is not among them"
            )
        label_ids = {category: label_id for label_id, category in enumerate(categories, start=1)}
        self._num_categories = len(named)
        # True label id -> ours. The last entry serves IGNORE_INDEX, which is -1.
        self._to_ours = np.array(
            [
                BACKGROUND,
                *(label_ids.get(category, BACKGROUND) for category in named),
                IGNORE_INDEX,
            ],
            dtype=LABEL_TYPE,
        )

    def find(self, path: str, member: str | None) -> _TrueMasks | None:
        """The truth of the image `path`, or of the member of that file; None without one."""
        stem = PurePosixPath(member or path).stem
        example = VocExample(self._root, stem, self._num_categories)
        if not example.class_path.is_file():
            return None
        semantic = example.semantic()
        objects = example.objects() if self._has_objects else semantic
        void = (semantic == IGNORE_INDEX) | (objects == IGNORE_INDEX)
        return _TrueMasks(
            semantic=np.where(void, IGNORE_INDEX, self._to_ours[semantic]),
            objects=(objects > 0) & ~void,
            void=void,
            path=example.class_path,
        )


class _Metrics:
    """Running scores of archives, pseudo-masks and training targets."""

    def __init__(self, num_categories: int, params: TargetSettings) -> None:
        self._params = params
        self._hits: list[bool] = []
        self._negative_hits: list[bool] = []
        self._mask_iou: list[float] = []
        self._category_iou: list[float] = []
        self._matrices = {target: ConfusionMatrix(num_categories + 1) for target in TARGETS}
        self._ignored = dict.fromkeys(TARGETS, 0)
        self._pixels = 0

    def add_archive_image(self, label_id: int, truth: _TrueMasks) -> None:
        """Note whether an archive's image shows what it was found for."""
        if label_id == BACKGROUND:
            self._negative_hits.append(not (truth.semantic > 0).any())
        else:
            self._hits.append(bool((truth.semantic == label_id).any()))

    def add_sample(self, label_id: int, pseudo: _PseudoMasks, truth: _TrueMasks) -> None:
        """Score one pseudo-mask and the three targets that it leads to."""
        mask = pseudo.mask & ~truth.void
        self._mask_iou.append(_iou(mask, truth.objects))
        self._category_iou.append(_iou(mask, truth.semantic == label_id))
        self._pixels += int((~truth.void).sum())
        for target, matrix in self._matrices.items():
            labels = training_target(
                pseudo.mask,
                label_id,
                pseudo.labels,
                pseudo.confidence,
                target=target,
                confidence_threshold=self._params.confidence_threshold,
                conflict=self._params.conflict,
            )
            ignored = labels == IGNORE_INDEX
            self._ignored[target] += int((ignored & ~truth.void).sum())
            scored = np.where(ignored, IGNORE_INDEX, truth.semantic)
            matrix.update(target=scored, prediction=labels)

    def compute(self) -> dict[str, Any]:
        """All scores, flat."""
        label_miou = {
            f"label_miou_{target}": _percent(matrix.compute().miou)
            for target, matrix in self._matrices.items()
        }
        ignored = self._ignored["fused"] / self._pixels if self._pixels else float("nan")
        return {
            "archive_precision": _percent(_mean(self._hits)),
            "negative_precision": _percent(_mean(self._negative_hits)),
            "mask_iou": _percent(_mean(self._mask_iou)),
            "mask_iou_category": _percent(_mean(self._category_iou)),
            **label_miou,
            "label_ignored_fused": _percent(ignored),
            "n_archive_images": len(self._hits),
            "n_masks": len(self._mask_iou),
        }


def _read_pseudo(
    fields: Mapping[str, Any],
    mask_png: bytes,
    dense: tuple[LabelMap, NDArray[np.float32]],
    truth: _TrueMasks,
) -> _PseudoMasks:
    size = (fields["original_height"], fields["original_width"])
    if truth.semantic.shape != size:
        height, width = truth.semantic.shape
        raise PipelineError(
            f"{truth.path}: {width}x{height} pixels, but its image {fields['path']} has "
            f"{size[1]}x{size[0]}"
        )
    labels, confidence = dense
    return _PseudoMasks(
        mask=resize_nearest(decode_png(mask_png) > 0, size),
        labels=resize_nearest(labels, size),
        confidence=resize_nearest(confidence, size),
    )


def _iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union; 0 where both are empty."""
    union = int((first | second).sum())
    return float((first & second).sum()) / union if union else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _percent(score: float) -> float:
    return round(100 * score, 2)
