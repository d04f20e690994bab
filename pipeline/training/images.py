"""Whole images to train on, with their truth or without: pools, and training images of them.

A pool gives RGB images with label maps (H, W): 0 background, k the k-th category that is trained,
`IGNORE_INDEX`, `UNLABELLED`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline.benchmarks.example import Benchmark, Example
from pipeline.errors import PipelineError, listing
from pipeline.files import digest
from pipeline.formats.decisions import NOTHING_DECIDED, Decisions
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, UNLABELLED, LabelMap
from pipeline.formats.shards import open_samples, read_manifest
from pipeline.formats.sources import SourceSpec, image_name, list_images, read_image
from pipeline.training.augmentation import augment
from pipeline.training.settings import Augmentation, Truth
from pipeline.training.training_set import Composed
from pipeline.vocabulary.categories import plain_name, unseen_label_ids

# So many unreadable images in a row are no accident.
MAX_IN_A_ROW = 100
KEPT_ORDERS = 2  # workers prepare the next epoch while this one ends
KEPT_TABLES = 256

Labelled = tuple[Image.Image, LabelMap]


class Pool(Protocol):
    """Images by number; may be pickled, and sent to worker processes."""

    @property
    def fingerprint(self) -> Any:
        """Of the files that it reads, representable in JSON."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is odd about it."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What is counted of it besides its images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Labelled:
        """RGB image, and (H, W) int16 labels.

        Raises:
            ImageError: the image cannot be read.
        """

    def name(self, index: int) -> str:
        """What lists and messages call an image."""


class ArchivePool:
    """The images of mask shards, each once, with what a teacher stored of them or without labels.

    An image that a person has corrected is labelled by that.

    Args:
        masks_dir: folder of mask shards.
        labels_dir: folder of label shards, joined by key; None: all pixels are unlabelled.
        categories: names by label id from 1, which the labels must be of.
        background: whether label id 0 is one of those that are trained; else it is void.
        confidence_threshold: pixels of less confidence are void.
        decisions: what a person has said of the images; one whose labels are rejected in any of its
            archives is left out.

    Raises:
        PipelineError: shards are missing or damaged, hold no sample, belong to other categories or
            lack an image.
    """

    def __init__(
        self,
        masks_dir: Path,
        labels_dir: Path | None = None,
        *,
        categories: Sequence[str],
        background: bool = True,
        confidence_threshold: float = 0.0,
        decisions: Decisions = NOTHING_DECIDED,
    ) -> None:
        self._store = open_samples(masks_dir, members=("jpg",))
        first = {_image_key(key): index for index, key in reversed([*enumerate(self._store.keys)])}
        decided = decisions.of_samples(self._store, categories)
        self._corrected = decided.corrected
        for index in decided.left_out:
            first.pop(_image_key(self._store.keys[index]), None)
        self.counts: Mapping[str, int] = decided.counts
        self.warnings: Sequence[str] = decided.warnings
        self._indices = sorted(first.values())
        if not self._indices:
            raise PipelineError(f"{masks_dir}: no samples; run the mask stage again")
        self._background = background
        self._threshold = confidence_threshold
        self._labels = LabelStore(labels_dir) if labels_dir else None
        if self._labels is not None:
            self._labels.check(categories, [self._store.keys[index] for index in self._indices])
        folders = [masks_dir, *([labels_dir] if labels_dir else [])]
        self.fingerprint = [
            shard["sha256"] for folder in folders for shard in read_manifest(folder)["shards"]
        ] + decided.fingerprint
        self._by_name = {name: label_id for label_id, name in enumerate(categories, start=1)}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Labelled:
        place = self._indices[index]
        image = load_image(self._store.member(place, "jpg"))
        if place in self._corrected:
            labels, _ = self._corrected[place].maps(self._by_name, (image.height, image.width))
        elif self._labels is None:
            return image, _unlabelled(image)
        else:
            labels, confidence = self._labels.get(self._store.keys[place])
            labels[confidence < self._threshold] = IGNORE_INDEX
        if not self._background:
            labels[labels == BACKGROUND] = IGNORE_INDEX
        return image, _fitting(labels, image, self.name(index))

    def name(self, index: int) -> str:
        return self._store.keys[self._indices[index]]


