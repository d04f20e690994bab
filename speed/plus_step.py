"""One whole training step of DenseCLIP+, from JPEG files to the update of the weights.

The plain reading is that of MaskCLIP's configs in mmsegmentation. Letters: B images, H W pixels,
S side of a crop, h w cells of the features, C text space, K categories.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.engine.runtime import Runtime
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import IGNORE_INDEX, UNLABELLED
from pipeline.formats.shards import shard_entry, shard_name, write_manifest, write_tar
from pipeline.methods.dense import load_dense_labeller
from pipeline.methods.students import (
    DenseClipPlusParams,
    MicroBatch,
    TrainingData,
    TrainingInputs,
    fresh_student,
    training_data,
)
from pipeline.models.clip import load_clip
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.plus.student import PlusStudent
from pipeline.params.base import EncoderParams
from pipeline.training.settings import Augmentation
from pipeline.training.training_set import collate
from pipeline.vocabulary.categories import Names
from pipeline.vocabulary.prompts import templates
from speed.harness import Bench, Pair
from speed.inputs import cpu_runtime, ellipses, jpeg, photo, write_clip

Teacher = Literal["stored", "online"]
Weights = Mapping[str, Tensor]
Labels = NDArray[np.int16]

MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
MEAN_MAPS, STD_MAPS = (
    torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD)
)
CATEGORIES = [f"name {number}" for number in range(1, 21)]
BATCH = 4
RN50 = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
TINY_RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
STUDENT = {"backbone": "timm:mobilenetv3_small_100", "head": "lraspp", "output_stride": 16}
OBJECTS, REDRAWS, HUE_UNITS = 4, 10, 180
NORM_MOMENTUM, NORM_EPS = 0.1, 1e-5
LOSS_TOLERANCE = 1e-4
AGREEMENT = 0.999


def plain_sample(
    path: Path, label_path: Path | None, settings: Augmentation, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Image (3, S, S) float, normalised, and labels (S, S) int64 of one image.

    The whole image and its whole label map are resized; a crop is looked at as often as it is
    redrawn; colours change one after the other, by OpenCV's HSV of 8 bits. Random numbers are
    drawn as the pipeline draws them, and Pillow resizes, so that results can be compared.
    """
    image = Image.open(path).convert("RGB")
    if label_path is None:
        labels = np.full((image.height, image.width), UNLABELLED, dtype=np.int16)
    else:
        labels = np.asarray(Image.open(label_path)).astype(np.int16)
        labels[labels == 255] = IGNORE_INDEX
    pixels, labels = _resize(image, labels, settings, rng)
    top, left = _draw_crop(labels, settings, rng)
    window = np.s_[top : top + settings.crop_size, left : left + settings.crop_size]
    pixels, labels = pixels[window], labels[window]
    if rng.random() < settings.flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    normalised = ((_distort(pixels, settings, rng) - MEAN) / STD).astype(np.float32)
    rows, columns = (settings.crop_size - side for side in labels.shape)
    normalised = np.pad(normalised, ((0, rows), (0, columns), (0, 0)))
    labels = np.pad(labels, ((0, rows), (0, columns)), constant_values=IGNORE_INDEX)
    tensor = torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))
    return tensor, torch.from_numpy(labels.astype(np.int64))


def _resize(
    image: Image.Image, labels: Labels, settings: Augmentation, rng: random.Random
) -> tuple[NDArray[np.uint8], Labels]:
    factor = rng.uniform(*settings.scale_range)
    base = settings.base_size or image.size
    long, short = int(max(base) * factor), int(min(base) * factor)
    scale = min(long / max(image.size), short / min(image.size))
    width, height = (max(int(side * scale + 0.5), 1) for side in image.size)
    rows = ((np.arange(height) + 0.5) * (image.height / height)).astype(int)
    columns = ((np.arange(width) + 0.5) * (image.width / width)).astype(int)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), labels[np.ix_(rows, columns)]


