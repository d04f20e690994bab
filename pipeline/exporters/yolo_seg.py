"""Ultralytics' segmentation data: `images/SPLIT/`, `labels/SPLIT/` and `data.yaml`.

A line of a label file is an object: its class from 0, then the corners of one polygon as shares of
width and height. Several parts and holes are joined by ways there and back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import write_image, write_named
from pipeline.exporters.polygons import one_polygon

DATA = "data.yaml"


class YoloSeg:
    """Writes Ultralytics' layout; see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._splits: set[str] = set()

    def add(self, image: ExportedImage) -> None:
        self._splits.add(image.split)
        write_image(self._folder / "images" / image.split, image)
        name = PurePosixPath(image.name).with_suffix(".txt").as_posix()
        text = "".join(_line(item, image) for item in image.objects)
        write_named(self._folder / "labels" / image.split, name, text.encode())

    def finish(self) -> str:
        # Ultralytics asks for both splits, and finds them beside the file where `path` is left out.
        train = "train" if "train" in self._splits else "val"
        val = "val" if "val" in self._splits else "train"
        names = "".join(
            f"  {place}: {json.dumps(name, ensure_ascii=False)}\n"
            for place, name in enumerate(self._categories)
        )
        text = f"train: images/{train}\nval: images/{val}\nnames:\n{names}"
        (self._folder / DATA).write_text(text, encoding="utf-8")
        return f"yolo segment train model=yolo11n-seg.pt data={self._folder / DATA}"


def _line(item: ExportedObject, image: ExportedImage) -> str:
    corners = one_polygon(item.mask) / (image.width, image.height)
    numbers = " ".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in corners.ravel())
    return f"{item.category - 1} {numbers}\n"
