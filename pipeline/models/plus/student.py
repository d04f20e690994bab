"""DenseCLIP+ under training (DenseCLIP paper, 3.4), see `pipeline.methods.students.Student`.

Letters: B images, H W pixels, C text embedding, R rows of the classifier.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer

from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX, UNLABELLED
from pipeline.models.clip import ClipEncoder
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.clip.photo_clip import NAME as PHOTO_CLIP
from pipeline.models.clip.photo_clip import find_weights as find_photo_clip
from pipeline.models.layers.interpolate import upsample, upsampled_labels
from pipeline.models.layers.parts import sum_by_parts
from pipeline.models.plus.backbones import Backbone, backbone_statistics, load_backbone
from pipeline.models.plus.labels import doubtful_void, fill_unlabelled, own_labels
from pipeline.models.plus.network import PlusNetwork, build_plus
from pipeline.models.plus.schedule import poly_lr
from pipeline.models.weights.weights import hash_tensors
from pipeline.models.weights.zoo import resolve_weights
from pipeline.vocabulary.categories import unseen_label_ids
from pipeline.vocabulary.prompts import templates

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import DenseLabeller
    from pipeline.methods.students import DenseClipPlusParams, MicroBatch
    from pipeline.vocabulary.categories import Names

MOMENTUM = 0.9
DRIFT_ROWS = 5  # lines of the log whose mean is compared
GUIDED = "guided"  # folder of the checkpoint at the switch
WATCHED = ("agreement", "entropy")
LABEL_0 = "label_0"  # entry of a checkpoint's architecture: what its row for label id 0 is


class PlusStudent:
    """A fresh segmentation network whose classifier is text, and who labels its images.

    Args:
        params: section `train`.
        names: categories and background.
        network: fresh, as `config` says.
        text: (1 + K, C) unit text embeddings by label id, the background's first.
        teacher: DenseCLIP loaded with the names; None where labels are stored.
        config: what a checkpoint says of the network.
        fingerprint: of the weights of network, text and teacher.
        runtime: device and precision.
    """

    def __init__(
        self,
        params: DenseClipPlusParams,
        names: Names,
        network: PlusNetwork,
        *,
        text: Tensor,
        teacher: DenseLabeller | None,
        config: dict[str, Any],
        fingerprint: str,
        runtime: Runtime,
    ) -> None:
        self.network = network.to(runtime.device).train()
        self.config = config
        self.fingerprint = fingerprint
        self._params = params
        self._runtime = runtime
        self._first = 1 if params.background == "none" else 0  # label id of the first row
        self._text = text[0 if params.background == "names" else 1 :].to(runtime.device)
        self._candidates = candidates(params, names.categories)
        self._teacher = teacher.select(self._candidates) if teacher and self._candidates else None
        shown = ["background", *names.categories]
        self._shares = [f"share_{_slug(shown[label_id])}" for label_id in self._candidates]

    @property
    def losses(self) -> tuple[str, ...]:
        """Cross-entropy on truth and on pseudo-labels, and what is watched without truth.

        Of the unlabelled pixels: how many the student labels as the teacher, the mean entropy of
        its probabilities, and the share of every candidate among their labels.
        """
        return ("truth", "pseudo", *WATCHED, *self._shares)

    @property
    def milestones(self) -> Mapping[int, str]:
        """The switch to self-training."""
        if not self._trains_itself or self._params.guided_iterations >= self._params.iterations:
            return {}
        return {self._params.guided_iterations: GUIDED}

    @property
    def _num_facts(self) -> int:
        return len(WATCHED) + len(self._shares)

    @property
    def _trains_itself(self) -> bool:
        return self._params.self_training != "off"

    def make_optimizer(self) -> Optimizer:
        """SGD with momentum over all parameters alike."""
        params = self._params
        return SGD(
            self.network.parameters(),
            lr=params.learning_rate,
            momentum=MOMENTUM,
            weight_decay=params.weight_decay,
        )

    def set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        """See `poly_lr`."""
        params = self._params
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(
                params.learning_rate, step, params.iterations, min_lr=params.final_learning_rate
            )

    def count(self, batch: MicroBatch) -> Tensor:
        """Pixels that the loss is divided by, and those without truth: (2,) int64."""
        labels = batch.semantic_masks
        counted = (labels != IGNORE_INDEX).sum()
        if self._params.loss_average == "all":
            counted = torch.full_like(counted, labels.numel())
        return torch.stack((counted, self._is_unlabelled(labels).sum()))

    def loss(self, batch: MicroBatch, divisors: Tensor) -> Tensor:
        """The loss and its parts, see `losses`: (1 + len(losses),)."""
        images = batch.images / 255
        with self._runtime.autocast():
            logits = self.network.classify(images, self._text)
        logits = logits.contiguous()  # label after label, as their softmax wants them upsampled
        unlabelled = self._is_unlabelled(batch.semantic_masks)
        labels, facts = batch.semantic_masks.long(), logits.new_full((self._num_facts,), torch.nan)
        if self._candidates:
            labels, facts = self._complete(batch, images, logits.detach(), unlabelled)
        loss = partial(_losses, divisor=divisors[0])
        parts = sum_by_parts(loss, logits, _rows(labels, self._first), unlabelled)
        return torch.cat((parts, facts / divisors[1]))

    def _complete(
        self, batch: MicroBatch, images: Tensor, logits: Tensor, unlabelled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Labels (B, H, W) of this step, and sums of what is watched, NaN where it is not now.

        `logits` (B, R, h, w) are not upsampled.
        """
        size = images.shape[-2:]
        step = batch.numbers[0] // self._params.batch_size
        is_guided = not self._trains_itself or step < self._params.guided_iterations
        is_watched = (step + 1) % self._params.log_every == 0
        own, taught = unlabelled, unlabelled  # not asked for
        if is_watched or not is_guided:
            rows = [label_id - self._first for label_id in self._candidates]
            own = own_labels(logits, rows, size) + self._first
        if is_watched or is_guided:
            taught = self._taught(batch, images)
        pseudo = taught if is_guided else own
        labels = fill_unlabelled(batch.semantic_masks.masked_fill(unlabelled, UNLABELLED), pseudo)
        if not is_watched:
            return labels, logits.new_full((self._num_facts,), torch.nan)
        agreement = ((own == taught) & unlabelled).sum()
        entropies = torch.cat([_entropy(upsample(image, size)) for image in logits.split(1)])
        entropy = entropies.masked_fill(~unlabelled, 0).sum()
        found = pseudo.masked_fill(~unlabelled, IGNORE_INDEX).flatten() - IGNORE_INDEX
        counts = found.bincount(minlength=self._candidates[-1] + 2)
        shares = counts[torch.tensor(self._candidates, device=counts.device) - IGNORE_INDEX]
        return labels, torch.cat((torch.stack((agreement, entropy)), shares)).to(logits.dtype)

    def has_drifted(self, rows: Sequence[tuple[int, Sequence[float]]]) -> str | None:
        """Where the shares of the categories have left those at the switch, with `until_drift`."""
        params = self._params
        if params.self_training != "until_drift":
            return None
        first = 1 + len(self.losses) - len(self._shares)
        shares = slice(first, first + len(self._shares))
        watched = [(step, row[shares]) for step, row in rows if not np.isnan(row[first])]
        before = [row for step, row in watched if step <= params.guided_iterations]
        after = [row for step, row in watched if step > params.guided_iterations]
        if not before or len(after) < DRIFT_ROWS:
            return None
        old, new = (np.mean(part[-DRIFT_ROWS:], axis=0) for part in (before, after))
        distance = float(np.abs(new - old).sum() / 2)
        if distance <= params.drift_tolerance:
            return None
        return f"self-training has drifted: shares of categories moved by {distance:.2f}"

    def _is_unlabelled(self, labels: Tensor) -> Tensor:
        """Pixels (B, H, W) to be pseudo-labelled: with a stored teacher, those that it labels."""
        if self._params.teacher == "stored":
            return labels != IGNORE_INDEX
        return labels == UNLABELLED

    def _taught(self, batch: MicroBatch, images: Tensor) -> Tensor:
        """Labels (B, H, W) of the teacher, void where it is in doubt."""
        if self._teacher is None:
            labels = batch.semantic_masks.long()
            return labels if self._first == 0 else labels.masked_fill(labels == 0, IGNORE_INDEX)
        label_ids = torch.tensor(self._candidates, device=images.device)
        threshold = self._params.confidence_threshold
        with torch.no_grad(), self._runtime.autocast():
            if not threshold:
                return label_ids[upsampled_labels(self._teacher.scores(images), images.shape[-2:])]
            numbers, confidence = self._teacher.label(images)
        return doubtful_void(label_ids[numbers], confidence, threshold)