def _draw_crop(labels: Labels, settings: Augmentation, rng: random.Random) -> tuple[int, int]:
    """Top and left of a crop in which no label has too large a share, if ten redraws find it."""
    side = settings.crop_size
    is_uniform = len(np.unique(labels)) == 1  # then the pipeline does not redraw
    for redraw in range(REDRAWS + 1):
        top = rng.randint(0, max(labels.shape[0] - side, 0))
        left = rng.randint(0, max(labels.shape[1] - side, 0))
        if is_uniform or redraw == REDRAWS:
            break
        crop = labels[top : top + side, left : left + side]
        _, counts = np.unique(crop[crop != IGNORE_INDEX], return_counts=True)
        if len(counts) and counts.max() / counts.sum() <= settings.max_share:
            break
    return top, left


def _distort(
    pixels: NDArray[np.uint8], settings: Augmentation, rng: random.Random
) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation and hue, one after the other."""

    def happens() -> bool:
        return rng.random() < settings.photometric

    if happens():
        pixels = _convert(pixels, offset=rng.uniform(-settings.brightness, settings.brightness))
    contrast_first = rng.random() < 0.5
    gain = rng.uniform(*settings.contrast) if happens() else 1.0
    if contrast_first and gain != 1.0:
        pixels = _convert(pixels, gain=gain)
    if happens():
        hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _convert(hsv[..., 1], gain=rng.uniform(*settings.saturation))
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if happens():
        hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
        turn = rng.randrange(-settings.hue, settings.hue)
        hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % HUE_UNITS
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and gain != 1.0:
        pixels = _convert(pixels, gain=gain)
    return pixels


def _convert(
    values: NDArray[np.uint8], *, gain: float = 1.0, offset: float = 0.0
) -> NDArray[np.uint8]:
    return np.clip(values.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)


def plain_dense(visual: Any, images: Tensor) -> Tensor:
    """CLIP's dense features (B, C, h, w) of normalised images: a ResNet, and the value path."""
    maps = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        maps = stage(maps)
    pool = visual.attnpool
    values = F.conv2d(maps, pool.v_proj.weight[:, :, None, None], pool.v_proj.bias)
    return F.conv2d(values, pool.c_proj.weight[:, :, None, None], pool.c_proj.bias)


@torch.no_grad()
def plain_teacher(visual: Any, text: Tensor, images: Tensor) -> Tensor:
    """Label ids (B, S, S) from 1 of normalised images: MaskCLIP's inference."""
    features = F.normalize(plain_dense(visual, images), dim=1)
    scores = F.conv2d(features, text[:, :, None, None])
    return _upsample(scores, images.shape[-2:]).argmax(dim=1) + 1


def plain_features(backbone: nn.Module, head: Weights, images: Tensor) -> Tensor:
    """Features (B, C, h, w) of normalised images, by LR-ASPP on the maps of a backbone."""
    low, last = backbone(images)
    projected = F.conv2d(last, head["project.conv.weight"])
    running = head["project.bn.running_mean"], head["project.bn.running_var"]
    affine = head["project.bn.weight"], head["project.bn.bias"]
    normed = F.batch_norm(projected, *running, *affine, True, NORM_MOMENTUM, NORM_EPS)
    gate = F.conv2d(F.adaptive_avg_pool2d(last, 1), head["gate.weight"]).sigmoid()
    gated = _upsample(F.relu(normed) * gate, low.shape[-2:])
    return F.conv2d(torch.cat([gated, low], 1), head["features.weight"], head["features.bias"])


def _upsample(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class PlainStep:
    """The published step: the labels of a teacher or stored ones, features, logits, loss, SGD."""

    def __init__(self, network: Any, text: Tensor, visual: Any, params: DenseClipPlusParams):
        self._backbone = deepcopy(network.backbone)
        self._head = {name: value.clone() for name, value in network.head.state_dict().items()}
        trained = [self._head[name].requires_grad_() for name, _ in network.head.named_parameters()]
        self._text, self._visual = text, visual
        self._optimizer = torch.optim.SGD(
            [*self._backbone.parameters(), *trained],
            lr=params.learning_rate,
            momentum=0.9,
            weight_decay=params.weight_decay,
        )

    def labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """Labels (B, S, S): those that are stored, and the teacher's where there are none."""
        unlabelled = labels == UNLABELLED
        if unlabelled.any():
            labels = labels.clone()
            labels[unlabelled] = plain_teacher(self._visual, self._text, images)[unlabelled]
        return labels

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """Train on normalised images (B, 3, S, S) and their labels (B, S, S); the loss."""
        targets = self.labels(images, labels)
        features = plain_features(self._backbone, self._head, images)
        logits = _upsample(F.conv2d(features, self._text[:, :, None, None]), images.shape[-2:])
        rows = torch.where(targets == IGNORE_INDEX, targets, targets - 1)
        losses = F.cross_entropy(logits, rows, ignore_index=IGNORE_INDEX, reduction="none")
        loss = losses.mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())


