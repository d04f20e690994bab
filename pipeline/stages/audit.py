"""Score archives, pseudo-masks and pseudo-labels where true masks of index images exist.

The truth is read here and nowhere else: no stage that trains sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.data.benchmarks.voc import CLASSES, OBJECTS, VocExample
from pipeline.data.categories import load_category_set
from pipeline.data.images import decode_label, decode_png
from pipeline.data.labels import (
    BACKGROUND,
    IGNORE_INDEX,
    Target,
    decode_confidence,
    training_target,
)
from pipeline.data.shards import open_samples, read_manifest
from pipeline.data.tables import ArchiveRow, read_archives
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.metrics.semantic import ConfusionMatrix
from pipeline.params import AuditParams, TrainParams
from pipeline.runtime import Runtime, StageRun

MEMBERS = ("mask.png", "label.png", "confidence.png", "json")
TARGETS: tuple[Target, ...] = get_args(Target)


def run(
    *,
    name: str,
    audit: AuditParams,
    archives_path: Path,
    labels_dir: Path,
    metrics_path: Path,
    params: TrainParams,
    runtime: Runtime,  # noqa: ARG001 (every stage is handed one)
    stats_path: Path,
) -> None:
    """Write one flat JSON of percentages (two decimals, null where there was nothing to score).

    - `archive_precision`: archive images that show their category; `negative_precision`: negatives
      that show none.
    - `mask_iou`: mean over the archive images of the IoU of the pseudo-mask with all objects, of
      any category or none; `mask_iou_category`: with the objects of the archive's category. An
      image without such an object counts 0.
    - `label_miou_TARGET`: mIoU of what training would see, for each target of section `train`;
      pixels that a target ignores are not scored, `label_ignored_fused` is their share.

    Void pixels of the truth count nowhere. Pseudo-masks return to the original size by nearest
    neighbour. Categories of the truth that the archives do not have are background to the labels.

    Args:
        name: name of the audit, for messages.
        audit: its entry of params.yaml; `SegmentationClass/STEM.png` and
            `SegmentationObject/STEM.png` below its root, STEM that of the image file.
        archives_path: Parquet table of the archives.
        labels_dir: label shards.
        metrics_path: the JSON file to write.
        params: section `train`: how the target `fused` is made.
        runtime: not used.
        stats_path: counts of this run, JSON.

    Raises:
        PipelineError: no truth, a category that it lacks, or a mask of another size.
    """
    rows = read_archives(archives_path)
    store = open_samples(labels_dir, members=MEMBERS)
    categories = _label_categories(labels_dir)
    truth = _Truth(name, audit.root, load_category_set(audit.categories), categories)
    metrics = _Metrics(len(categories), params)
    with StageRun(
        "audit", stats_path=stats_path, total=len(rows) + len(store), unit="item"
    ) as stage:
        for row in rows:
            found = truth.find(row.path, row.member)
            if found is None:
                stage.skip(_item(row), "no true mask")
                continue
            metrics.add_row(row.label_id, found)
            stage.advance()
        if not stage.items:
            raise PipelineError(
                f"audits.{name}.root: {audit.root / CLASSES} has a mask for none of the "
                f"{len(rows)} archive images; expected STEM.png for the image STEM.jpg"
            )
        for sample in (store[index] for index in range(len(store))):
            fields = store_fields(sample)
            found = truth.find(fields["path"], fields["member"])
            if found is not None and fields["label_id"] != BACKGROUND:
                _check_size(found, fields)
                metrics.add_sample(fields["label_id"], sample, found)
            stage.advance()
        write_json(metrics_path, metrics.compute())