def fresh_plus(
    params: DenseClipPlusParams,
    names: Names,
    encoder: ClipEncoder,
    *,
    make_teacher: Callable[[Tensor], DenseLabeller],
    runtime: Runtime,
) -> PlusStudent:
    """The student of some params, as training starts from it.

    Args:
        params: section `train`.
        names: categories and background.
        encoder: the CLIP that guides; frozen.
        make_teacher: DenseCLIP from text embeddings (1 + K, C) by label id.
        runtime: device, precision, cache folder of weights.

    Raises:
        PipelineError: a category of `unseen` that is none, a name that the encoder does not know,
            or weights of the backbone that are missing or do not fit.
    """
    encoder.visual.requires_grad_(False)
    text = label_embeddings(encoder, names, templates(params.templates))
    network, architecture = _fresh_network(params, names, text.shape[1], runtime.cache_dir)
    hasher = hashlib.sha256()
    hash_tensors(hasher, {**network.state_dict(), "text": text})
    return PlusStudent(
        params,
        names,
        network,
        text=text,
        teacher=make_teacher(text) if params.teacher == "online" else None,
        config={"architecture": {**architecture, LABEL_0: params.background}},
        fingerprint=f"{hasher.hexdigest()} {encoder.fingerprint()}",
        runtime=runtime,
    )


