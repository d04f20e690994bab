"""What students train on: archive samples from mask shards, composed into batches.

Letters: B batch, N instances, H W pixels.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import PipelineError, listing
from pipeline.formats.corrections import further_samples
from pipeline.formats.decisions import NOTHING_DECIDED, Decisions
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.labels import BACKGROUND, agreement
from pipeline.formats.objects import decode_objects
from pipeline.formats.shards import open_samples, read_manifest
from pipeline.training.copy_paste import Canvas, Cutout, copy_paste, cut_out, make_canvas
from pipeline.training.settings import Composition, TargetSettings
from pipeline.training.targets import saliency_target, training_target
from pipeline.training.transforms import (
    Box,
    ColourChange,
    Sample,
    View,
    bounding_box,
    draw_colour_change,
    draw_view,
)

MASK_MEMBERS = ("jpg", "mask.png", "json")
SPECK = 0.01
# What is kept in memory: decoded samples, and packed pseudo-masks of about a kilobyte each.
SAMPLE_BYTES, MASK_BYTES = 10**9, 5 * 10**8

Composed = tuple[np.ndarray, np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """A batch of composed images.

    Attributes:
        images: (B, H, W, 3) uint8, RGB.
        semantic_masks: (B, H, W) int16 label ids; IGNORE_INDEX is void.
        instance_masks: (sum of N, H, W) boolean, image after image.
        num_instances: B numbers N.
    """

    images: Tensor
    semantic_masks: Tensor
    instance_masks: Tensor
    num_instances: list[int]


class PackedMask(NamedTuple):
    """Objects of a mask as about a kilobyte, ten times faster to read than a PNG file.

    Attributes:
        shape: (H, W).
        box: the smallest one around the objects.
        num_objects: N.
        bits: N masks of what is in the box, compressed.
    """

    shape: tuple[int, ...]
    box: Box
    num_objects: int
    bits: bytes

    @classmethod
    def of(cls, objects: np.ndarray) -> PackedMask:
        """Pack the numbers (H, W) of objects, from 1; 0 is none; a boolean mask is one object.

        Raises:
            ValueError: there is none.
        """
        box = bounding_box(objects)
        if box is None:
            raise ValueError("an empty mask has no box")
        count = int(objects.max())
        masks = objects[box.slices] == np.arange(1, count + 1)[:, None, None]
        return cls(objects.shape, box, count, zlib.compress(np.packbits(masks).tobytes(), level=1))

    def unpack(self) -> np.ndarray:
        """The numbers (H, W), uint8."""
        packed = np.frombuffer(zlib.decompress(self.bits), dtype=np.uint8)
        bits = np.unpackbits(packed, count=self.num_objects * self.box.area)
        objects = np.zeros(self.shape, dtype=np.uint8)
        for number, mask in enumerate(bits.reshape(self.num_objects, *self.box.shape), 1):
            objects[self.box.slices] += number * mask
        return objects


class Archives:
    """Decoded access to the archive images of a folder of mask shards.

    A sample's semantic mask is what `training_target` makes of it; its instances are the objects of
    its pseudo-mask or, with `split_components`, every connected component of these that covers at
    least 1 % of the image. Samples of archive 0, the negatives, are background all over,
    by definition. An image that a person has corrected is what that says, whatever its archive: one
    sample of it stands under each of its categories, or among the negatives. As many decoded
    samples as fit into `sample_bytes` are kept in memory, and the pseudo-masks of some 500,000
    more.

    Args:
        masks_dir: folder of mask shards.
        labels_dir: folder of label shards, joined by key; not looked at where the target needs
            none.
        categories: names by label id, from 1.
        settings: what training sees of a sample.
        decisions: what a person has said of the images.
        sample_bytes: decoded samples kept in memory.
        mask_bytes: packed pseudo-masks kept in memory.

    Attributes:
        objects: label id -> indices of its samples that show an object; no archive is empty.
        negatives: indices of the samples of archive 0.
        num_empty: samples left out, for want of an object in their pseudo-mask.
        disagreeing: label id -> number of samples left out by `min_agreement`.
        short: the categories of these, each with the number of samples that are left.
        unseen: categories without an object.
        num_corrected_empty: corrected images without an object.
        decided: what was said of these samples.
        fingerprint: of the shards, and of what was said of their images.

    Raises:
        PipelineError: shards are missing or damaged, belong to other categories or images, or no
            sample that is used shows an object.
    """

    def __init__(
        self,
        masks_dir: Path,
        labels_dir: Path | None = None,
        *,
        categories: Sequence[str],
        settings: TargetSettings,
        decisions: Decisions = NOTHING_DECIDED,
        sample_bytes: int = SAMPLE_BYTES,
        mask_bytes: int = MASK_BYTES,
    ) -> None:
        self._masks_dir = masks_dir
        self._store = open_samples(masks_dir, members=MASK_MEMBERS)
        self._settings = settings
        self._labels = self._open_labels(labels_dir, categories) if settings.needs_labels else None
        self._label_ids = [self._label_id(i, categories) for i in range(len(self._store))]
        self._by_name = {name: label_id for label_id, name in enumerate(categories, start=1)}
        self.decided = decisions.of_samples(self._store, categories)
        self.num_corrected_empty = 0
        self.objects: dict[int, list[int]] = {}
        self.negatives: list[int] = []
        self.num_empty = 0
        self.disagreeing: Counter[int] = Counter()
        self._memory: dict[int, Sample] = {}
        self._masks: dict[int, PackedMask] = {}
        self._sort(sample_bytes, mask_bytes)
        self.unseen = [name for i, name in enumerate(categories, 1) if i not in self.objects]
        self.short = [
            f"{categories[label_id - 1]} {kept} of {kept + count}"
            for label_id, count in sorted(self.disagreeing.items())
            for kept in [len(self.objects.get(label_id, []))]
        ]
        folders = [masks_dir, *([labels_dir] if labels_dir and settings.needs_labels else [])]
        self.fingerprint = [
            shard["sha256"] for folder in folders for shard in read_manifest(folder)["shards"]
        ] + self.decided.fingerprint
        if not self.objects and self.disagreeing:
            raise PipelineError(
                f"train.min_agreement: {settings.min_agreement:g} leaves none of "
                f"{self.disagreeing.total()} images; lower it, or look at the dense labels"
            )
        if not self.objects:
            rejected = len(self.decided.rejected)
            but = f", {rejected} rejected ones aside," if rejected else ""
            raise PipelineError(
                f"{masks_dir}: none of {len(self._store)} samples{but} has an object in its "
                "pseudo-mask; look at the settings of the mask stage"
            )

    def __getitem__(self, index: int) -> Sample:
        """The decoded sample, whole and as stored; it is not to be written to."""
        return self._memory[index] if index in self._memory else self._decode(index)

    def _open_labels(self, labels_dir: Path | None, categories: Sequence[str]) -> LabelStore:
        """The labels, which must be of these categories and of every one of the masks."""
        target = self._settings.target
        reader = "min_agreement" if target == "saliency" else f"target {target}"
        if labels_dir is None:
            raise PipelineError(
                "train.labels: the target needs dense labels, or min_agreement does; name their "
                "folder"
            )
        try:
            labels = LabelStore(labels_dir)
        except PipelineError as error:
            raise PipelineError(
                f"{error} (train.labels, which {reader} reads, is the folder "
                "that `pipeline pseudo_label` writes)"
            ) from None
        labels.check(categories, self._store.keys)
        return labels

    def _sort(self, free_for_samples: int, free_for_masks: int) -> None:
        """Tell samples with an object from those without, and keep the first ones in memory."""
        corrected, left_out = self.decided.corrected, self.decided.left_out
        further = further_samples(corrected)
        for index, label_id in enumerate(self._label_ids):
            if index in further or index in left_out:
                continue
            if index in corrected:
                self._add_corrected(index)
            elif label_id == BACKGROUND:
                self.negatives.append(index)
            else:
                objects = self._objects(index)
                if not self._instances(objects).any():
                    self.num_empty += 1
                    continue
                if not self._agrees(index, objects > 0):
                    self.disagreeing[label_id] += 1
                    continue
                self.objects.setdefault(label_id, []).append(index)
                if free_for_masks > 0:
                    self._masks[index] = PackedMask.of(objects)
                    free_for_masks -= len(self._masks[index].bits)
            if free_for_samples > 0:
                sample = self._decode(index)
                free_for_samples -= _num_bytes(sample)
                if free_for_samples >= 0:
                    self._memory[index] = _without_metadata(sample)

    def _add_corrected(self, index: int) -> None:
        """Put a corrected sample under every category of its objects, else among the negatives."""
        sample = self._decode(index)
        shown = np.unique(sample.semantic[sample.instances > 0]).tolist()
        for label_id in shown:
            self.objects.setdefault(label_id, []).append(index)
        if not shown:
            self.negatives.append(index)
            self.num_corrected_empty += 1

    def _agrees(self, index: int, mask: np.ndarray) -> bool:
        """Whether enough of a mask that is not empty is labelled as its category."""
        least = self._settings.min_agreement
        if least is None or self._labels is None:
            return True
        try:
            labels, _ = self._labels.get(self._store.keys[index])
            share = agreement(mask, labels, self._label_ids[index])
        except ValueError as error:
            raise self._error(index, str(error)) from None
        return share is not None and share >= least

    def _decode(self, index: int) -> Sample:
        label_id = self._label_ids[index]
        try:
            image = load_image(self._store.member(index, "jpg"))
            shape = image.size[::-1]
            if index in self.decided.corrected:
                return self._corrected_sample(index, image)
            if label_id == BACKGROUND:
                nothing = np.zeros(shape, dtype=np.uint8)
                return Sample(image, nothing, nothing, 0)
            objects = self._objects(index)
            semantic = self._semantic(index, objects > 0)
        except (ImageError, ValueError) as error:
            raise self._error(index, str(error)) from None
        if shape != objects.shape:
            raise self._error(index, f"image {shape} and mask {objects.shape} differ")
        instances = self._instances(objects)
        occupied = self._masks[index].box if index in self._masks else bounding_box(objects)
        return Sample(image, semantic, instances, int(instances.max()), occupied)

    def _corrected_sample(self, index: int, image: Image.Image) -> Sample:
        size = (image.height, image.width)
        semantic, instances = self.decided.corrected[index].maps(self._by_name, size)
        return Sample(image, semantic, instances, int(instances.max()), bounding_box(instances > 0))

    def _objects(self, index: int) -> np.ndarray:
        """The numbers (H, W), uint8, of the objects of a sample's pseudo-mask; 0 is none."""
        if index in self._masks:
            return self._masks[index].unpack()
        try:
            return decode_objects(self._store.member(index, "mask.png"))
        except ImageError as error:
            raise self._error(index, str(error)) from None

    def _semantic(self, index: int, mask: np.ndarray) -> np.ndarray:
        """What training sees of a sample; only `saliency` does without its dense labels."""
        if self._labels is None or self._settings.target == "saliency":
            return saliency_target(mask, self._label_ids[index])
        dense_labels, confidence = self._labels.get(self._store.keys[index])
        return training_target(
            mask,
            self._label_ids[index],
            dense_labels,
            confidence,
            target=self._settings.target,
            confidence_threshold=self._settings.confidence_threshold,
            conflict=self._settings.conflict,
        )

    def _instances(self, objects: np.ndarray) -> np.ndarray:
        """Instance ids (H, W), uint8, of the objects (H, W) of a pseudo-mask."""
        if not self._settings.split_components:
            return objects
        instances = np.zeros(objects.shape, dtype=np.uint8)
        box = bounding_box(objects)
        if box is None:
            return instances
        count = 0
        for number in range(1, int(objects.max()) + 1):
            components, num_components = ndimage.label(objects[box.slices] == number)
            areas = np.bincount(components.ravel(), minlength=num_components + 1)
            kept = areas >= SPECK * objects.size
            kept[0] = False
            instances[box.slices] += np.where(kept, kept.cumsum() + count, 0)[components].astype(
                np.uint8
            )
            count += int(kept.sum())
        return instances

    def _label_id(self, index: int, categories: Sequence[str]) -> int:
        """The label id of a sample whose category is still the one of params.yaml."""
        info = self._store.json(index)
        label_id, category = info["label_id"], info["category"]
        if label_id == BACKGROUND:
            return BACKGROUND
        expected = categories[label_id - 1] if 0 < label_id <= len(categories) else None
        if category != expected:
            wanted = f"{expected!r} there" if expected else f"{len(categories)} categories only"
            raise self._error(
                index,
                f"its category is {category!r}, label id {label_id}, but params.yaml has {wanted}; "
                "run the earlier stages again (dvc repro)",
            )
        return int(label_id)

    def _error(self, index: int, reason: str) -> PipelineError:
        return PipelineError(f"{self._masks_dir}: sample {self._store.keys[index]}: {reason}")


