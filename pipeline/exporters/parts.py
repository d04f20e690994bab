"""What several formats are made of: files of images, masks within their boxes, rows of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.exporters.items import ExportedImage
from pipeline.files import native_path
from pipeline.formats.rle import encode_mask, mask_box_xywh


class Crop(NamedTuple):
    """A mask within the smallest box around it.

    Attributes:
        left, top: first column and row of the box.
        mask: (height, width) bool, the pixels of the box.
    """

    left: int
    top: int
    mask: NDArray[np.bool_]


def crop_mask(mask: NDArray[np.bool_]) -> Crop:
    """The box of a mask (H, W) that has at least one pixel."""
    left, top, width, height = (int(value) for value in mask_box_xywh(encode_mask(mask)))
    return Crop(left, top, mask[top : top + height, left : left + width])


def write_image(folder: Path, image: ExportedImage) -> Path:
    """Write the file of an image below a folder, under its name; returns its path."""
    return write_named(folder, image.name, image.data)


def write_named(folder: Path, name: str, data: bytes) -> Path:
    """Write a file below a folder, under a name in UTF-8; returns its path on this machine."""
    path = folder / native_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def all_facts(image: ExportedImage) -> dict[str, Any]:
    """Where an image came from, and its facts."""
    return {"source": image.source, **image.facts}


class JsonRows:
    """A JSON file with one long list, written a row at a time, a row a line.

    Args:
        path: the file.
        around: the object that holds the list, without it; None where the list is the whole file.
        key: of the list in that object.
    """

    def __init__(
        self, path: Path, around: Mapping[str, Any] | None = None, key: str = "items"
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._end = "\n]\n" if around is None else "\n]}\n"
        self._between = "["
        if around is not None:
            self._between = f"{as_json(around)[:-1]}{', ' if around else ''}{as_json(key)}: ["

    def add(self, row: Any) -> None:
        """Write a row."""
        self._file.write(f"{self._between}\n{as_json(row)}")
        self._between = ","

    def close(self) -> None:
        """Write the end; a list without rows is a list, too."""
        self._file.write((self._between if self._between != "," else "") + self._end)
        self._file.close()


def as_json(value: Any) -> str:
    """JSON of a value in one line, letters as they are."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
