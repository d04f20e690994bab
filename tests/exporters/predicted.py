"""A folder as `pipeline predict` writes it, made of masks at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.voc import encode_index_png
from pipeline.formats.images import encode_label
from pipeline.formats.rle import coco_annotation, encode_mask

CATEGORIES = ["bird", "sofa: red", "tv 'x'"]


@dataclass
class Photo:
    """An image file with its prediction.

    Attributes:
        path: where the file is, or was.
        size: (H, W), upright.
        objects: mask, label id, score.
        labels: (H, W) label ids.
    """

    path: Path
    size: tuple[int, int]
    objects: Sequence[tuple[NDArray[np.bool_], int, float]] = ()
    labels: NDArray[np.int16] | None = None
    stem: str | None = field(default=None)


def write_predictions(
    folder: Path, photos: Sequence[Photo], categories: Sequence[str] = CATEGORIES
) -> Path:
    """Write `predictions.json` and `labels/`; returns the folder."""
    (folder / "labels").mkdir(parents=True)
    images, annotations = [], []
    for number, photo in enumerate(photos, start=1):
        name = f"labels/{photo.stem or photo.path.stem}.png"
        labels = np.zeros(photo.size, np.int16) if photo.labels is None else photo.labels
        count = len(categories)
        content = encode_index_png(labels) if count < 255 else encode_label(labels, count)
        (folder / name).write_bytes(content)
        height, width = photo.size
        images.append({"id": number, "file_name": photo.path.as_posix(), "labels": name})
        images[-1] |= {"width": width, "height": height}
        for mask, label_id, score in photo.objects:
            ids = {"annotation_id": len(annotations) + 1, "image_id": number}
            rle = encode_mask(mask)
            annotations.append(coco_annotation(rle, category_id=label_id, score=score, **ids))
    content: Mapping[str, Any] = {
        "annotations": annotations,
        "images": images,
        "categories": [{"id": k, "name": name} for k, name in enumerate(categories, start=1)],
        "skipped": [],
        "info": {"version": "0", "checkpoint": "models/zutis", "weights": "ab12"},
    }
    (folder / "predictions.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
