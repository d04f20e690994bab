"""COCO: `images/`, masks as RLE in `annotations/`, and as polygons in `annotations_polygons/`.

Both folders have `instances_SPLIT.json`, with the same ids. What COCO does not know: an image has
`source` and the `sha256` of the file that it came from, an annotation a `score`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import write_image
from pipeline.exporters.polygons import polygons
from pipeline.formats.rle import coco_annotation, encode_mask

IMAGES, RLES, POLYGONS = "images", "annotations", "annotations_polygons"
SCORE_DIGITS = 6


class Coco:
    """Writes COCO's JSON; see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._num_images = self._num_annotations = 0
        self._files: dict[tuple[str, str], _InstancesFile] = {}

    def add(self, image: ExportedImage) -> None:
        self._num_images += 1
        write_image(self._folder / IMAGES, image)
        entry = {
            "id": self._num_images,
            "file_name": image.name,
            "width": image.width,
            "height": image.height,
            "source": image.source,
            "sha256": image.facts.get("sha256", ""),
        }
        rles, outlines = self._file(RLES, image.split), self._file(POLYGONS, image.split)
        rles.images.append(entry)
        outlines.images.append(entry)
        for item in image.objects:
            self._num_annotations += 1
            annotation = self._annotation(item)
            rles.write(annotation)
            corners = [polygon.ravel().tolist() for polygon in polygons(item.mask)]
            outlines.write(annotation | {"segmentation": corners})

    def finish(self) -> str:
        for file in self._files.values():
            file.close()
        split = min(split for _, split in self._files)
        path = self._folder / RLES / f"instances_{split}.json"
        return f'python -c "from pycocotools.coco import COCO; COCO({str(path)!r})"'

    def _annotation(self, item: ExportedObject) -> dict[str, Any]:
        return coco_annotation(
            encode_mask(item.mask),
            annotation_id=self._num_annotations,
            image_id=self._num_images,
            category_id=item.category,
            score=None if item.score is None else round(item.score, SCORE_DIGITS),
        )

    def _file(self, folder: str, split: str) -> _InstancesFile:
        key = folder, split
        if key not in self._files:
            path = self._folder / folder / f"instances_{split}.json"
            path.parent.mkdir(exist_ok=True)
            self._files[key] = _InstancesFile(path, self._categories)
        return self._files[key]


class _InstancesFile:
    """A COCO file whose annotations are written as they come."""

    def __init__(self, path: Path, categories: Sequence[str]) -> None:
        self.images: list[dict[str, Any]] = []
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._separator = "\n"
        listed = [
            {"id": number, "name": name, "supercategory": ""}
            for number, name in enumerate(categories, start=1)
        ]
        head = f'{{"info": {{}}, "licenses": [],\n"categories": {_lines(listed)},\n'
        self._file.write(head + '"annotations": [')

    def write(self, annotation: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(annotation, separators=(",", ":")))
        self._separator = ",\n"

    def close(self) -> None:
        self._file.write(f'\n],\n"images": {_lines(self.images)}}}\n')
        self._file.close()


def _lines(values: Sequence[Any]) -> str:
    """A JSON list, an entry a line."""
    return "[\n" + ",\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n]"
