"""Label maps as index PNGs beside a folder of images: PASCAL Context, COCO-Stuff and their like.

ROOT/IMAGES/ID.jpg     the image
ROOT/LABELS/ID.png     pixel value = label id, or a value that `values` maps to one
ROOT/IMAGE_LIST        one ID a line
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.benchmarks.example import Example
from pipeline.benchmarks.label_map import LabelMapExample, read_indices
from pipeline.benchmarks.lists import check_files, check_folder, file_stems, read_groups, read_ids
from pipeline.errors import PipelineError
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap

NUM_VALUES = 2**16
NUM_COLOURS = 256  # of a palette
UNKNOWN = IGNORE_INDEX - 1
SPLIT = "{split}"


class IndexPngBenchmark:
    """Images with one index PNG each; see `Benchmark`."""

    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        categories: list[str],
        groups: Mapping[str, str],
        images: str,
        labels: str,
        image_list: str = "",
        image_suffix: str = ".jpg",
        label_suffix: str = ".png",
        values: Sequence[int] = (),
        void_values: Sequence[int] = (255,),
        other: Literal["background", "void"] = "background",
    ) -> None:
        """Read the list and check that every image has its label map.

        Args:
            root: folder of the benchmark.
            split: stands for `{split}` in the paths below.
            categories: names in the order of the label ids, without background.
            groups: name -> the word for `{split}` in `image_list` that gives the group's list, or,
                if `image_list` has no `{split}`, the path of a list below `root`.
            images: folder of the images, below `root`.
            labels: folder of the label maps, below `root`.
            image_list: file of ids, below `root`; empty: every file of `labels`.
            image_suffix: what follows the id in the name of an image.
            label_suffix: what follows it in the name of a label map.
            values: pixel values of label ids 1, 2, ...; all others but `void_values` are `other`.
                Empty: the pixel values are the label ids, 0 is `other`, and a value beyond the
                categories is an error.
            void_values: pixel values that are never scored.
            other: what the remaining pixels are.

        Raises:
            PipelineError: a folder, list, image or label map is missing, or the values do not fit
                the categories.
        """
        self.root = Path(root)
        self.categories = list(categories)
        self._table = _label_table(len(self.categories), values, void_values, other)
        last = max(values, default=len(self.categories))
        indices = (*range(last + 1), *void_values)
        self._indices = tuple(index for index in indices if index < NUM_COLOURS)
        self._suffixes = image_suffix, label_suffix
        check_folder(self.root, "a benchmark of images and index PNGs")
        self._image_dir = self.root / images.replace(SPLIT, split)
        self._label_dir = self.root / labels.replace(SPLIT, split)
        check_folder(self._image_dir, "the benchmark's images")
        check_folder(self._label_dir, "one index PNG an image")
        self._ids = self._find_ids(image_list, split)
        self.groups = read_groups(
            groups,
            lambda name: (
                self.root / (image_list.replace(SPLIT, name) if SPLIT in image_list else name)
            ),
            self._ids,
            split,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Example]:
        image_suffix, label_suffix = self._suffixes
        for image_id in self._ids:
            yield LabelMapExample(
                image_id,
                self._image_dir / f"{image_id}{image_suffix}",
                self._label_dir / f"{image_id}{label_suffix}",
                self._decode,
                indices=self._indices,
            )

    def _find_ids(self, image_list: str, split: str) -> list[str]:
        image_suffix, label_suffix = self._suffixes
        if image_list:
            path = self.root / image_list.replace(SPLIT, split)
            ids, reason = read_ids(path), f"it is listed in {path}"
        else:
            ids = file_stems(self._label_dir, label_suffix)
            reason = f"{self._label_dir} has its label map"
            if not ids:
                raise PipelineError(f"{self._label_dir}: no file ends with {label_suffix!r}")
        check_files(self._image_dir, (f"{stem}{image_suffix}" for stem in ids), reason)
        check_files(self._label_dir, (f"{stem}{label_suffix}" for stem in ids), reason)
        return ids

    def _decode(self, path: Path) -> LabelMap:
        stored = read_indices(path)
        labels = self._table[stored]
        if labels.min(initial=IGNORE_INDEX) == UNKNOWN:
            value = int(stored[labels == UNKNOWN].min())
            raise PipelineError(
                f"{path}: pixel value {value} is neither one of the {len(self.categories)} label "
                "ids nor of `void_values`; correct the benchmark's `categories`, or map the pixel "
                "values by `values`"
            )
        return labels


def _label_table(
    num_categories: int,
    values: Sequence[int],
    void_values: Sequence[int],
    other: Literal["background", "void"],
) -> LabelMap:
    """Label id of every pixel value (65536,); `UNKNOWN` for those that must not occur."""
    remaining = BACKGROUND if other == "background" else IGNORE_INDEX
    if values and len(values) != num_categories:
        raise PipelineError(
            f"values: {len(values)} pixel values for {num_categories} categories; expected one each"
        )
    label_values = list(values) or list(range(1, num_categories + 1))
    taken: set[int] = set()
    for value in (*label_values, *dict.fromkeys(void_values)):
        if not 0 <= value < NUM_VALUES:
            raise PipelineError(f"pixel value {value}: expected 0 to {NUM_VALUES - 1}")
        if value in taken:
            raise PipelineError(
                f"pixel value {value} stands for two label ids, or for one and void; correct "
                "`values`, `void_values` or `categories`"
            )
        taken.add(value)
    table = np.full(NUM_VALUES, remaining if values else UNKNOWN, dtype=LABEL_TYPE)
    table[0] = remaining
    table[label_values] = np.arange(1, num_categories + 1)
    table[list(void_values)] = IGNORE_INDEX
    return table
