"""Mask sources: ways to make one pseudo-mask an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.files import file_sha256
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.masks.bilateral import MAX_STEPS, bilateral_solve
from pipeline.models.masks.dino import DINO_MODELS, DinoEncoder, load_dino
from pipeline.models.masks.selfmask import load_selfmask
from pipeline.models.masks.spectral import spectral_mask
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.base import EncoderParams
from pipeline.params.sections import MaskParams

# Bounds on what one image may cost: attention and the affinity matrix are quadratic in its area.
MAX_SELFMASK_TOKENS = 16_384
MAX_SPECTRAL_POSITIONS = 6_144
POSITIONS_PER_PATCH = 4


@dataclass(frozen=True)
class Masker:
    """A way to make masks.

    Attributes:
        settings: all that its masks depend on besides the image; representable in JSON.
        max_pixels: larger images are shrunk for it, and the masks enlarged again.
        predict: images (B, 3, H, W) in [0, 1] -> mask probabilities (B, H, W), on the CPU.
        threshold: a pixel belongs to the mask where its probability exceeds this.
    """

    settings: dict[str, Any]
    max_pixels: int
    predict: Callable[[Tensor], Tensor]
    threshold: float


def make_masker(params: MaskParams, runtime: Runtime) -> Masker:
    """Load the network that `params.source` asks for."""
    if params.source == "selfmask":
        return _selfmask_masker(params, runtime)
    return _spectral_masker(params, runtime)


def _selfmask_masker(params: MaskParams, runtime: Runtime) -> Masker:
    weights = resolve_weights(params.weights, runtime.cache_dir)
    model = load_selfmask(weights, runtime.device)

    def predict(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model.saliency(images.to(runtime.device)).cpu()

    return Masker(
        settings={
            "source": "selfmask",
            "weights": file_sha256(weights),
            "architecture": asdict(model.config),
            "threshold": params.threshold,
            "precision": str(runtime.amp_dtype),
        },
        max_pixels=MAX_SELFMASK_TOKENS * model.config.patch_size**2,
        predict=predict,
        threshold=params.threshold,
    )


def _spectral_masker(params: MaskParams, runtime: Runtime) -> Masker:
    encoder = _load_patch_encoder(params.encoder, runtime)
    patch = encoder.patch_size

    def predict(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        with runtime.autocast():
            features = encoder.patch_features(images.to(runtime.device), facet=params.facet)
        masks = [
            spectral_mask(
                [feature_map],
                size=(height, width),
                padded_size=(math.ceil(height / patch) * patch, math.ceil(width / patch) * patch),
                clusters=params.clusters,
                seed=runtime.seed,
            )
            for feature_map in features.float().cpu()
        ]
        return torch.from_numpy(np.stack(masks)).float()

    return Masker(
        settings={
            "source": "spectral",
            "encoder": encoder.fingerprint(),
            "facet": params.facet,
            "clusters": list(params.clusters),
            "seed": runtime.seed,
            "precision": str(runtime.amp_dtype),
        },
        max_pixels=MAX_SPECTRAL_POSITIONS // POSITIONS_PER_PATCH * patch**2,
        predict=predict,
        threshold=0.5,
    )


def _load_patch_encoder(params: EncoderParams, runtime: Runtime) -> ClipEncoder | DinoEncoder:
    load = load_dino if params.model in DINO_MODELS else load_clip
    return load(params.model, params.pretrained, runtime.device, cache_dir=runtime.cache_dir)


def coarse_masks(images: Sequence[Image.Image], *, masker: Masker) -> NDArray[np.bool_]:
    """Masks (B, H, W) of B RGB images of one size (W, H), as the network has them."""
    pixels = np.stack([np.asarray(image) for image in images])
    height, width = pixels.shape[1:3]
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    shrink = math.sqrt(masker.max_pixels / (height * width))
    if shrink < 1:
        smaller = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        tensors = F.interpolate(tensors, smaller, mode="bilinear", antialias=True)
    probs = masker.predict(tensors)
    if shrink < 1:
        probs = F.interpolate(probs[:, None], (height, width), mode="bilinear")[:, 0]
    return (probs > masker.threshold).numpy()


def refine_mask(
    image: Image.Image,
    mask: NDArray[np.bool_],
    *,
    solver_iterations: int = MAX_STEPS,
    solver_scale: float = 1.0,
) -> NDArray[np.bool_]:
    """Snap a mask (H, W) to the edges of its RGB image by the bilateral solver.

    An empty mask stays empty.

    Args:
        image: of the size of the mask.
        mask: a coarse one.
        solver_iterations: bound on the solver's steps.
        solver_scale: at which fraction of the size it runs.
    """
    if not mask.any():
        return mask
    pixels = np.asarray(image)
    return bilateral_solve(pixels, mask, max_steps=solver_iterations, scale=solver_scale) > 0.5