def _write_archive(folder: Path, *, quick: bool) -> list[tuple[Path, Path]]:
    """Shards for the pipeline, and for the other side the same images and label maps as files."""
    width, height = (60, 45) if quick else (500, 375)
    samples, files = [], []
    for number in range(BATCH):
        data = jpeg(photo(number, width, height))
        labels = np.ones((height, width), dtype=np.int16)
        for label_id, mask in enumerate(ellipses(number, OBJECTS, (height, width)), start=2):
            labels[mask] = label_id
        label = encode_label(labels, len(CATEGORIES))
        paths = folder / f"{number}.jpg", folder / f"{number}.png"
        paths[0].write_bytes(data)
        paths[1].write_bytes(label)
        files.append(paths)
        confidence = encode_png(np.full(labels.shape, 255, np.uint8))
        members = {"jpg": data, "label.png": label, "confidence.png": confidence}
        samples.append({"__key__": f"{number:020d}_1", **members})
    (folder / "shards").mkdir()
    shard = folder / "shards" / shard_name(0)
    entries = [shard_entry(shard, write_tar(shard, samples))]
    write_manifest(folder / "shards", entries, {"pseudo_label": {"categories": CATEGORIES}})
    return files


def _write_teacher(folder: Path, *, quick: bool) -> EncoderParams:
    """A CLIP of random weights without the mean of its features, which would decide all labels."""
    vision, dim = (TINY_RN, 64) if quick else (RN50, 1024)
    encoder = write_clip(folder, embed_dim=dim, vision=vision)
    side = 64 if quick else 512
    images = _normalised(torch.from_numpy(np.array(photo(0, side, side))[None]).permute(0, 3, 1, 2))
    with torch.no_grad():
        features = plain_dense(load_clip(encoder, images.device).visual, images)
    state = load_file(str(encoder.pretrained))
    state["visual.attnpool.c_proj.bias"] -= features.mean((0, 2, 3))
    save_file(state, str(encoder.pretrained))
    return encoder


def _params(encoder: EncoderParams, teacher: Teacher, *, quick: bool) -> DenseClipPlusParams:
    settings: dict[str, Any] = {"crop_size": 64, "base_size": [256, 64]} if quick else {}
    return DenseClipPlusParams(
        encoder=encoder,
        backbone_weights=None,
        templates="name",
        teacher=teacher,
        iterations=1000,
        guided_iterations=1000,
        log_every=1000,
        batch_size=BATCH,
        **STUDENT,
        **settings,
    )


@dataclass(frozen=True)
class Setup:
    """What both sides start from: the same files, weights and draws."""

    files: list[tuple[Path, Path]]
    shards: Path
    names: Names
    params: DenseClipPlusParams
    runtime: Runtime

    def plain_batch(self) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), normalised, and labels (B, S, S)."""
        order = list(range(BATCH))
        random.Random("0/epoch 0").shuffle(order)
        stored = self.params.teacher == "stored"
        samples = [
            plain_sample(path, label if stored else None, self.params, random.Random(f"0/{number}"))
            for number, (path, label) in enumerate(self.files[index] for index in order)
        ]
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels)

    def data(self) -> TrainingData:
        """The pipeline's training images."""
        inputs = TrainingInputs(self.shards, self.shards, self.names, BATCH, self.runtime)
        return training_data(self.params, inputs)

    def students(self) -> tuple[PlainStep, PlusStudent]:
        """Both sides with the same fresh weights."""
        torch.manual_seed(0)
        student = fresh_student(self.params, self.names, self.runtime)
        assert isinstance(student, PlusStudent)
        clip = load_clip(self.params.encoder, self.runtime.device)
        text = label_embeddings(clip, self.names, templates(self.params.templates))
        return PlainStep(student.network, text[1:], clip.visual, self.params), student

    def our_labels(self, batch: MicroBatch) -> Tensor:
        """Labels (B, S, S) of a guided step: those that are stored, or DenseCLIP's."""
        labels = batch.semantic_masks.long()
        if self.params.teacher == "stored":
            return labels
        labeller = load_dense_labeller(self.params.labeller, self.names, self.runtime)
        label_ids = list(range(1, 1 + len(self.names.categories)))
        numbers, _ = labeller.select(label_ids).label(batch.images / 255)
        return torch.where(labels == UNLABELLED, numbers + 1, labels)


