"""Images that formats get wrong: names, shapes and sizes of every awkward kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.exporters.items import ExportedImage, ExportedObject, Exporter
from pipeline.formats.images import encode_jpeg, encode_png

CATEGORIES = ("cat", 'red "car" & <van>', "Bär's 熊")
HEIGHT, WIDTH = 23, 41
VOID = 65535


def written(
    exporter: Callable[[Path, Sequence[str]], Exporter], folder: Path
) -> tuple[list[ExportedImage], str]:
    """All images in a format, and the line of how to open them."""
    images = hard_images()
    folder.mkdir(exist_ok=True)
    export = exporter(folder, CATEGORIES)
    for image in images:
        export.add(image)
    return images, export.finish()


def hard_images() -> list[ExportedImage]:
    """Three images: all shapes of masks, no object at all, one pixel of two categories."""
    objects = [
        ExportedObject(_ring(), 1, 0.875),
        ExportedObject(_parts(), 3, 0.5),
        ExportedObject(np.ones((HEIGHT, WIDTH), dtype=bool), 2, 0.25),
        ExportedObject(_pixel(HEIGHT - 1, WIDTH - 1), 2, 0.125),
        ExportedObject(_noise(), 1),
    ]
    semantic = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    semantic[_ring()] = 1
    semantic[_parts()] = 3
    semantic[0] = VOID
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    first = ExportedImage(
        name='boats/it\'s "1" & <2>.jpg',
        data=encode_jpeg(Image.fromarray(pixels)),
        width=WIDTH,
        height=HEIGHT,
        objects=objects,
        semantic=semantic,
        source="photos/IMG 1.jpg",
        facts={"rank": 3, "similarity": 0.25, "archives": [{"rank": 3}, {"rank": 7}]},
        truth=objects[:1],
    )
    empty = ExportedImage(
        name="größe 100%25#?&.v1.png",
        data=encode_png(pixels[:, :7]),
        width=7,
        height=HEIGHT,
        objects=[],
        semantic=np.zeros((HEIGHT, 7), dtype=np.uint16),
    )
    point = ExportedImage(
        name="熊/point.png",
        data=encode_png(pixels[:1, :1]),
        width=1,
        height=1,
        objects=[ExportedObject(np.ones((1, 1), dtype=bool), category) for category in (1, 3)],
        split="val",
    )
    return [first, empty, point]


def _ring() -> NDArray[np.bool_]:
    """A region with a hole of one pixel, and a larger one with an island in it."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:20, 3:30] = True
    mask[4, 5] = False
    mask[6:16, 8:24] = False
    mask[9:12, 12:15] = True
    return mask


def _parts() -> NDArray[np.bool_]:
    """Parts at the corners, of which two touch in a corner only."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = mask[1, 1] = True
    mask[HEIGHT - 3 :, WIDTH - 4 :] = True
    mask[HEIGHT - 1, :3] = True
    return mask


def _pixel(row: int, column: int) -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[row, column] = True
    return mask


def _noise() -> NDArray[np.bool_]:
    return np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.5
