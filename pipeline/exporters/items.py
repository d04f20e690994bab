"""What is exported, and what a format is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ExportedObject:
    """One object of an image.

    Attributes:
        mask: (H, W) bool, with at least one pixel; it may have holes and several parts.
        category: label id from 1, in the order of the categories.
        score: from 0 to 1; None where nothing was scored.
    """

    mask: NDArray[np.bool_]
    category: int
    score: float | None = None


@dataclass(frozen=True)
class ExportedImage:
    """An image with what was found in it.

    Attributes:
        name: POSIX path that it gets below the export's folder of images; no two of an export are
            the same, not even without their suffixes or where upper and lower case are one.
        data: its file, upright, in the format that the suffix of `name` says.
        width, height: in pixels.
        objects: the instance masks, those of the highest score first.
        semantic: (H, W) label map, 0 background, label ids from 1, 65535 where nothing is said;
            None where there are only objects.
        split: `train` or `val`.
        source: where the image came from: a path, or an item of an index dataset.
        facts: what else is known, such as an archive's `rank` and `similarity`; always `sha256`,
            that of the image's own file.
        truth: the true objects; None where they are not known.
    """

    name: str
    data: bytes
    width: int
    height: int
    objects: Sequence[ExportedObject]
    semantic: NDArray[np.uint16] | None = None
    split: str = "train"
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    truth: Sequence[ExportedObject] | None = None


class Exporter(Protocol):
    """A format while it is written; made with `(folder, categories)`, the folder being empty.

    What it has to leave out, it may count in an attribute `counts`, a mapping of names.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None: ...

    def add(self, image: ExportedImage) -> None:
        """Write an image and its labels; images come one at a time and are not kept."""

    def finish(self) -> str:
        """Write what concerns all images; returns the one line of how a tool opens the folder."""