class TrainingSet(Dataset[Composed]):
    """Composed training images; number i is a pure function of the seed and i.

    Args:
        archives: where the samples come from.
        composition: how they are put together.
        seed: seed of all draws.
        length: number of training images.

    Raises:
        PipelineError: negatives are wanted as canvas and there are none.
    """

    def __init__(
        self, archives: Archives, composition: Composition, *, seed: int, length: int
    ) -> None:
        if composition.negative_canvas > 0 and not archives.negatives:
            raise PipelineError(
                f"train.negative_canvas: {composition.negative_canvas}, but the masks hold no "
                "negatives; raise retrieve.num_negatives or set it to 0"
            )
        self._archives = archives
        self._composition = composition
        self._seed = seed
        self._length = length
        self._label_ids = sorted(archives.objects)
        # Each once: a corrected image may stand under several categories.
        archived = (archives.objects[label_id] for label_id in self._label_ids)
        self._all_objects = list(dict.fromkeys(chain.from_iterable(archived)))
        self.fingerprint = archives.fingerprint
        self.counts = {
            "archive_images": len(self._all_objects),
            "negatives": len(archives.negatives),
            "empty_masks": archives.num_empty,
            **archives.decided.counts,
        }
        self.warnings = archives.decided.warnings
        if "corrected" in self.counts:
            self.counts["corrected_empty"] = archives.num_corrected_empty
        if archives.disagreeing:
            self.counts["disagreeing"] = archives.disagreeing.total()
            self.warnings.append(
                f"train.min_agreement leaves fewer images: {listing(archives.short)}; lower it to "
                "keep more"
            )
        if archives.unseen:
            shown = listing(archives.unseen)
            self.warnings.append(f"no image shows {shown}: training cannot learn them")

    def skipped(self) -> Sequence[tuple[str, str]]:
        """None: what cannot be read is an error, for the mask stage has read it."""
        return []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Composed:
        """Image (H, W, 3) uint8, semantic mask (H, W) int16, instance masks (N, H, W) boolean.

        One to `max_paste` archive images are drawn. The first is the canvas, the others give one
        object each; a negative canvas comes on top of them. Every image is transformed by itself.
        """
        if not 0 <= number < self._length:
            raise IndexError(f"image {number} of {self._length}")
        rng = random.Random(f"{self._seed}/{number}")
        composition = self._composition
        num_objects = rng.randint(1, composition.max_paste)
        pool = self._all_objects
        if rng.random() < composition.same_archive:
            pool = self._archives.objects[rng.choice(self._label_ids)]
        from_negative = rng.random() < composition.negative_canvas
        canvas = self._canvas(rng.choice(self._archives.negatives if from_negative else pool), rng)
        num_cutouts = num_objects if from_negative else num_objects - 1
        cutouts = [self._cutout(rng.choice(pool), rng) for _ in range(num_cutouts)]
        return copy_paste(canvas, cutouts, rng)

    def _canvas(self, index: int, rng: random.Random) -> Canvas:
        sample = self._archives[index]
        return make_canvas(sample, *self._draw_augmentation(sample, rng))

    def _cutout(self, index: int, rng: random.Random) -> Cutout | None:
        sample = self._archives[index]
        view, change = self._draw_augmentation(sample, rng)
        return cut_out(
            sample,
            view,
            change,
            instance=rng.randint(1, sample.num_instances),
            keep_last_row_column=self._composition.keep_last_row_column,
        )

    def _draw_augmentation(self, sample: Sample, rng: random.Random) -> tuple[View, ColourChange]:
        composition = self._composition
        view = draw_view(
            *sample.semantic.shape,
            scale_range=(composition.scale_range[0], composition.scale_range[1]),
            crop_size=composition.crop_size,
            flip=composition.flip,
            rng=rng,
        )
        change = draw_colour_change(
            jitter=composition.colour_jitter,
            greyscale=composition.greyscale,
            blur=composition.blur,
            rng=rng,
        )
        return view, change


def collate(composed: Sequence[Composed]) -> Batch:
    """Stack composed images of one size into a batch."""
    images, semantic_masks, instance_masks = zip(*composed, strict=True)
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        semantic_masks=torch.from_numpy(np.stack(semantic_masks)),
        instance_masks=torch.from_numpy(np.concatenate(instance_masks)),
        num_instances=[len(masks) for masks in instance_masks],
    )


def _num_bytes(sample: Sample) -> int:
    """What a sample takes in memory; Pillow spends four bytes on a pixel."""
    return 4 * sample.semantic.size + sample.semantic.nbytes + sample.instances.nbytes


def _without_metadata(sample: Sample) -> Sample:
    """The sample without what its file says beside the pixels, which may be large."""
    return replace(sample, image=Image.fromarray(np.asarray(sample.image)))
