"""CVAT for images 1.1: one XML file, masks as runs of the pixels within their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

import numpy as np
from numpy.typing import NDArray

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import crop_mask, write_image
from pipeline.files import write_json
from pipeline.pictures.overlays import colour_map

SCORE = "score"


class Cvat:
    """Writes `images/NAME`, `annotations.xml` and `labels.json`, see `Exporter`.

    `labels.json` is what CVAT's raw constructor of labels takes. The score of an object is an
    attribute of its mask, which CVAT keeps for labels made from that file.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._count = 0
        self._labels = [
            _label(name, colour)
            for name, colour in zip(
                categories, colour_map(len(categories) + 1)[1:].tolist(), strict=True
            )
        ]
        self._file = (folder / "annotations.xml").open("w", encoding="utf-8", newline="\n")
        self._xml = XMLGenerator(self._file, encoding="utf-8", short_empty_elements=True)
        self._xml.startDocument()
        self._open("annotations")
        self._leaf("version", "1.1")
        self._meta()

    def add(self, image: ExportedImage) -> None:
        write_image(self._folder / "images", image)
        size = {"width": image.width, "height": image.height}
        self._open("image", id=self._count, name=image.name, **size)
        for found in image.objects:
            self._mask(found)
        self._close("image")
        self._count += 1

    def finish(self) -> str:
        self._close("annotations")
        self._xml.endDocument()
        self._file.close()
        write_json(self._folder / "labels.json", self._labels)
        return (
            f"CVAT: a task with the labels of {self._folder}/labels.json (Raw) and the files of "
            "images/, then Upload annotations > CVAT 1.1: annotations.xml"
        )

    def _mask(self, found: ExportedObject) -> None:
        left, top, mask = crop_mask(found.mask)
        self._open(
            "mask",
            label=self._categories[found.category - 1],
            source="auto",
            occluded=0,
            rle=", ".join(str(count) for count in _runs(mask)),
            left=left,
            top=top,
            width=mask.shape[1],
            height=mask.shape[0],
            z_order=0,
        )
        if found.score is not None:
            self._leaf("attribute", f"{found.score:.4f}", name=SCORE)
        self._close("mask")

    def _meta(self) -> None:
        for tag in ("meta", "task", "labels"):
            self._open(tag)
        for label in self._labels:
            self._open("label")
            for key in ("name", "color", "type"):
                self._leaf(key, label[key])
            self._open("attributes")
            for attribute in label["attributes"]:
                self._open("attribute")
                for key in ("name", "mutable", "input_type", "default_value"):
                    self._leaf(key, str(attribute[key]))
                self._leaf("values", "")
                self._close("attribute")
            self._close("attributes")
            self._close("label")
        for tag in ("labels", "task", "meta"):
            self._close(tag)

    def _open(self, tag: str, **attributes: Any) -> None:
        texts = {key: str(value) for key, value in attributes.items()}
        self._xml.startElement(tag, AttributesImpl(texts))

    def _close(self, tag: str) -> None:
        self._xml.endElement(tag)
        self._xml.ignorableWhitespace("\n")

    def _leaf(self, tag: str, text: str, **attributes: Any) -> None:
        self._open(tag, **attributes)
        self._xml.characters(text)
        self._close(tag)


def _label(name: str, colour: tuple[int, int, int]) -> dict[str, Any]:
    """A label as CVAT's raw constructor has it."""
    red, green, blue = colour
    score = {
        "name": SCORE,
        "mutable": False,
        "input_type": "text",
        "default_value": "",
        "values": [""],
    }
    color = f"#{red:02x}{green:02x}{blue:02x}"
    return {"name": name, "color": color, "type": "any", "attributes": [score]}


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs along the rows of a mask (height, width), of pixels outside first."""
    values = mask.ravel()
    turns = np.flatnonzero(np.diff(values, prepend=False))
    return np.diff(turns, prepend=0, append=values.size).tolist()
