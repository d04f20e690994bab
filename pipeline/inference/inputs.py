"""From an image to the input of a network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.images import ImageError, as_rgb, load_image
from pipeline.params.base import PredictionSettings

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-6
ImageInput = Image.Image | Path | str | NDArray[np.uint8]


def input_size(
    width: int, height: int, settings: PredictionSettings, *, patch_size: int
) -> tuple[int, int]:
    """(width, height) of the network's input for an image.

    Where nothing asks for another size the image keeps its own; a resized one keeps its aspect, its
    sides rounded as `rounding` says. The network then ignores what exceeds whole patches at the
    right and bottom and its prediction is stretched over it: as in the published code; the paper
    says "original resolution" (4.1). Under `whole_patches` sides are multiples of the patch size
    instead, so that no pixel is cut off. No side is shorter than a patch.
    """
    scale = 1.0 if settings.resize_to is None else settings.resize_to / min(width, height)
    if settings.max_side is not None:
        scale = min(scale, settings.max_side / max(width, height))
    step = patch_size if settings.whole_patches else 1
    to_steps = round if settings.whole_patches else ROUND[settings.rounding]
    new_width, new_height = (
        max(patch_size, step * to_steps(side * scale / step)) for side in (width, height)
    )
    return new_width, new_height


def _floor(value: float) -> int:
    """Largest integer below `value`, or above it by no more than rounding makes of an integer."""
    return math.floor(value + ROUNDING)


def _half_up(value: float) -> int:
    """Nearest integer, of two the larger; as in mmcv, to the last bit."""
    return math.floor(value + 0.5)


ROUND = {"down": _floor, "half_up": _half_up}


def to_pixels(
    image: Image.Image, settings: PredictionSettings, *, patch_size: int
) -> NDArray[np.uint8]:
    """An RGB image at the size of the network's input, (H', W', 3)."""
    size = input_size(image.width, image.height, settings, patch_size=patch_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.array(image)


def to_tensor(image: Image.Image, settings: PredictionSettings, *, patch_size: int) -> Tensor:
    """Network input (3, H', W') float32 in [0, 1] of an RGB image."""
    import torch

    pixels = to_pixels(image, settings, patch_size=patch_size)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def to_rgb(image: ImageInput) -> Image.Image:
    """RGB image of a path, a PIL image of any mode, or an (H, W, 3) uint8 array.

    Raises:
        ImageError: the file cannot be read; the message has its path and the reason.
        ValueError: an array of another shape or type; an image of floats none of which is a number.
    """
    if isinstance(image, str | Path):
        try:
            return load_image(Path(image))
        except ImageError as error:
            raise ImageError(f"{image}: {error}") from None
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{image.dtype} array {image.shape}: expected uint8 (H, W, 3)")
    return Image.fromarray(image)
