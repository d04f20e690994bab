"""PASCAL VOC's segmentation layout: reader and writer.

ROOT/JPEGImages/ID.jpg                    the image
ROOT/SegmentationClass/ID.png             palette index = label id, 255 = void
ROOT/SegmentationObject/ID.png            palette index = number of the object, 255 = void; only
                                          where objects are scored
ROOT/ImageSets/Segmentation/SPLIT.txt     one ID a line
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.benchmarks.example import Example, InstanceTarget, MaskHeader
from pipeline.benchmarks.label_map import check_label_ids, colours_of, read_header, read_indices
from pipeline.benchmarks.lists import check_files, check_folder, read_groups, read_ids
from pipeline.errors import PipelineError
from pipeline.files import write_bytes
from pipeline.formats.labels import IGNORE_INDEX, LABEL_TYPE, LabelMap

VOID = 255
IMAGES = "JPEGImages"
CLASSES = "SegmentationClass"
OBJECTS = "SegmentationObject"
SPLITS = "ImageSets/Segmentation"
WRITTEN = re.compile(f"{IMAGES}|{CLASSES}|{OBJECTS}|ImageSets")  # all that `VocWriter` writes


@dataclass(frozen=True)
class VocExample:
    """One image of a `VocBenchmark`; see `Example`."""

    root: Path
    image_id: str
    num_categories: int
    has_objects: bool = True
    vocabulary: None = None

    @property
    def image_path(self) -> Path:
        return self.root / IMAGES / f"{self.image_id}.jpg"

    @property
    def class_path(self) -> Path:
        return self.root / CLASSES / f"{self.image_id}.png"

    @property
    def object_path(self) -> Path:
        return self.root / OBJECTS / f"{self.image_id}.png"

    def mask_headers(self) -> list[MaskHeader]:
        standard = _standard_colours(self.num_categories)
        paths = (self.class_path, self.object_path) if self.has_objects else (self.class_path,)
        return [read_header(path, standard, standard) for path in paths]

    def semantic(self) -> LabelMap:
        labels = _read_map(self.class_path)
        check_label_ids(labels, self.num_categories, self.class_path)
        return labels

    def objects(self) -> LabelMap:
        """Numbers (H, W) of the objects, of any category or none: 0 outside, void `IGNORE_INDEX`.

        Raises:
            PipelineError: the mask is missing, unreadable or differs in size from the other one.
        """
        numbers = _read_map(self.object_path)
        shape = read_header(self.class_path).size
        if numbers.shape != shape:
            raise PipelineError(
                f"{self.object_path}: {_size(numbers.shape)} pixels, but {self.class_path} has "
                f"{_size(shape)}"
            )
        return numbers

    def instances(self) -> list[InstanceTarget]:
        """The objects, each of the category that most of its pixels have."""
        semantic, objects = self.semantic(), self.objects()
        targets = []
        for number in np.unique(objects[objects > 0]):
            mask = (objects == number) & (semantic > 0)
            if mask.any():
                label_id = int(np.bincount(semantic[mask]).argmax())
                targets.append(InstanceTarget(label_id, mask))
        return targets

    def void(self) -> NDArray[np.bool_]:
        void = self.semantic() == IGNORE_INDEX
        return void | (self.objects() == IGNORE_INDEX) if self.has_objects else void


class VocBenchmark:
    """A split of a folder in PASCAL VOC's layout; see `Benchmark`."""

    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        categories: list[str],
        groups: Mapping[str, str],
        objects: bool = True,
    ) -> None:
        """Read the lists and check that every image has its masks.

        Args:
            root: the folder that holds `JPEGImages` and its neighbours.
            split: name of a file of `ImageSets/Segmentation`, without `.txt`.
            categories: names in the order of the label ids, without background.
            groups: name -> another such file, whose images must be in `split`.
            objects: whether there are masks of objects, which only scores of objects need.

        Raises:
            PipelineError: a folder, list, image or mask is missing, or a list is empty or repeats
                itself.
        """
        self.root = Path(root)
        self.categories = list(categories)
        self._has_objects = objects
        self._check_folders()
        self._ids = read_ids(self._list_path(split))
        self.groups = read_groups(groups, self._list_path, self._ids, split)
        self._check_files()

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Example]:
        for image_id in self._ids:
            yield VocExample(
                self.root, image_id, len(self.categories), has_objects=self._has_objects
            )

    def _list_path(self, name: str) -> Path:
        return self.root / SPLITS / f"{name}.txt"

    def _check_folders(self) -> None:
        check_folder(self.root, "a benchmark in VOC's layout")
        parts = (IMAGES, *self._mask_folders(), SPLITS)
        for part in parts:
            check_folder(self.root / part, f"VOC's layout: {', '.join(parts)}")

    def _check_files(self) -> None:
        for part, suffix in ((IMAGES, ".jpg"), *((part, ".png") for part in self._mask_folders())):
            names = (f"{image_id}{suffix}" for image_id in self._ids)
            check_files(self.root / part, names, "the split lists its image")

    def _mask_folders(self) -> tuple[str, ...]:
        return (CLASSES, OBJECTS) if self._has_objects else (CLASSES,)


