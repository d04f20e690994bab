"""Label Studio: tasks with predictions as brush masks, and the labelling config that they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from pipeline.exporters.brush import encode_brush
from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import JsonRows, all_facts, write_image
from pipeline.pictures.overlays import colour_map

IMAGE, LABEL = "image", "label"  # names of the config's tags, which results repeat
LOCAL_FILES = "/data/local-files/?d="
README = """\
Open in Label Studio, from this folder:

1. LOCAL_FILES_SERVING_ENABLED=true LOCAL_FILES_DOCUMENT_ROOT="$PWD" label-studio start
   (LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT in Docker)
2. A new project; Settings > Labeling Interface > Code: paste config.xml.
3. Settings > Cloud Storage > Add Source Storage > Local files, with the path of images/ here, and
   save it: it allows the project to show them. Do not synchronise it, that would make other tasks.
4. Import: tasks.json.

Masks are predictions; Label Studio makes an annotation of one when it is opened to be corrected.
"""


class LabelStudio:
    """Writes `images/NAME`, `tasks.json`, `config.xml` and `README.txt`, see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._tasks = JsonRows(folder / "tasks.json")

    def add(self, image: ExportedImage) -> None:
        write_image(self._folder / "images", image)
        scores = [found.score for found in image.objects if found.score is not None]
        prediction: dict[str, Any] = {
            "model_version": "zutis-pipeline",
            "result": [self._region(image, i) for i in range(len(image.objects))],
        }
        if scores:
            prediction["score"] = sum(scores) / len(scores)
        url = LOCAL_FILES + quote(f"images/{image.name}")
        self._tasks.add(
            {"data": {IMAGE: url, **_meta(image)}, "predictions": [prediction]},
        )

    def finish(self) -> str:
        self._tasks.close()
        config = ElementTree.tostring(_config(self._categories), encoding="unicode")
        (self._folder / "config.xml").write_text(config + "\n", encoding="utf-8", newline="\n")
        (self._folder / "README.txt").write_text(README, encoding="utf-8", newline="\n")
        return f"Label Studio: {self._folder}/README.txt says how to serve images/ and import"

    def _region(self, image: ExportedImage, index: int) -> dict[str, Any]:
        found: ExportedObject = image.objects[index]
        region = {
            "id": f"object-{index + 1}",
            "type": "brushlabels",
            "from_name": LABEL,
            "to_name": IMAGE,
            "original_width": image.width,
            "original_height": image.height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": encode_brush(found.mask),
                "brushlabels": [self._categories[found.category - 1]],
            },
        }
        return region if found.score is None else {**region, "score": found.score}


def _meta(image: ExportedImage) -> dict[str, Any]:
    """Columns of Label Studio's table of tasks."""
    return {"name": image.name, "split": image.split, **all_facts(image)}


def _config(categories: Sequence[str]) -> ElementTree.Element:
    """The labelling interface: an image and a brush of each category."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}", zoom="true")
    labels = ElementTree.SubElement(view, "BrushLabels", name=LABEL, toName=IMAGE)
    colours = colour_map(len(categories) + 1)[1:].tolist()
    for category, (red, green, blue) in zip(categories, colours, strict=True):
        background = f"#{red:02x}{green:02x}{blue:02x}"
        ElementTree.SubElement(labels, "Label", value=category, background=background)
    ElementTree.indent(view)
    return view
