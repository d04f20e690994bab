"""What a prediction is in COCO's JSON, and as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.benchmarks.voc import VOID, encode_index_png
from pipeline.formats.images import encode_label
from pipeline.formats.predictions import Instance
from pipeline.formats.rle import coco_annotation, encode_crop
from pipeline.inference.prediction import Prediction

SCORE_DIGITS = 6


def object_annotation(instance: Instance, *, annotation_id: int, image_id: int) -> dict[str, Any]:
    """An entry of `annotations`: RLE with text counts, box x y width height, area, score."""
    return coco_annotation(
        encode_crop(instance.crop, instance.bbox_xyxy, instance.size),
        annotation_id=annotation_id,
        image_id=image_id,
        category_id=instance.label_id,
        score=round(instance.score, SCORE_DIGITS),
    )


def category_entries(categories: Sequence[str]) -> list[dict[str, Any]]:
    """The list `categories`: ids from 1."""
    return [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]


def encode_label_map(prediction: Prediction) -> bytes:
    """PNG of a label map: a palette of up to 254 categories, 16-bit grey beyond."""
    count = len(prediction.categories)
    if count < VOID:
        return encode_index_png(prediction.semantic)
    return encode_label(prediction.semantic, count)