def _normalised(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 as the plain reading has them."""
    return (images - MEAN_MAPS) / STD_MAPS


def our_batch(data: TrainingData) -> MicroBatch:
    """The images as the stage hands them to a student."""
    numbers = list(range(BATCH))
    batch = collate([data[number] for number in numbers])
    return MicroBatch(numbers, batch.images.permute(0, 3, 1, 2), batch.semantic_masks, [])


def _our_step(student: PlusStudent, data: TrainingData) -> Callable[[], float]:
    optimizer = student.make_optimizer()

    def step() -> float:
        batch = our_batch(data)
        student.set_learning_rates(optimizer, 0)
        optimizer.zero_grad()
        losses = student.loss(batch, student.count(batch).clamp(min=1))
        losses[0].backward()
        optimizer.step()
        return float(losses[0].detach())

    return step


def prepare_step(folder: Path, quick: bool, *, teacher: Teacher) -> Pair:
    """The published step in float32, and ours as the stage makes it; files are read by both."""
    files = _write_archive(folder, quick=quick)
    params = _params(_write_teacher(folder, quick=quick), teacher, quick=quick)
    names, runtime = Names(CATEGORIES, ["background"]), cpu_runtime(folder / "cache")
    setup = Setup(files, folder / "shards", names, params, runtime)
    plain, student = setup.students()

    def check(published: float, ours: float) -> str:
        without = params.model_copy(update={"photometric": 0.0})
        agreed = _compare(replace(setup, params=without))
        return f"{agreed}; with changes of colours losses {published:.4f} and {ours:.4f}"

    return Pair(lambda: plain(*setup.plain_batch()), _our_step(student, setup.data()), check)


def _compare(setup: Setup) -> str:
    """What agrees at the first step; the same draws must give the same labels."""
    images, labels = setup.plain_batch()
    batch = our_batch(setup.data())
    assert torch.equal(labels, batch.semantic_masks.long()), "other labels"
    levels = float(((images - _normalised(batch.images)) * STD_MAPS).abs().max())
    # Both passes of a resize round, and what is resized decides which of them comes first.
    assert levels <= 2.01, f"images differ by {levels:.2f} of 255 levels"
    images = _normalised(batch.images)
    plain, student = setup.students()
    taught = plain.labels(images, labels)
    assert len(taught.unique()) > OBJECTS, "the labels hardly vary"
    same = float((taught == setup.our_labels(batch)).float().mean())
    assert same >= AGREEMENT, f"{1 - same:.1%} of the labels of the step differ"
    published, ours = plain(images, labels), _our_step(student, setup.data())()
    difference = abs(published - ours) / published
    assert difference <= LOSS_TOLERANCE, f"losses of the first step differ by {difference:.1e}"
    return (
        f"same crops, images within {levels:.0f} of 255 levels, {same:.2%} of the labels, loss "
        f"of the first step within {difference:.0e}"
    )


BENCHES = [
    Bench(
        name=f"plus_step_{teacher}",
        title=f"DenseCLIP+ step, {words}: {BATCH} JPEGs of 500 x 375, crop 512, MobileNetV3-small "
        f"with LR-ASPP, {len(CATEGORIES)} names of CLIP RN50",
        target=target,
        stretch=stretch,
        prepare=partial(prepare_step, teacher=teacher),
    )
    for teacher, words, target, stretch in (
        ("stored", "stored teacher", 1.5, 3.0),
        ("online", "online teacher", 1.0, 1.5),
    )
]
