"""What a benchmark gives to whoever scores on it: categories, examples, groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.labels import LabelMap


@dataclass(frozen=True)
class InstanceTarget:
    """One true object.

    Attributes:
        label_id: 1-based index of its category.
        mask: (H, W) bool; void pixels are no part of it.
        crowd: the mask covers many objects, not told apart (COCO's `iscrowd`): predictions inside
            it are neither right nor wrong.
        area: the pixels that the annotation states, which decide whether COCO calls the object
            small, medium or large; None for those of the mask.
    """

    label_id: int
    mask: NDArray[np.bool_]
    crowd: bool = False
    area: float | None = None


class MaskHeader(NamedTuple):
    """What a file of masks says of itself without its pixels.

    Attributes:
        path: the file.
        size: (H, W) of the image that the masks are of.
        colours: palette index -> RGB, of the indices that may be label ids; empty where the pixel
            values are none of a palette, or where they do not decide.
        standard: the same as the layout prescribes it; empty where it does not.
    """

    path: Path
    size: tuple[int, int]
    colours: Mapping[int, bytes] = {}
    standard: Mapping[int, bytes] = {}


class Example(Protocol):
    """One labelled image; its masks are read when asked for."""

    @property
    def image_id(self) -> str:
        """Name of the image, unique within the benchmark and safe as a file name."""

    @property
    def image_path(self) -> Path:
        """The image file."""

    @property
    def vocabulary(self) -> Sequence[str] | None:
        """The names by label id from 1 asked for in this image, where not the benchmark's own."""

    def mask_headers(self) -> list[MaskHeader]:
        """The files of its masks, of which only the headers are read.

        Raises:
            PipelineError: one is missing or damaged.
        """

    def semantic(self) -> LabelMap:
        """Label ids (H, W): 0 is background, `IGNORE_INDEX` is void."""

    def instances(self) -> list[InstanceTarget]:
        """The true objects, in the order of their numbers."""

    def void(self) -> NDArray[np.bool_]:
        """Pixels (H, W) that belong to no object and are not scored."""


class Benchmark(Protocol):
    """A labelled set to score on."""

    @property
    def categories(self) -> list[str]:
        """Names; the first has label id 1."""

    @property
    def groups(self) -> Mapping[str, frozenset[str]]:
        """Name -> ids of the images that are scored apart as well."""

    @property
    def warnings(self) -> Sequence[str]:
        """What its labels lost when they were read, for `StageRun.warn`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Example]: ...
