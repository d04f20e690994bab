"""The README's picture: evenly spaced images of the demo's benchmark, truth and predictions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.benchmarks import Example, open_bench
from pipeline.errors import PipelineError
from pipeline.files import write_bytes
from pipeline.formats.images import load_image
from pipeline.formats.predictions import PredictionStore, StoredPrediction
from pipeline.params.benches import BenchParams
from pipeline.pictures.benchmark import drawn_objects
from pipeline.pictures.overlays import (
    colour_map,
    displayed,
    grid,
    overlay_instances,
    overlay_semantic,
)
from pipeline.vocabulary.categories import load_category_set

PER_GROUP = 4
COLUMN_WIDTH = 160
SHOWN_SCORE = 0.5  # instances below it are many and faint; the report shows all


def draw_picture(predictions_dir: Path, out_path: Path, *, bench: BenchParams) -> None:
    """Write a PNG with one column an image: image, truth, semantic mask, instances.

    The columns are the images at the middle of each quarter of every group, in order.

    Raises:
        PipelineError: no predictions, or a benchmark that lacks a part.
    """
    categories = load_category_set(bench.categories)
    store = PredictionStore(predictions_dir)
    numbers = {
        example.image_id: number
        for number, example in enumerate(_examples(bench, bench.split, categories))
    }
    chosen = []
    for split in bench.groups.values() or [bench.split]:
        part = _examples(bench, split, categories)
        step = max(1, len(part) // PER_GROUP)
        chosen += part[step // 2 :: step][:PER_GROUP]
    columns = []
    for example in chosen:
        prediction = store.get(numbers[example.image_id], example.image_id)
        if prediction is None:
            raise PipelineError(f"{predictions_dir}: no prediction of image {example.image_id}")
        columns.append(_column(example, prediction, categories))
    pictures = [column[row] for row in range(len(columns[0])) for column in columns]
    buffer = io.BytesIO()
    grid(pictures, columns=len(columns)).save(buffer, "PNG", optimize=True)
    write_bytes(out_path, buffer.getvalue())


def _examples(bench: BenchParams, split: str, categories: list[str]) -> list[Example]:
    return list(
        open_bench(
            format=bench.format,
            root=bench.root,
            split=split,
            categories=categories,
            **bench.layout(),
        )
    )


def _column(
    example: Example, prediction: StoredPrediction, categories: list[str]
) -> list[Image.Image]:
    image = np.asarray(load_image(example.image_path))
    palette = colour_map(len(categories) + 1)
    confident = [item for item in prediction.objects or [] if item.score >= SHOWN_SCORE]
    pictures = [
        displayed(image),
        overlay_semantic(image, example.semantic(), palette),
        overlay_semantic(image, prediction.labels, palette),
        overlay_instances(image, drawn_objects(confident), names=categories),
    ]
    height = round(COLUMN_WIDTH * image.shape[0] / image.shape[1])
    return [picture.resize((COLUMN_WIDTH, height)) for picture in pictures]
