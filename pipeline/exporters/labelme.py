"""labelme, from version 5: a JSON file beside each image, its objects as shapes of type `mask`.

A mask keeps holes and several parts, which a polygon of labelme cannot. labelme reads the labels
from the files; `labels.txt` offers those that no image has.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import all_facts, crop_mask, write_image
from pipeline.files import write_json
from pipeline.formats.images import encode_png

VERSION = "5.2.0"  # of labelme, the first whose `mask` is as it is today


class Labelme:
    """Writes `images/NAME` and `images/NAME.json`, see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories

    def add(self, image: ExportedImage) -> None:
        path = write_image(self._folder / "images", image)
        label_file = {
            "version": VERSION,
            "flags": {},
            "shapes": [self._shape(found) for found in image.objects],
            "imagePath": PurePosixPath(image.name).name,
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
            **all_facts(image),
        }
        write_json(path.with_suffix(".json"), label_file)

    def finish(self) -> str:
        names = "".join(f"{name}\n" for name in self._categories)
        (self._folder / "labels.txt").write_text(names, encoding="utf-8", newline="\n")
        return f"labelme {self._folder}/images --labels {self._folder}/labels.txt"

    def _shape(self, found: ExportedObject) -> dict[str, Any]:
        left, top, mask = crop_mask(found.mask)
        height, width = mask.shape
        return {
            "label": self._categories[found.category - 1],
            "points": [[left, top], [left + width - 1, top + height - 1]],
            "group_id": None,
            "description": "" if found.score is None else f"score {found.score:.4f}",
            "shape_type": "mask",
            "flags": {},
            "mask": base64.b64encode(encode_png(mask)).decode("ascii"),
        }