class VocWriter:
    """Writes images with their masks in PASCAL VOC's layout; same input, same bytes."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def add(
        self,
        image_id: str,
        jpeg: bytes,
        semantic: NDArray[np.integer],
        instances: NDArray[np.integer],
    ) -> None:
        """Write one image and its two masks.

        Args:
            image_id: file stem.
            jpeg: the encoded image.
            semantic: (H, W) label ids; `IGNORE_INDEX` or 255 is void.
            instances: (H, W) object numbers from 1, 0 outside; `IGNORE_INDEX` or 255 is void.

        Raises:
            ValueError: the maps differ in shape, or hold a value that VOC's format cannot.
        """
        if semantic.shape != instances.shape:
            raise ValueError(f"semantic {semantic.shape} and instances {instances.shape} differ")
        write_bytes(self.root / IMAGES / f"{image_id}.jpg", jpeg)
        write_bytes(self.root / CLASSES / f"{image_id}.png", encode_index_png(semantic))
        write_bytes(self.root / OBJECTS / f"{image_id}.png", encode_index_png(instances))

    def write_split(self, name: str, image_ids: Iterable[str]) -> None:
        """Write `ImageSets/Segmentation/NAME.txt`."""
        text = "".join(f"{image_id}\n" for image_id in image_ids)
        write_bytes(self.root / SPLITS / f"{name}.txt", text.encode())


def read_index_png(path: Path) -> NDArray[np.uint8]:
    """Palette indices (H, W) of a mask of VOC's, stored with a palette or as greys.

    Raises:
        PipelineError: missing, unreadable, or stored as colours.
    """
    return read_indices(path, modes=("P", "L")).astype(np.uint8)


def _read_map(path: Path) -> LabelMap:
    indices = read_index_png(path)
    return np.where(indices == VOID, IGNORE_INDEX, indices.astype(LABEL_TYPE))


def encode_index_png(indices: NDArray[np.integer]) -> bytes:
    """Palette PNG with VOC's colours of an integer map (H, W); `IGNORE_INDEX` becomes 255.

    Raises:
        ValueError: a value below `IGNORE_INDEX` or above 255.
    """
    if indices.size and (indices.min() < IGNORE_INDEX or indices.max() > VOID):
        raise ValueError(f"values {indices.min()} to {indices.max()}: expected -1 to 255")
    stored = np.where(indices == IGNORE_INDEX, VOID, indices).astype(np.uint8)
    image = Image.fromarray(stored).convert("L")
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def voc_palette() -> NDArray[np.uint8]:
    """VOC's 256 colours (256, 3): the bits of the index, three at a time, from the top."""
    indices = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for shift in range(8):
        for channel in range(3):
            bit = (indices >> (3 * shift + channel)) & 1
            colours[:, channel] |= (bit << (7 - shift)).astype(np.uint8)
    return colours


@cache
def _standard_colours(num_categories: int) -> dict[int, bytes]:
    """VOC's colours of the label ids and of void."""
    return colours_of(voc_palette().tobytes(), (*range(num_categories + 1), VOID))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
