"""16-bit PNGs: `images/`, `instances/STEM.png`, `semantic/STEM.png` and `instances.json`.

A pixel of an instance PNG is the id of an object of that image from 1, 0 is none; where objects
overlap, the first keeps the pixel. A pixel of a semantic PNG is a label id, 65535 where nothing is
said. `instances.json` has the categories, and of each image the ids with category, score and area.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.exporters.items import ExportedImage
from pipeline.exporters.maps import label_map, object_map
from pipeline.exporters.parts import write_image, write_named
from pipeline.files import write_json
from pipeline.formats.images import encode_png

IMAGES, INSTANCES, SEMANTIC, LISTED = "images", "instances", "semantic", "instances.json"
MOST = 65535


class Png16:
    """Writes 16-bit PNGs; see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._images: list[dict[str, Any]] = []

    def add(self, image: ExportedImage) -> None:
        if len(image.objects) > MOST:
            raise PipelineError(
                f"--to png16: {image.source}: {len(image.objects)} objects, at most {MOST}; "
                "raise --min-score"
            )
        name = f"{PurePosixPath(image.name).stem}.png"
        numbers = object_map(image)
        write_image(self._folder / IMAGES, image)
        write_named(self._folder / INSTANCES, name, encode_png(numbers))
        write_named(self._folder / SEMANTIC, name, encode_png(label_map(image)))
        areas = np.bincount(numbers.ravel(), minlength=len(image.objects) + 1).tolist()
        self._images.append(
            {
                "image": f"{IMAGES}/{image.name}",
                "instances": f"{INSTANCES}/{name}",
                "semantic": f"{SEMANTIC}/{name}",
                "width": image.width,
                "height": image.height,
                "split": image.split,
                "objects": [
                    {
                        "id": number,
                        "category_id": item.category,
                        "category": self._categories[item.category - 1],
                        "score": item.score,
                        "area": areas[number],
                    }
                    for number, item in enumerate(image.objects, start=1)
                ],
            }
        )

    def finish(self) -> str:
        categories = [
            {"id": number, "name": name} for number, name in enumerate(self._categories, start=1)
        ]
        content = {"categories": categories, "images": self._images}
        write_json(self._folder / LISTED, content)
        return f"any reader of 16-bit PNGs, such as Pillow: {self._folder / INSTANCES}"
