"""Pictures of stored predictions: spread over a benchmark, and its best and worst ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.benchmarks import Benchmark, Example
from pipeline.files import replace_dir, write_json
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX
from pipeline.formats.predictions import PredictionStore, StoredPrediction
from pipeline.formats.rle import RleObject, decode_mask, mask_box_xywh
from pipeline.pictures.overlays import (
    DRAWN_INSTANCES,
    colour_map,
    displayed,
    grid,
    overlay_errors,
    overlay_instances,
    overlay_semantic,
)
from pipeline.scoring.board import percent

INDEX = "index.json"
EXTREMES = 6


@dataclass(frozen=True)
class DrawnObject:
    """A stored object as `overlay_instances` reads it."""

    label_id: int
    score: float
    mask: NDArray[np.bool_]
    bbox_xyxy: tuple[int, int, int, int]


def drawn_objects(objects: Sequence[RleObject]) -> Iterator[DrawnObject]:
    """The best objects with their masks, as many as a picture shows."""
    for item in islice(objects, DRAWN_INSTANCES):
        x, y, width, height = (int(value) for value in mask_box_xywh(item.rle))
        box = (x, y, x + width - 1, y + height - 1)
        yield DrawnObject(item.label_id, item.score, decode_mask(item.rle), box)


def write_pictures(
    out_dir: Path,
    benchmark: Benchmark,
    store: PredictionStore,
    *,
    image_miou: Mapping[str, float],
    load: Callable[[Example], Image.Image],
    count: int,
    background: bool = True,
) -> None:
    """Pictures of `count` images spread over the benchmark, and of the best and worst ones.

    `index.json` lists file, image id, mIoU and kind (spread, best, worst); best and worst are in
    order, among the images that show an object.

    Args:
        out_dir: folder, replaced as a whole.
        benchmark: its examples.
        store: their predictions.
        image_miou: image id -> mIoU in [0, 1], of the images that can be ranked.
        load: reads the image that was predicted on.
        count: 0 for no picture at all.
        background: whether label id 0 is scored; else it is void in the picture of errors.
    """
    chosen = _choose([example.image_id for example in benchmark], image_miou, count=count)
    wanted = {image_id for image_ids in chosen.values() for image_id in image_ids}
    drawn = set()
    with replace_dir(out_dir) as folder:
        for number, example in enumerate(benchmark):
            image_id = example.image_id
            if image_id in wanted and (prediction := store.get(number, image_id)) is not None:
                names = example.vocabulary or benchmark.categories
                target = example.semantic()
                if not background:
                    target = np.where(target == BACKGROUND, IGNORE_INDEX, target)
                picture = _draw(load(example), target, prediction, names)
                picture.save(folder / f"{image_id}.png")
                drawn.add(image_id)
        index = [
            {
                "file": f"{image_id}.png",
                "image_id": image_id,
                "miou": percent(image_miou[image_id]) if image_id in image_miou else None,
                "kind": kind,
            }
            for kind, image_ids in chosen.items()
            for image_id in image_ids
            if image_id in drawn
        ]
        write_json(folder / INDEX, index)


def _choose(
    image_ids: Sequence[str], image_miou: Mapping[str, float], *, count: int
) -> dict[str, list[str]]:
    """Which images are drawn, by kind."""
    if count == 0:
        return {}
    spread = np.linspace(0, len(image_ids) - 1, min(count, len(image_ids))).round().astype(int)
    ranked = sorted(image_miou, key=lambda image_id: (image_miou[image_id], image_id))
    extremes = min(EXTREMES, len(ranked) // 2)
    return {
        "spread": [image_ids[index] for index in spread],
        "best": ranked[len(ranked) - extremes :][::-1],
        "worst": ranked[:extremes],
    }


def _draw(
    image: Image.Image,
    target: NDArray[np.integer],
    prediction: StoredPrediction,
    names: Sequence[str],
) -> Image.Image:
    """Image, objects (where there are predicted ones), label map and errors, two in a row."""
    pixels, labels = np.asarray(image), prediction.labels
    pictures = [displayed(pixels)]
    if prediction.objects is not None:
        pictures.append(overlay_instances(pixels, drawn_objects(prediction.objects), names=names))
    pictures.append(overlay_semantic(pixels, labels, colour_map(len(names) + 1), names=names))
    pictures.append(overlay_errors(pixels, labels, target))
    return grid(pictures, columns=2)
