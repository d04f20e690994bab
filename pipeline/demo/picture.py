"""The README's picture: evenly spaced images of the demo's benchmark, truth and predictions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.benchmarks import Example, open_bench
from pipeline.data.categories import load_category_set
from pipeline.files import write_bytes
from pipeline.params import BenchParams
from pipeline.predictor import PredictionSettings, Segmenter
from pipeline.runtime import Runtime
from pipeline.viz import colour_map, displayed, grid, overlay_instances, overlay_semantic

PER_GROUP = 4
COLUMN_WIDTH = 160


def draw_picture(
    checkpoint_dir: Path,
    out_path: Path,
    *,
    bench: BenchParams,
    settings: PredictionSettings,
    runtime: Runtime,
) -> None:
    """Write a PNG with one column an image: image, truth, semantic mask, instances.

    The columns are the images at the middle of each quarter of every group, in order.

    Raises:
        PipelineError: no checkpoint, or a benchmark that lacks a part.
    """
    categories = load_category_set(bench.categories)
    segmenter = Segmenter.load(
        checkpoint_dir, categories=categories, settings=settings, runtime=runtime
    )
    examples = []
    for split in bench.groups.values() or [bench.split]:
        part = list(
            open_bench(
                format=bench.format, root=bench.root, split=split, categories=categories, groups={}
            )
        )
        step = max(1, len(part) // PER_GROUP)
        examples += part[step // 2 :: step][:PER_GROUP]
    columns = [_column(example, segmenter) for example in examples]
    pictures = [column[row] for row in range(len(columns[0])) for column in columns]
    buffer = io.BytesIO()
    grid(pictures, columns=len(columns)).save(buffer, "PNG", optimize=True)
    write_bytes(out_path, buffer.getvalue())


def _column(example: Example, segmenter: Segmenter) -> list[Image.Image]:
    with Image.open(example.image_path) as opened:
        image = np.asarray(opened.convert("RGB"))
    prediction = segmenter(image)
    palette = colour_map(len(segmenter.categories) + 1)
    # Instances below this score are many and faint; the report shows all.
    confident = [instance for instance in prediction.instances if instance.score >= 0.5]
    pictures = [
        displayed(image),
        overlay_semantic(image, example.semantic(), palette),
        overlay_semantic(image, prediction.semantic, palette),
        overlay_instances(image, confident, names=segmenter.categories),
    ]
    height = round(COLUMN_WIDTH * image.shape[0] / image.shape[1])
    return [picture.resize((COLUMN_WIDTH, height)) for picture in pictures]
