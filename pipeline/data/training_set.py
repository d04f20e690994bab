"""What ZUTIS trains on: archive samples from label shards, composed into batches.

Letters: B batch, N instances, H W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.copy_paste import copy_paste
from pipeline.data.images import ImageError, decode_label, decode_png, load_image
from pipeline.data.labels import (
    BACKGROUND,
    Conflict,
    Target,
    decode_confidence,
    training_target,
)
from pipeline.data.shards import open_samples
from pipeline.data.transforms import (
    Sample,
    random_blur,
    random_colour_jitter,
    random_crop,
    random_flip,
    random_greyscale,
    random_scale,
)
from pipeline.errors import PipelineError

MEMBERS = ("jpg", "mask.png", "label.png", "confidence.png", "json")
SPECK = 0.01
MEMORY_BYTES = 10**9

Composed = tuple[np.ndarray, np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """A batch of composed images.

    Attributes:
        images: (B, H, W, 3) uint8, RGB.
        semantic_masks: (B, H, W) int32 label ids; IGNORE_INDEX is void.
        instance_masks: (sum of N, H, W) boolean, image after image.
        num_instances: B numbers N.
    """

    images: Tensor
    semantic_masks: Tensor
    instance_masks: Tensor
    num_instances: list[int]


class Archives:
    """Decoded access to the archive images of a folder of label shards.

    A sample's semantic mask is what `training_target` makes of it; its instance is its
    pseudo-mask or, with `split_components`, every connected component of the pseudo-mask that
    covers at least 1 % of the image. Samples of archive 0, the negatives, are background all over,
    by definition. As many decoded samples as fit into a gigabyte are kept in memory.

    Args:
        labels_dir: Folder of label shards.
        categories: Names by label id, from 1.
        target: As for `training_target`, like the next two.
        confidence_threshold: Likewise.
        conflict: Likewise.
        split_components: Make every component an instance of its own.

    Attributes:
        objects: Label id -> indices of its samples that show an object; no archive is empty.
        negatives: Indices of the samples of archive 0.
        num_empty: Samples left out, for want of an object in their pseudo-mask.

    Raises:
        PipelineError: shards are missing or damaged, belong to other categories, or no sample
            shows an object.
    """

    def __init__(
        self,
        labels_dir: Path,
        *,
        categories: Sequence[str],
        target: Target,
        confidence_threshold: float,
        conflict: Conflict,
        split_components: bool,
    ) -> None:
        self._labels_dir = labels_dir
        self._store = open_samples(labels_dir, members=MEMBERS)
        self._target: Target = target
        self._confidence_threshold = confidence_threshold
        self._conflict: Conflict = conflict
        self._split_components = split_components
        self._label_ids = [self._label_id(i, categories) for i in range(len(self._store))]
        self.objects: dict[int, list[int]] = {}
        self.negatives: list[int] = []
        self.num_empty = 0
        for index, label_id in enumerate(self._label_ids):
            if label_id == BACKGROUND:
                self.negatives.append(index)
            elif self._instances(self._mask(index)).any():
                self.objects.setdefault(label_id, []).append(index)
            else:
                self.num_empty += 1
        if not self.objects:
            raise PipelineError(
                f"{labels_dir}: none of {len(self._store)} samples has an object in its "
                "pseudo-mask; look at the settings of the mask stage"
            )
        self._memory: dict[int, Sample] = {}
        self._fill_memory()

    def __getitem__(self, index: int) -> Sample:
        """The decoded sample, whole and as stored; its arrays are not to be written to."""
        return self._memory[index] if index in self._memory else self._decode(index)

    def _fill_memory(self) -> None:
        num_bytes = 0
        for index in sorted(self.negatives + [i for part in self.objects.values() for i in part]):
            sample = self._decode(index)
            arrays = (sample.image, sample.semantic, sample.instances)
            num_bytes += sum(array.nbytes for array in arrays)
            if num_bytes > MEMORY_BYTES:
                break
            self._memory[index] = sample

    def _decode(self, index: int) -> Sample:
        parts = self._store[index]
        label_id = self._label_ids[index]
        try:
            image = np.asarray(load_image(parts["jpg"]))
            if label_id == BACKGROUND:
                nothing = np.zeros(image.shape[:2], dtype=np.int32)
                return Sample(image, nothing, nothing.astype(np.uint8), 0)
            mask = decode_png(parts["mask.png"]) > 0
            semantic = training_target(
                mask,
                label_id,
                decode_label(parts["label.png"]),
                decode_confidence(decode_png(parts["confidence.png"])),
                target=self._target,
                confidence_threshold=self._confidence_threshold,
                conflict=self._conflict,
            )
        except (ImageError, ValueError) as error:
            raise self._complaint(index, str(error)) from None
        if image.shape[:2] != mask.shape:
            raise self._complaint(index, f"image {image.shape[:2]} and mask {mask.shape} differ")
        instances = self._instances(mask)
        return Sample(image, semantic, instances, int(instances.max()))

    def _mask(self, index: int) -> np.ndarray:
        try:
            return decode_png(self._store.member(index, "mask.png")) > 0
        except ImageError as error:
            raise self._complaint(index, str(error)) from None

    def _instances(self, mask: np.ndarray) -> np.ndarray:
        """Instance ids (H, W), uint8, of a pseudo-mask."""
        if not self._split_components:
            return mask.astype(np.uint8)
        components, count = ndimage.label(mask)
        areas = np.bincount(components.ravel(), minlength=count + 1)
        kept = areas >= SPECK * mask.size
        kept[0] = False
        ids = np.where(kept, kept.cumsum(), 0).astype(np.uint8)
        return ids[components]

    def _label_id(self, index: int, categories: Sequence[str]) -> int:
        """The label id of a sample whose category is still the one of params.yaml."""
        info = self._store.json(index)
        label_id, category = info["label_id"], info["category"]
        if label_id == BACKGROUND:
            return BACKGROUND
        expected = categories[label_id - 1] if 0 < label_id <= len(categories) else None
        if category != expected:
            wanted = f"{expected!r} there" if expected else f"{len(categories)} categories only"
            raise self._complaint(
                index,
                f"its category is {category!r}, label id {label_id}, but params.yaml has {wanted}; "
                "run the earlier stages again (dvc repro)",
            )
        return int(label_id)

    def _complaint(self, index: int, reason: str) -> PipelineError:
        return PipelineError(f"{self._labels_dir}: sample {self._store.keys[index]}: {reason}")


@dataclass(frozen=True)
class Composition:
    """How samples become a training image (ZUTIS paper, 3.2, 4.1 and appendix B.2).

    Attributes:
        crop_size: Side of the training image.
        scale_range: Range of the random resizing.
        flip: Probability of mirroring.
        colour_jitter: Probability of a change of colours.
        greyscale: Probability of losing all colour.
        blur: Probability of a blur.
        max_paste: Largest number of archive images in one training image.
        same_archive: Probability that they all come from one archive, drawn uniformly.
        negative_canvas: Probability that the objects are pasted onto a negative.
        keep_last_row_column: As for `copy_paste`.
        keep_last_row_column: see `copy_paste`.
    """

    crop_size: int
    scale_range: tuple[float, float]
    flip: float
    colour_jitter: float
    greyscale: float = 0.0
    blur: float = 0.0
    max_paste: int = 10
    same_archive: float = 0.5
    negative_canvas: float = 0.0
    keep_last_row_column: bool = False


class TrainingSet(Dataset[Composed]):
    """Composed training images; number i is a pure function of the seed and i.

    Args:
        archives: Where the samples come from.
        composition: How they are put together.
        seed: Seed of all draws.
        length: Number of training images.

    Raises:
        PipelineError: negatives are wanted as canvas and there are none.
    """

    def __init__(
        self, archives: Archives, composition: Composition, *, seed: int, length: int
    ) -> None:
        if composition.negative_canvas > 0 and not archives.negatives:
            raise PipelineError(
                f"train.negative_canvas: {composition.negative_canvas}, but the labels hold no "
                "negatives; raise retrieve.num_negatives or set it to 0"
            )
        self._archives = archives
        self._composition = composition
        self._seed = seed
        self._length = length
        self._label_ids = sorted(archives.objects)
        self._all_objects = [i for label_id in self._label_ids for i in archives.objects[label_id]]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Composed:
        """Image (H, W, 3) uint8, semantic mask (H, W) int32, instance masks (N, H, W) boolean.

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
        if rng.random() < composition.negative_canvas:
            samples = [self._augmented(rng.choice(self._archives.negatives), rng)]
        else:
            samples = [self._augmented(rng.choice(pool), rng)]
            num_objects -= 1
        for _ in range(num_objects):
            sample = self._augmented(rng.choice(pool), rng)
            samples.append(_single_object(sample, rng.randint(1, sample.num_instances)))
        return copy_paste(samples, rng, keep_last_row_column=composition.keep_last_row_column)

    def _augmented(self, index: int, rng: random.Random) -> Sample:
        composition = self._composition
        sample = random_scale(self._archives[index], composition.scale_range, rng)
        sample = random_crop(sample, composition.crop_size, rng)
        sample = random_flip(sample, composition.flip, rng)
        image = random_colour_jitter(sample.image, composition.colour_jitter, rng)
        image = random_greyscale(image, composition.greyscale, rng)
        image = random_blur(image, composition.blur, rng)
        return replace(sample, image=image)


def collate(composed: Sequence[Composed]) -> Batch:
    """Stack composed images of one size into a batch."""
    images, semantic_masks, instance_masks = zip(*composed, strict=True)
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        semantic_masks=torch.from_numpy(np.stack(semantic_masks)),
        instance_masks=torch.from_numpy(np.concatenate(instance_masks)),
        num_instances=[len(masks) for masks in instance_masks],
    )


def _single_object(sample: Sample, instance: int) -> Sample:
    """The sample with one of its instances only, background all around it."""
    inside = sample.instances == instance
    return replace(
        sample,
        semantic=np.where(inside, sample.semantic, BACKGROUND),
        instances=inside.astype(np.uint8),
        num_instances=1,
    )
