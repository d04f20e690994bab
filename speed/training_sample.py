"""Training samples: decode, augment, copy-paste.

Letters: H W pixels, N instances.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.shards import shard_entry, shard_name, write_manifest, write_tar
from pipeline.training import training_set
from pipeline.training.settings import Composition, TargetSettings
from pipeline.training.training_set import Archives, TrainingSet
from speed.harness import Bench, Pair
from speed.inputs import ellipses, jpeg, photo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAPER = Composition(
    crop_size=384,
    scale_range=[0.1, 1.0],
    flip=0.5,
    colour_jitter=0.8,
    greyscale=0.2,
    blur=0.5,
    max_paste=10,
    same_archive=0.5,
)
WITHOUT_JITTER = PAPER.model_copy(update={"colour_jitter": 0.0})
CATEGORIES = ["first", "second", "third", "fourth"]
SEED = 0

Training = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """An archive image as files: JPEG, pseudo-mask as run-length code, label id."""

    image_path: Path
    mask_path: Path
    label_id: int


def published_sample(sources: Sequence[Source], composition: Composition, number: int) -> Training:
    """Image (3, H, W) float, normalised; semantic mask (H, W); instance masks (N, H, W).

    Whole images are decoded, each goes through all augmentations at the crop's size and becomes a
    float tensor; then the objects are pasted. Random numbers are drawn as the pipeline draws them.
    """
    rng = random.Random(f"{SEED}/{number}")
    count = rng.randint(1, composition.max_paste)
    pool = list(sources)
    if rng.random() < composition.same_archive:
        label_id = rng.choice(sorted({source.label_id for source in sources}))
        pool = [source for source in sources if source.label_id == label_id]
    rng.random()  # for negatives as canvas, of which there are none
    samples = []
    for instance in range(1, count + 1):
        samples.append(_load(rng.choice(pool), instance, composition, rng))
        if instance > 1:
            rng.randint(1, 1)  # which of its instances: there is one
    return _paste(samples, rng)


def _load(
    source: Source, instance: int, composition: Composition, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    image = Image.open(source.image_path).convert("RGB")
    binary = coco_mask.decode(json.loads(source.mask_path.read_text()))
    image, binary = _geometry(image, binary, composition, rng)
    image = _colours(image, composition, rng)
    pixels = TF.normalize(TF.to_tensor(image), MEAN, STD)
    semantic, instances = torch.from_numpy(binary.copy()), torch.from_numpy(binary.copy())
    semantic[semantic == 1] = source.label_id
    instances[instances == 1] = instance
    return pixels, semantic, instances


def _geometry(
    image: Image.Image, binary: NDArray[np.uint8], composition: Composition, rng: random.Random
) -> tuple[Image.Image, NDArray[np.int64]]:
    """Scale, pad, crop and flip an image and its mask."""
    side = composition.crop_size
    factor = rng.uniform(*composition.scale_range)
    size = max(1, int(image.width * factor)), max(1, int(image.height * factor))
    image = image.resize(size, Image.Resampling.BILINEAR)
    nearest = np.ix_(_nearest(binary.shape[0], size[1]), _nearest(binary.shape[1], size[0]))
    mask: NDArray[np.int64] = binary[nearest].astype(np.int64)
    fill = tuple(np.array(image).mean(axis=(0, 1)).astype(np.uint8).tolist())
    top, left = rng.randint(0, max(0, size[1] - side)), rng.randint(0, max(0, size[0] - side))
    pad_x, pad_y = max(0, side - size[0]), max(0, side - size[1])
    if pad_x or pad_y:
        before_y, before_x = rng.choice((0, pad_y)), rng.choice((0, pad_x))
        padding = [before_x, before_y, pad_x - before_x, pad_y - before_y]
        image = TF.pad(image, padding, fill=fill)
        mask = TF.pad(torch.from_numpy(mask), padding, fill=IGNORE_INDEX).numpy()
    image = TF.crop(image, top, left, side, side)
    mask = mask[top : top + side, left : left + side]
    if rng.random() < composition.flip:
        image, mask = TF.hflip(image), mask[:, ::-1]
    return image, mask


def _nearest(length: int, new_length: int) -> NDArray[np.int64]:
    return ((np.arange(new_length) + 0.5) * (length / new_length)).astype(np.int64)


def _colours(image: Image.Image, composition: Composition, rng: random.Random) -> Image.Image:
    """Jitter by four passes in random order, greyscale, blur."""
    if rng.random() < composition.colour_jitter:
        steps = ["brightness", "contrast", "saturation", "hue"]
        rng.shuffle(steps)
        for step in steps:
            if step == "hue":
                image = TF.adjust_hue(image, rng.uniform(-0.2, 0.2))
            else:
                adjust = getattr(TF, f"adjust_{step}")
                image = adjust(image, rng.uniform(1 - 0.8, 1 + 0.8))
    if rng.random() < composition.greyscale:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if rng.random() < composition.blur:
        pixels = cv2.GaussianBlur(np.asarray(image), (39, 39), rng.uniform(0.1, 2.0))
        image = Image.fromarray(pixels)
    return image


def _paste(samples: list[Training], rng: random.Random) -> Training:
    image, semantic, instances = samples[0]
    height, width = semantic.shape
    for other_image, other_semantic, other_instances in samples[1:]:
        inside = (other_semantic > 0) & (other_semantic != IGNORE_INDEX)
        rows, columns = torch.nonzero(inside, as_tuple=True)
        if len(rows) == 0:
            continue
        box = np.s_[int(rows.min()) : int(rows.max()), int(columns.min()) : int(columns.max())]
        inside = inside[box]
        top = rng.randint(0, height - inside.shape[0])
        left = rng.randint(0, width - inside.shape[1])
        place = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        image[:, *place][:, inside] = other_image[:, *box][:, inside]
        semantic[place][inside] = other_semantic[box][inside]
        instances[place][inside] = other_instances[box][inside]
    masks = torch.stack([instances == number for number in range(1, len(samples) + 1)])
    return image, semantic, masks


def _write_archives(folder: Path, *, quick: bool) -> list[Source]:
    """Label shards for the pipeline; the same images and masks as files for the other side."""
    count, (width, height) = (8, (60, 45)) if quick else (48, (500, 375))
    samples, sources = [], []
    for number in range(count):
        label_id = 1 + number % len(CATEGORIES)
        data = jpeg(photo(number, width, height))
        mask = ellipses(number, 1, (height, width))[0]
        image_path, mask_path = folder / f"{number}.jpg", folder / f"{number}.json"
        image_path.write_bytes(data)
        code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        mask_path.write_text(json.dumps({**code, "counts": code["counts"].decode()}))
        sources.append(Source(image_path, mask_path, label_id))
        samples.append(
            {
                "__key__": f"{number:020d}_{label_id}",
                "jpg": data,
                "mask.png": encode_png(mask),
                "label.png": encode_label(mask * label_id, len(CATEGORIES)),
                "confidence.png": encode_png(np.full(mask.shape, 255, np.uint8)),
                "json": {"category": CATEGORIES[label_id - 1], "label_id": label_id},
            }
        )
    labels_dir = folder / "labels"
    labels_dir.mkdir()
    shard = labels_dir / shard_name(0)
    write_manifest(labels_dir, [shard_entry(shard, write_tar(shard, samples))])
    # The order of the pipeline's pool: archive after archive.
    return sorted(sources, key=lambda source: source.label_id)


def _prepare(folder: Path, quick: bool) -> Pair:
    sources = _write_archives(folder, quick=quick)
    count = 4 if quick else 24
    # No image stays in memory: real archives are many times larger than what fits.
    archives = Archives(
        folder / "labels", categories=CATEGORIES, settings=TargetSettings(), sample_bytes=0
    )

    def published(composition: Composition = PAPER) -> list[Training]:
        return [published_sample(sources, composition, number) for number in range(count)]

    def ours(composition: Composition = PAPER) -> list[training_set.Composed]:
        samples = TrainingSet(archives, composition, seed=SEED, length=count)
        return [samples[number] for number in range(count)]

    def check(published_samples: list[Training], our_samples: list[training_set.Composed]) -> str:
        colours = _compare(published_samples, our_samples)
        plain = _compare(published(WITHOUT_JITTER), ours(WITHOUT_JITTER))
        # Both passes of a resize round, and what is resized decides which of them comes first.
        assert plain <= 2, f"images without jitter differ by {plain} of 255 levels"
        return (
            f"same masks; images without jitter within {plain:.0f} of 255 levels; with jitter, "
            f"whose hue the pipeline turns about the grey axis, by {colours:.0f} at most"
        )

    return Pair(published, ours, check)


def _compare(published: list[Training], ours: list[training_set.Composed]) -> float:
    """Largest difference of the images in levels; the masks must be equal."""
    worst = 0.0
    for (pixels, *their_masks), (image, *our_masks) in zip(published, ours, strict=True):
        for theirs, mine in zip(their_masks, our_masks, strict=True):
            assert np.array_equal(theirs.numpy(), mine), "other masks"
        levels = (
            pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        ) * 255
        difference = np.abs(levels.permute(1, 2, 0).numpy() - image.astype(np.float32)).max()
        worst = max(worst, float(difference))
    return round(worst, 2)


BENCHES = [
    Bench(
        name="training_sample",
        title="24 training samples with copy-paste of up to 10 images of 500 x 375, crop 384, "
        "no image cached",
        target=6.0,
        stretch=10.0,
        prepare=_prepare,
    )
]