class SourcePool:
    """The images of a source, such as a folder; all of their pixels are unlabelled.

    Args:
        name: of the source.
        source: format, root and pattern.
        max_pixels: larger images count as unreadable.
        field: where the source stands in the params, for messages.

    Raises:
        PipelineError: the source cannot be listed, or has no image.
    """

    warnings: Sequence[str] = ()
    counts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        name: str,
        source: SourceSpec,
        *,
        max_pixels: int = 100_000_000,
        field: str | None = None,
    ) -> None:
        self._images = list(list_images(name, source, field=field))
        self._max_pixels = max_pixels
        self.fingerprint = digest([image.key for image in self._images])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Labelled:
        image = load_image(read_image(self._images[index]), max_pixels=self._max_pixels)
        return image, _unlabelled(image)

    def name(self, index: int) -> str:
        return image_name(self._images[index])


class AnnotatedPool:
    """The images of a labelled set with their truth, by the names of the training categories.

    Label ids are matched by name (`plain_name`). Names of the set that are not trained are
    background where that is trained, else void. What becomes of the others is `truth`:
    `supervised` keeps them; `zero_shot` makes pixels of unseen categories unlabelled, `adapted`
    makes them void; `annotation_free` makes all categories, and background where it is trained,
    unlabelled. Void stays void, and background is void where it is not trained. All this is done
    to the maps as they are stored, before anything is resized.

    Args:
        benchmark: the labelled set.
        categories: names that are trained, by label id from 1, unseen ones included.
        unseen: those of them whose truth is not to be seen.
        background: whether background is one of the labels that are trained.
        truth: see above.

    Attributes:
        warnings: what the set lacks; also that of the benchmark.

    Raises:
        PipelineError: an unseen name is no category, or the set has none of the categories.
    """

    counts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        benchmark: Benchmark,
        *,
        categories: Sequence[str],
        unseen: Collection[str] = (),
        background: bool = True,
        truth: Truth = "zero_shot",
    ) -> None:
        self._examples: list[Example] = list(benchmark)
        self._names = tuple(benchmark.categories)
        self._label_ids = {plain_name(name): i for i, name in enumerate(categories, start=1)}
        self._unseen = frozenset(unseen_label_ids(unseen, categories))
        self._background = background
        self._truth = truth
        asked_in = [example.vocabulary for example in self._examples if example.vocabulary]
        known = {plain_name(name) for names in (self._names, *asked_in) for name in names}
        lacking = [name for name in categories if plain_name(name) not in known]
        if len(lacking) == len(categories):
            raise PipelineError(
                f"the labelled set has none of the categories: it has {listing(self._names)}, "
                f"asked for are {listing(list(categories))}; names must be the same"
            )
        self.warnings = list(benchmark.warnings)
        if lacking:
            self.warnings.append(
                f"the labelled set has no truth of {listing(lacking)}: is its list of categories "
                "that of its label ids?"
            )
        self.fingerprint = digest([self._names, [_state(example) for example in self._examples]])

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Labelled:
        """See `Pool`.

        Raises:
            ImageError: the image cannot be read.
            PipelineError: its mask cannot, or they differ in size.
        """
        example = self._examples[index]
        image = load_image(example.image_path, upright=False)
        table = self._table(tuple(example.vocabulary or self._names))
        return image, _fitting(table[example.semantic()], image, self.name(index))

    def name(self, index: int) -> str:
        return str(self._examples[index].image_path)

    def _table(self, names: tuple[str, ...]) -> LabelMap:
        """New label of each label id of some names; the last entry is that of void, -1."""
        return _truth_table(
            tuple(self._label_ids.get(plain_name(name), BACKGROUND) for name in names),
            self._unseen,
            self._background,
            self._truth,
        )


def _state(example: Example) -> list[Any]:
    """What tells an image and its masks from other ones, without reading their pixels."""
    image = example.image_path
    masks = [(header.path.name, header.path.stat()) for header in example.mask_headers()]
    return [
        [image.name, image.stat().st_size],
        [[name, file.st_size, file.st_mtime_ns] for name, file in masks],
    ]


@lru_cache(maxsize=KEPT_TABLES)
def _truth_table(
    label_ids: tuple[int, ...], unseen: frozenset[int], background: bool, truth: Truth
) -> LabelMap:
    """`AnnotatedPool`'s labels for background and categories of these label ids, and void."""
    table = np.array([BACKGROUND, *label_ids, IGNORE_INDEX], dtype=LABEL_TYPE)
    if not background:
        table[table == BACKGROUND] = IGNORE_INDEX
    if truth == "annotation_free":
        table[table != IGNORE_INDEX] = UNLABELLED
    elif truth != "supervised":
        hidden = UNLABELLED if truth == "zero_shot" else IGNORE_INDEX
        table[np.isin(table, list(unseen))] = hidden
        assert not unseen & set(table.tolist()), "truth of an unseen category survives"
    table.setflags(write=False)
    return table


