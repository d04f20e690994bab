"""Samples of mask shards with their dense labels: measured for sorting, drawn when looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.app.opened import MissingError
from pipeline.app.paged_shards import PagedShards
from pipeline.app.pictures import draw_confidence, sharp, thumbnail
from pipeline.formats.dense_labels import CONFIDENCE, LABEL
from pipeline.formats.images import decode_label, decode_png, load_image, png_size, resize_nearest
from pipeline.formats.labels import LabelMap, agreement, decode_confidence
from pipeline.formats.objects import decode_objects
from pipeline.formats.review import NEGATIVES, Reviewed
from pipeline.formats.shards import MANIFEST
from pipeline.pictures.overlays import colour_map
from pipeline.pictures.report import fit_image, paint_labels

PICTURES = ("image", "mask", "labels", "confidence")
MASK = "mask.png"
MASK_ALPHA = 0.6


class SampleRow(NamedTuple):
    """What is known of every sample.

    Attributes:
        label_id: of its archive.
        key: of its image.
        disagreement: share of the pseudo-mask that the dense labels call something else, in
            [0, 1]; NaN where there is no mask, or are no labels.
    """

    label_id: int
    key: str
    disagreement: float


@dataclass(frozen=True)
class SampleFacts:
    """What a page says of one sample.

    Attributes:
        facts: the member `json`.
        present: label id -> share of the image that the dense labels give it; empty without.
        has_mask: whether the pseudo-mask has a pixel.
        num_objects: objects of the pseudo-mask.
    """

    facts: dict[str, Any]
    present: dict[int, float]
    has_mask: bool
    num_objects: int


class Samples:
    """Samples by number.

    Args:
        masks_dir: mask shards.
        labels_dir: label shards of the same samples; where there are none, there are no labels.
        categories: names by label id from 1.

    Raises:
        PipelineError: a manifest is damaged.
    """

    def __init__(self, masks_dir: Path, labels_dir: Path, categories: Sequence[str]) -> None:
        self._masks = PagedShards(masks_dir)
        has_labels = (labels_dir / MANIFEST).is_file()
        self._labels = PagedShards(labels_dir) if has_labels else None
        self._names = [NEGATIVES, *categories]

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def has_labels(self) -> bool:
        """Whether there are dense labels at all."""
        return self._labels is not None

    def item(self, row: SampleRow) -> Reviewed:
        """What is decided about."""
        known = 0 <= row.label_id < len(self._names)
        return Reviewed(self._names[row.label_id] if known else "?", row.key)

    def rows(self) -> Iterator[SampleRow]:
        """What is known of every sample, in order; reads its mask and labels."""
        for number in range(len(self)):
            key, _, label_id = self._masks.key(number).rpartition("_")
            is_number = label_id.isdigit()
            row = SampleRow(int(label_id) if is_number else 0, key, math.nan)
            if row.label_id and self.has_label(number):
                share = agreement(self._mask(number) > 0, self._label(number), row.label_id)
                row = row._replace(disagreement=math.nan if share is None else 1 - share)
            yield row

    def facts(self, number: int) -> SampleFacts:
        """What a page says of one sample."""
        facts = json.loads(self._masks.member(number, "json"))
        objects = self._mask(number)
        present: dict[int, float] = {}
        if self.has_label(number):
            values, counts = np.unique(self._label(number), return_counts=True)
            shares = counts / max(1, counts.sum())
            present = dict(zip(values.tolist(), shares.tolist(), strict=True))
        return SampleFacts(facts, present, bool(objects.any()), int(objects.max(initial=0)))

    def has_label(self, number: int) -> bool:
        """Whether the sample has dense labels: of the same key at the same place, and of its size.

        Labels of another size are older than the masks, which have been made anew since.

        Raises:
            ImageError: the header of its mask or labels is damaged.
        """
        labels = self._labels
        return (
            labels is not None
            and number < len(labels)
            and labels.key(number) == self._masks.key(number)
            and png_size(labels.member(number, LABEL)) == png_size(self._masks.member(number, MASK))
        )

    def draw(self, number: int, what: str, side: int) -> bytes:
        """A picture of a sample as a file: one of `PICTURES`.

        Raises:
            MissingError: it has no dense labels.
            ImageError: one of its files is damaged.
        """
        image = load_image(self._masks.member(number, "jpg"))
        if what == "image":
            return thumbnail(image, side)
        if what == "confidence":
            labels = self._labels_of(number)
            levels = decode_png(labels.member(number, CONFIDENCE))
            return sharp(draw_confidence(decode_confidence(levels)), side)
        small = fit_image(image, side)
        if what == "labels":
            labels = self._labels_of(number)
            values: NDArray[np.integer] = decode_label(labels.member(number, LABEL))
        else:
            values = self._mask(number).astype(np.int16)
        values = resize_nearest(values, (small.height, small.width))
        pixels = np.asarray(small)
        if what == "labels":
            return sharp(paint_labels(pixels, values), side)
        return thumbnail(Image.fromarray(_paint_mask(pixels, values, self._colours(number))), side)

    def _labels_of(self, number: int) -> PagedShards:
        if self._labels is None or not self.has_label(number):
            raise MissingError("labels: not made yet; run `pipeline pseudo_label` first")
        return self._labels

    def _label(self, number: int) -> LabelMap:
        return decode_label(self._labels_of(number).member(number, LABEL))

    def _mask(self, number: int) -> NDArray[np.uint8]:
        return decode_objects(self._masks.member(number, MASK))

    def _colours(self, number: int) -> NDArray[np.uint8]:
        """Colours of the objects of a mask: the category's for one, one each for several."""
        label_id = int(self._masks.key(number).rpartition("_")[2] or 0)
        objects = int(self._mask(number).max(initial=0))
        if objects > 1:
            return colour_map(objects + 1)
        return colour_map(label_id + 1)[[0, label_id]]


def _paint_mask(
    image: NDArray[np.uint8], objects: NDArray[np.integer], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The image, dim outside of the objects, which have their colour over it."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    painted = (1 - MASK_ALPHA) * image + MASK_ALPHA * colours[np.maximum(objects, 0)]
    mixed = np.where((objects > 0)[..., None], painted, 0.45 * grey + 0.55 * 255)
    return np.asarray(mixed.round(), dtype=np.uint8)
