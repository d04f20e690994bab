"""CoCA: 80 categories, one folder of images and one of binary masks each.

ROOT/image/CATEGORY/STEM.jpg      the image
ROOT/binary/CATEGORY/STEM.png     255 inside the objects of the category, 0 outside

The data set numbers no categories; as in ZUTIS's code, label ids follow the sorted names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.benchmarks.example import Example
from pipeline.benchmarks.label_map import HALF, LabelMapExample, read_greys
from pipeline.benchmarks.lists import (
    check_folder,
    check_unique,
    joined_id,
    paired_stems,
    read_groups,
    subfolders,
)
from pipeline.errors import PipelineError
from pipeline.formats.labels import LABEL_TYPE, LabelMap

IMAGES = "image"
MASKS = "binary"
IMAGE_SUFFIX = ".jpg"


class CocaBenchmark:
    """A folder in CoCA's layout; see `Benchmark`."""

    warnings: tuple[str, ...] = ()

    def __init__(
        self, root: Path, *, split: str, categories: list[str], groups: Mapping[str, str]
    ) -> None:
        """List the folders and check that every image has its mask.

        Args:
            root: the folder that holds `image` and `binary`.
            split: of no effect: CoCA has one.
            categories: names of the folders, in the order of the label ids.
            groups: name -> a file below `root` of image ids, `CATEGORY__STEM` with `_` for blanks.

        Raises:
            PipelineError: a folder, image or mask is missing, or a folder is no category.
        """
        self.root = Path(root)
        self.categories = list(categories)
        check_folder(self.root, "CoCA, which has the folders image and binary")
        for part in (IMAGES, MASKS):
            check_folder(self.root / part, "one folder for every category of CoCA")
        self._check_categories()
        self._pairs = paired_stems(
            self.root / IMAGES,
            self.root / MASKS,
            subfolders(self.root / IMAGES),
            image_suffix=IMAGE_SUFFIX,
        )
        check_unique((joined_id(*pair) for pair in self._pairs), self.root)
        image_ids = (joined_id(*pair) for pair in self._pairs)
        self.groups = read_groups(groups, self.root.joinpath, image_ids, split)

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Example]:
        label_ids = {name: label_id for label_id, name in enumerate(self.categories, start=1)}
        for category, stem in self._pairs:
            yield LabelMapExample(
                joined_id(category, stem),
                self.root / IMAGES / category / f"{stem}{IMAGE_SUFFIX}",
                self.root / MASKS / category / f"{stem}.png",
                partial(read_binary_mask, label_id=label_ids[category]),
            )

    def _check_categories(self) -> None:
        for part in (IMAGES, MASKS):
            folders = subfolders(self.root / part)
            for name in sorted(set(folders) ^ set(self.categories)):
                path = self.root / part / name
                if name in folders:
                    raise PipelineError(
                        f"{path}: {name!r} is none of the {len(self.categories)} categories of the "
                        "benchmark; correct its `categories`, or remove the folder"
                    )
                raise PipelineError(
                    f"{path}: no such folder; expected one for every category of the benchmark"
                )


def read_binary_mask(path: Path, *, label_id: int) -> LabelMap:
    """Label map (H, W) of a mask of CoCA: `label_id` inside, background outside.

    ZUTIS's code takes the value 255 and leaves any other as it is; masks hold 0 and 255. Here the
    upper half of the levels is inside, so that soft edges do no harm.

    Raises:
        PipelineError: missing, unreadable, or its levels are all in the lower half without all
            being 0, as in a mask of 0 and 1.
    """
    levels = read_greys(path)
    brightest = int(levels.max(initial=0))
    if 0 < brightest < HALF:
        raise PipelineError(
            f"{path}: the highest pixel value is {brightest}; expected 255 inside the objects and "
            "0 outside"
        )
    return np.where(levels >= HALF, label_id, 0).astype(LABEL_TYPE)