class JointPool:
    """Several pools as one, in their order."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = list(pools)
        self._ends = np.cumsum([len(pool) for pool in pools], dtype=np.int64)
        self.fingerprint = [pool.fingerprint for pool in pools]
        self.warnings = [text for pool in pools for text in pool.warnings]
        self.counts = {name: count for pool in pools for name, count in pool.counts.items()}

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, index: int) -> Labelled:
        pool, rest = self._place(index)
        return pool[rest]

    def name(self, index: int) -> str:
        pool, rest = self._place(index)
        return pool.name(rest)

    def _place(self, index: int) -> tuple[Pool, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        pool = self._pools[number]
        return pool, index - int(self._ends[number]) + len(pool)


class PlusSet(Dataset[Composed]):
    """Augmented training images of a pool; number i is a pure function of the seed and i.

    Every image is drawn once an epoch, in an order of the epoch's own. One that cannot be read is
    replaced by the next readable one of that order, and listed in `skipped`.

    Args:
        pool: where the images come from.
        augmentation: how they are changed.
        seed: seed of all draws.
        length: number of training images.
        max_error_rate: of the pool's images; with more that cannot be read, and more than one, the
            next one is an error.

    Raises:
        PipelineError: the pool has no image.
    """

    def __init__(
        self,
        pool: Pool,
        augmentation: Augmentation,
        *,
        seed: int,
        length: int,
        max_error_rate: float = 1.0,
    ) -> None:
        if len(pool) == 0:
            raise PipelineError("no images to train on")
        self._most_unreadable = max(1.0, max_error_rate * len(pool))
        self._pool = pool
        self._augmentation = augmentation
        self._seed = seed
        self._length = length
        self.counts = {"images": len(pool), **pool.counts}
        self.warnings = list(pool.warnings)
        self.fingerprint = pool.fingerprint
        # Shared, so that worker processes can tell of theirs.
        self._is_unreadable = torch.zeros(len(pool), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Composed:
        """Image (S, S, 3) uint8, labels (S, S) int16, and (0, S, S) boolean: no instance masks.

        Raises:
            PipelineError: too many images in a row cannot be read.
        """
        if not 0 <= number < self._length:
            raise IndexError(f"image {number} of {self._length}")
        image, labels = self._readable(*divmod(number, len(self._pool)))
        rng = random.Random(f"{self._seed}/{number}")
        pixels, labels = augment(image, labels, self._augmentation, rng)
        return pixels, labels, np.zeros((0, *labels.shape), dtype=bool)

    def skipped(self) -> Iterator[tuple[str, str]]:
        """Name and reason of the images that could not be read so far, by any worker."""
        for index in self._is_unreadable.nonzero().ravel().tolist():
            try:
                self._pool[index]
                reason = "could not be read, but can be now"
            except ImageError as error:
                reason = str(error)
            yield self._pool.name(index), reason

    def _readable(self, epoch: int, position: int) -> Labelled:
        """The image at a position of an epoch's order, or the next one that can be read."""
        order = _epoch_order(len(self._pool), self._seed, epoch)
        tries = min(len(order), MAX_IN_A_ROW)
        for index in order.take(range(position, position + tries), mode="wrap").tolist():
            try:
                return self._pool[index]
            except ImageError as error:
                self._is_unreadable[index] = True
                last = f"{self._pool.name(index)}: {error}"
                if (count := int(self._is_unreadable.sum())) > self._most_unreadable:
                    raise PipelineError(
                        f"{count} of {len(order)} images cannot be read, the last one is {last}; "
                        "mend them, take them out, or raise max_error_rate"
                    ) from None
        raise PipelineError(
            f"{tries} images in a row cannot be read, the last one is {last}; mend them or take "
            "them out"
        )


@lru_cache(maxsize=KEPT_ORDERS)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order (length,) of an epoch's images."""
    order = list(range(length))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return np.array(order, dtype=np.int64)


def _image_key(key: str) -> str:
    """The image of a sample, whose key ends with the label id of its archive."""
    return key.rpartition("_")[0] or key


def _unlabelled(image: Image.Image) -> LabelMap:
    return np.full((image.height, image.width), UNLABELLED, dtype=LABEL_TYPE)


def _fitting(labels: LabelMap, image: Image.Image, name: str) -> LabelMap:
    """Labels, if they are of the image's size."""
    if labels.shape != (image.height, image.width):
        raise PipelineError(
            f"{name}: {image.width}x{image.height} pixels, but its labels have "
            f"{labels.shape[1]}x{labels.shape[0]}"
        )
    return labels