def _fresh_network(
    params: DenseClipPlusParams, names: Names, channels: int, cache_dir: Path
) -> tuple[PlusNetwork, dict[str, Any]]:
    """The network, and the arguments of `build_plus` that it was built with."""
    num_rows = len(names.categories) + (params.background != "none")
    try:
        mean, std = backbone_statistics(params.backbone)
        architecture: dict[str, Any] = {
            "backbone": params.backbone,
            "output_stride": params.output_stride,
            "head": params.head,
            "channels": channels,
            "background": params.background == "learned" and params.classifier == "text",
            "num_classes": num_rows if params.classifier == "learned" else None,
            "mean": list(mean),
            "std": list(std),
        }
        network = build_plus(**architecture)
    except PipelineError as error:
        raise PipelineError(f"train.{error}") from None
    if params.backbone_weights is not None:
        try:
            _load_weights(network.backbone, params.backbone_weights, cache_dir)
        except PipelineError as error:
            raise PipelineError(f"train.backbone_weights: {error}") from None
    return network, architecture


def _load_weights(backbone: Backbone, weights: str, cache_dir: Path) -> None:
    """Weights of a file, of a published name, or of the package that `photo_clip` comes from."""
    if weights == PHOTO_CLIP:
        path, read = find_photo_clip(cache_dir)
        load_backbone(backbone, path, read=read)
    else:
        load_backbone(backbone, resolve_weights(weights, cache_dir))


def candidates(params: DenseClipPlusParams, categories: Sequence[str]) -> list[int]:
    """Label ids that a pseudo-label may have: of the unseen, of all where nothing is annotated.

    There are none where nothing is pseudo-labelled.

    Raises:
        PipelineError: an unseen name that is no category.
    """
    if params.setting == "annotation_free":
        return list(range(0 if params.background == "names" else 1, 1 + len(categories)))
    if params.setting != "zero_shot":
        return []
    return unseen_label_ids(params.unseen, categories)


def _losses(logits: Tensor, labels: Tensor, unlabelled: Tensor, *, divisor: Tensor) -> Tensor:
    """Cross-entropy, its part on truth and that on pseudo-labels: (3,), sums divided.

    Args:
        logits: (B, R, h, w); they are upsampled.
        labels: (B, H, W) rows or void.
        unlabelled: (B, H, W) pixels that are pseudo-labelled.
        divisor: scalar.
    """
    upsampled = upsample(logits, labels.shape[-2:])
    losses = F.cross_entropy(upsampled, labels, ignore_index=IGNORE_INDEX, reduction="none")
    total, pseudo = losses.sum(), losses.masked_fill(~unlabelled, 0).sum()
    return torch.stack((total, total - pseudo, pseudo)) / divisor


def _entropy(logits: Tensor) -> Tensor:
    """Entropy (B, H, W) of the probabilities of logits (B, R, H, W)."""
    log_probs = logits.log_softmax(dim=1)
    return -(log_probs.exp() * log_probs).sum(dim=1)


def _rows(labels: Tensor, first: int) -> Tensor:
    """Rows of the classifier for label ids (B, H, W); void stays."""
    return torch.where(labels == IGNORE_INDEX, labels, labels - first)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)
