"""DenseCLIP (MaskCLIP) on both kinds of image tower: features, logits, refinements, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.methods.dense import DenseClipParams
from pipeline.models.clip import ClipEncoder
from pipeline.models.dense.denseclip import (
    DenseClip,
    dense_features,
    dense_logits,
    key_smoothing,
    prompt_denoising,
)

from .checks import RELATIVE, Parts, Result, close, equal, first_is_clear
from .networks import clip_encoder
from .vectors import Vectors

FEATURE_RELATIVE = 1e-5
LOGIT_BOUND = 5e-6
PROBABILITY_BOUND = 1e-4
# Within this of a threshold, rounding decides on which side a probability lies.
UNDECIDED = 2e-6
UNDECIDED_CLASS = 1e-4
IMAGE_TOWER = "visual."


@dataclass(frozen=True)
class Refinement:
    """Thresholds of prompt denoising and key smoothing, and the scale of logits in both."""

    denoising: float
    smoothing: float
    scale: float

    def probability(self, logits: Tensor) -> Tensor:
        """(B, K, h, w) softmax of the scaled logits."""
        return (self.scale * logits).softmax(dim=1)


def dense_clip(vectors: Vectors) -> Parts:
    """Every tensor of each sub-case."""
    config = vectors.record["config"]
    tower = {k: v for k, v in vectors.weights().items() if k.startswith(IMAGE_TOWER)}
    encoder = clip_encoder(config["clip"], tower)
    for part in vectors.parts():
        yield part, partial(_dense_clip_part, vectors, part, encoder)


@torch.inference_mode()
def _dense_clip_part(vectors: Vectors, part: str, encoder: ClipEncoder) -> Iterator[Result]:
    name, io, config = f"{vectors.name}/{part}", vectors.io.part(part), vectors.record["config"]
    scale = float(config["temperature_in_refinement"])
    refinement = Refinement(config["pd_thresh"], config["ks_thresh"], scale)
    images, text = io["image"].float(), vectors.io["text_embeddings"]
    features, keys = dense_features(encoder.visual, images)
    plain = dense_logits(features, text)
    peaks = refinement.probability(plain).amax(dim=(2, 3))
    yield close(f"{name}/dense_features", features, io["dense_features"], relative=FEATURE_RELATIVE)
    yield close(f"{name}/keys", keys, io["keys"], relative=FEATURE_RELATIVE)
    yield close(f"{name}/plain", plain, io["plain"], bound=LOGIT_BOUND)
    listed = f"{part}.max_confidence_per_class"
    if listed in vectors.record:
        label = f"{name}/max_confidence_per_class"
        yield close(label, peaks, vectors.record[listed], bound=PROBABILITY_BOUND)
    # Images on which a class lies at the threshold of prompt denoising are left out after it.
    clear = ((peaks - refinement.denoising).abs() > UNDECIDED_CLASS).all(dim=1)
    everything = torch.ones_like(clear)
    denoised = prompt_denoising(plain, refinement.denoising, scale=scale)
    yield close(f"{name}/pd", denoised[clear], io["pd"][clear], bound=LOGIT_BOUND)
    for before, after, logits, kept in (
        ("plain", "ks", plain, everything),
        ("pd", "pd_ks", denoised, clear),
    ):
        label, published = f"{name}/{before}.max_probability", io[f"{before}.max_probability"]
        probability = refinement.probability(logits).amax(dim=1)
        yield close(label, probability[kept], published[kept], bound=PROBABILITY_BOUND)
        decided = _decided(refinement, logits, published) & kept[:, None, None]
        smoothed = key_smoothing(logits, keys, refinement.smoothing, scale=scale)
        ours, theirs = (values.movedim(1, -1)[decided] for values in (smoothed, io[after]))
        # Sums of probabilities whose logits are scaled: as inexact as these, however large.
        bound = RELATIVE * float(theirs.abs().max()) if theirs.numel() else None
        yield close(f"{name}/{after}", ours, theirs, bound=bound)
    own = DenseClip(encoder, text, DenseClipParams(logit_scale=scale))
    refined = DenseClip(
        encoder,
        text,
        DenseClipParams(
            prompt_denoising=refinement.denoising,
            key_smoothing=refinement.smoothing,
            logit_scale=scale,
        ),
    )
    everywhere = torch.ones_like(decided)
    for key, model, patches in (
        ("argmax_fullsize", own, everywhere),
        ("pd_ks.argmax_fullsize", refined, decided),
    ):
        yield _labels(f"{name}/{key}", model, images, expected=io[key], decided=patches)


def _decided(refinement: Refinement, logits: Tensor, published: Tensor) -> Tensor:
    """(B, h, w) where both probabilities are clearly on one side of the threshold of smoothing."""
    ours = refinement.probability(logits).amax(dim=1)
    distances = [(values - refinement.smoothing).abs() for values in (ours, published)]
    return torch.minimum(*distances) > UNDECIDED


def _labels(
    name: str, model: DenseClip, images: Tensor, *, expected: Tensor, decided: Tensor
) -> Result:
    """Labels at full size, where no undecided patch has a part in them."""
    pixels = images * model.std + model.mean
    size: Any = images.shape[-2:]
    labels, _ = model.label(pixels)
    weight = F.interpolate(decided.float()[:, None], size=size, mode="bilinear")[:, 0]
    scores = F.interpolate(model(pixels), size=size, mode="bilinear")
    return equal(name, labels, expected, decided=(weight > 1 - 1e-6) & first_is_clear(scores))
