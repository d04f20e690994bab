"""CUB-200-2011: one bird an image, asked for as "bird" or by the name of its breed.

ROOT/images.txt                          NUMBER FOLDER/STEM.jpg
ROOT/image_class_labels.txt              NUMBER CLASS
ROOT/train_test_split.txt                NUMBER 1 (training) or 0 (test)
ROOT/classes.txt                         CLASS 001.Black_footed_Albatross
ROOT/images/FOLDER/STEM.jpg              the image
ROOT/segmentations/FOLDER/STEM.png       grey levels: how far the annotators agree on the bird

The segmentations are an archive of their own (segmentations.tgz), unpacked into ROOT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pipeline.benchmarks.example import Example
from pipeline.benchmarks.label_map import HALF, LabelMapExample, read_greys
from pipeline.benchmarks.lists import (
    check_files,
    check_folder,
    check_unique,
    joined_id,
    read_groups,
    read_lines,
)
from pipeline.errors import PipelineError
from pipeline.formats.labels import LABEL_TYPE, LabelMap

IMAGES = "images"
MASKS = "segmentations"
IMAGE_LIST = "images.txt"
BREED_LIST = "image_class_labels.txt"
SPLIT_LIST = "train_test_split.txt"
CLASS_LIST = "classes.txt"
SPLITS = {"train": "1", "test": "0"}


class CubBenchmark:
    """A split of CUB-200-2011; see `Benchmark`.

    Label id 1 is the bird in every image. With `names` `breed` the vocabulary of an image is the
    name of its breed (ZUTIS section 4.3, table 6), with `bird` the benchmark's only category.
    """

    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        categories: list[str],
        groups: Mapping[str, str],
        names: Literal["bird", "breed"] = "bird",
    ) -> None:
        """Read the lists and check that every image of the split has its mask.

        Args:
            root: the folder `CUB_200_2011`.
            split: `train` or `test`.
            categories: one name, that of label id 1.
            groups: name -> a file below `root` of image ids, `FOLDER__STEM` with `_` for dots.
            names: which name an image is asked for.

        Raises:
            PipelineError: a folder, list, image or mask is missing, lists that do not fit each
                other, or not one category.
        """
        self.root = Path(root)
        self.categories = list(categories)
        if len(self.categories) != 1:
            raise PipelineError(
                f"{self.root}: {len(self.categories)} categories; expected one, [bird]: breeds are "
                "no categories, `names: breed` asks for each image's own"
            )
        if split not in SPLITS:
            raise PipelineError(
                f"{self.root}: no split {split!r}; expected one of {', '.join(SPLITS)}"
            )
        check_folder(self.root, "CUB_200_2011 of the data set")
        self._files = self._read_split(split)
        self._vocabularies = self._read_vocabularies(names)
        check_unique((_image_id(file) for file in self._files.values()), self.root)
        self._check_files()
        image_ids = map(_image_id, self._files.values())
        self.groups = read_groups(groups, self.root.joinpath, image_ids, split)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Example]:
        for number, file in self._files.items():
            yield LabelMapExample(
                _image_id(file),
                self.root / IMAGES / file,
                self.root / MASKS / _mask_file(file),
                read_bird_mask,
                self._vocabularies[number],
            )

    def _read_split(self, split: str) -> dict[str, str]:
        """Number -> FOLDER/STEM.jpg of the images of a split, in the order of images.txt."""
        files = self._read_table(IMAGE_LIST)
        splits = self._read_table(SPLIT_LIST)
        self._check_numbers(splits, files, SPLIT_LIST)
        for number, file in files.items():
            path = Path(file)
            if len(path.parts) != 2 or ".." in path.parts or path.suffix != ".jpg":
                raise PipelineError(
                    f"{self.root / IMAGE_LIST}: image {number}: {file!r}; expected FOLDER/STEM.jpg"
                )
        chosen = {number: file for number, file in files.items() if splits[number] == SPLITS[split]}
        if not chosen:
            raise PipelineError(f"{self.root / SPLIT_LIST}: no image of split {split!r}")
        return chosen

    def _read_vocabularies(self, names: Literal["bird", "breed"]) -> dict[str, tuple[str, ...]]:
        """Number of an image -> the name that it is asked for; images of a breed share theirs."""
        if names == "bird":
            return dict.fromkeys(self._files, tuple(self.categories))
        breeds = self._read_table(BREED_LIST)
        self._check_numbers(breeds, self._files, BREED_LIST)
        classes = {
            number: (breed_name(text),) for number, text in self._read_table(CLASS_LIST).items()
        }
        wanted = dict.fromkeys(breeds[number] for number in self._files)
        self._check_numbers(classes, wanted, CLASS_LIST)
        return {number: classes[breeds[number]] for number in self._files}

    def _read_table(self, name: str) -> dict[str, str]:
        """First word -> rest of each line."""
        path = self.root / name
        rows: dict[str, str] = {}
        for line in read_lines(path, "lines of a number and a value, as in CUB-200-2011"):
            number, _, value = line.partition(" ")
            if not value or number in rows:
                reason = "is listed twice" if value else "has no value"
                raise PipelineError(f"{path}: line {line!r}: number {number} {reason}")
            rows[number] = value.strip()
        return rows

    def _check_numbers(
        self, rows: Mapping[str, object], wanted: Mapping[str, object], name: str
    ) -> None:
        for number in wanted:
            if number not in rows:
                raise PipelineError(
                    f"{self.root / name}: number {number} is missing, which the other lists name"
                )

    def _check_files(self) -> None:
        check_folder(self.root / IMAGES, "the images, one folder a breed")
        check_folder(
            self.root / MASKS,
            "the masks of segmentations.tgz, which is an archive of its own; unpack it there",
        )
        folders: dict[str, list[str]] = {}
        for file in self._files.values():
            folder, name = file.split("/")
            folders.setdefault(folder, []).append(name)
        for folder, names in folders.items():
            for part, expected in ((IMAGES, names), (MASKS, map(_mask_file, names))):
                check_folder(self.root / part / folder, f"files that {IMAGE_LIST} names")
                check_files(self.root / part / folder, expected, f"{IMAGE_LIST} names its image")


def breed_name(text: str) -> str:
    """The name that a class of CUB is asked for: `001.Black_footed_Albatross` -> its words."""
    return re.sub(r"^\d+\.", "", text).replace("_", " ")


def read_bird_mask(path: Path) -> LabelMap:
    """Label map (H, W) of a segmentation of CUB: 1 where at least half the levels say bird.

    ZUTIS's code for CUB is not published; the usual threshold is half of the highest level.

    Raises:
        PipelineError: missing or unreadable.
    """
    return (read_greys(path) >= HALF).astype(LABEL_TYPE)


def _image_id(file: str) -> str:
    path = Path(file)
    return joined_id(path.parent.name, path.stem)


def _mask_file(file: str) -> str:
    return f"{file.removesuffix('.jpg')}.png"
