"""ImageNet-S: 50, 300 or 919 categories of ImageNet with label maps.

ROOT/SPLIT/nXXXXXXXX/STEM.JPEG               the image; ROOT is ImageNetS50, S300 or S919
ROOT/SPLIT-segmentation/nXXXXXXXX/STEM.png   RGB; label id = red + 256 green, 0 other, 1000 void

Label ids follow the sorted WordNet ids, that is the folders (data set's README, "How to match").
Splits with masks are `validation` and `train-semi`; those of `test` stay on the data set's server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.benchmarks.example import Example
from pipeline.benchmarks.label_map import LabelMapExample, check_label_ids, read_rgb
from pipeline.benchmarks.lists import (
    check_folder,
    check_unique,
    joined_id,
    paired_stems,
    read_groups,
    subfolders,
)
from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX, LABEL_TYPE, LabelMap

TEST = "test"
IMAGE_SUFFIX = ".JPEG"
VOID = 1000


class ImageNetSBenchmark:
    """A split of an ImageNet-S folder; see `Benchmark`."""

    warnings: tuple[str, ...] = ()

    def __init__(
        self, root: Path, *, split: str, categories: list[str], groups: Mapping[str, str]
    ) -> None:
        """List the folders and check that every image has its label map.

        Args:
            root: the folder `ImageNetS50`, `ImageNetS300` or `ImageNetS919`.
            split: name of the folder of images.
            categories: names in the order of the label ids, as many as the split has folders.
            groups: name -> a file below `root` of image ids, `nXXXXXXXX__STEM`.

        Raises:
            PipelineError: a folder, image or label map is missing, or the number of folders is not
                that of the categories.
        """
        self.root = Path(root)
        self.categories = list(categories)
        check_folder(self.root, "ImageNetS50, ImageNetS300 or ImageNetS919 of the data set")
        self._image_dir = self.root / split
        self._mask_dir = self.root / f"{split}-segmentation"
        check_folder(self._image_dir, f"the images of split {split!r}, one folder a category")
        self._check_masks(split)
        self._pairs = paired_stems(
            self._image_dir, self._mask_dir, self._find_folders(), image_suffix=IMAGE_SUFFIX
        )
        check_unique((joined_id(*pair) for pair in self._pairs), self.root)
        image_ids = (joined_id(*pair) for pair in self._pairs)
        self.groups = read_groups(groups, self.root.joinpath, image_ids, split)

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Example]:
        for folder, stem in self._pairs:
            yield LabelMapExample(
                joined_id(folder, stem),
                self._image_dir / folder / f"{stem}{IMAGE_SUFFIX}",
                self._mask_dir / folder / f"{stem}.png",
                self._decode,
            )

    def _check_masks(self, split: str) -> None:
        if self._mask_dir.is_dir():
            return
        if split == TEST:
            raise PipelineError(
                f"{self._mask_dir}: no such folder; the label maps of the test split are not "
                "public, the data set's server (https://LUSSeg.github.io) scores predictions: "
                f"score on split `validation` here, or segment the images of {self._image_dir} "
                "with `pipeline predict` and submit the result"
            )
        raise PipelineError(
            f"{self._mask_dir}: no such folder; expected the label maps of split {split!r}, which "
            "the data set's releases hold (script datapreparation_anno.sh of LUSSeg/ImageNet-S)"
        )

    def _find_folders(self) -> list[str]:
        """Names of the categories' folders: as many as categories, else the label ids differ."""
        folders = subfolders(self._image_dir)
        if len(folders) != len(self.categories):
            raise PipelineError(
                f"{self._image_dir}: {len(folders)} folders, but the benchmark has "
                f"{len(self.categories)} categories; expected one folder each: `categories` must "
                "be imagenet_s50, imagenet_s300 or imagenet_s919, as the data are"
            )
        return folders

    def _decode(self, path: Path) -> LabelMap:
        channels = read_rgb(path).astype(np.int32)
        labels = channels[..., 0] + 256 * channels[..., 1]
        labels[labels == VOID] = IGNORE_INDEX
        check_label_ids(labels, len(self.categories), path)
        return labels.astype(LABEL_TYPE)
