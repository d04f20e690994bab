"""From images to masks by a mask source, and on to masks that follow the edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.models.masks.bilateral import MAX_STEPS, bilateral_solve
from pipeline.models.masks.normalised_cut import CUT_THRESHOLD

if TYPE_CHECKING:
    from pipeline.methods.masks import MaskSource


def coarse_masks(images: Sequence[Image.Image], *, source: MaskSource) -> NDArray[np.bool_]:
    """Masks (B, H, W) of B RGB images of one size (W, H), as the network has them."""
    return coarse_objects(images, source=source)[:, 0]


def coarse_objects(images: Sequence[Image.Image], *, source: MaskSource) -> NDArray[np.bool_]:
    """Masks (B, N, H, W) of N objects of each image, empty where there are fewer; see above."""
    width, height = images[0].size
    tensors = as_tensors(images, max_pixels=source.max_pixels)
    if hasattr(source, "predict_objects"):
        probs = source.predict_objects(tensors)
    else:
        probs = source.predict(tensors)[:, None]
    if probs.shape[-2:] != (height, width):
        probs = F.interpolate(probs, (height, width), mode="bilinear")
    found = probs > source.threshold
    found[:, 1:] = probs[:, 1:] > CUT_THRESHOLD
    return found.numpy()


def as_tensors(images: Sequence[Image.Image], *, max_pixels: int) -> Tensor:
    """B RGB images of one size as (B, 3, H, W) in [0, 1], shrunk to at most `max_pixels`."""
    pixels = np.stack([np.asarray(image) for image in images])
    height, width = pixels.shape[1:3]
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    shrink = math.sqrt(max_pixels / (height * width))
    if shrink >= 1:
        return tensors
    smaller = (max(1, int(height * shrink)), max(1, int(width * shrink)))
    return F.interpolate(tensors, smaller, mode="bilinear", antialias=True)


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
