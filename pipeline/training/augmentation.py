"""Augmentation of whole images with their labels, as DenseCLIP+ was trained.

Resize, crop, flip, change of colours, padding, in this order and with the numbers of MaskCLIP's
configs (mmsegmentation's Resize, RandomCrop, RandomFlip, PhotoMetricDistortion and Pad). All is
drawn from a generator passed in; only what the crop shows is resized.

Letters: H W pixels of an image, S side of the crop, h w of what it shows of the image.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from pipeline.formats.labels import IGNORE_INDEX, LabelMap
from pipeline.training.settings import Augmentation
from pipeline.training.transforms import Box, ColourChange, View, pad_box, view_image, view_mask

MAX_REDRAWS = 10
# ImageNet's mean, of which the normalised value is 0, in whole grey levels: within half of one.
PADDING = np.array([124, 116, 104], dtype=np.uint8)
LEVELS = np.arange(256, dtype=np.float64)
HUE_UNITS = 180  # of the colour circle, as OpenCV counts them
SIXTH = HUE_UNITS / 6
# Of the hue x in sixths, the share of red, green or blue is sign |x - centre| + end, cut to [0, 1].
SHARES = np.array([[1, 3, -1], [-1, 2, 2], [-1, 4, 2]], dtype=np.float32)


def augment(
    image: Image.Image, labels: LabelMap, settings: Augmentation, rng: random.Random
) -> tuple[np.ndarray, LabelMap]:
    """One training image of an image with its labels.

    Padding is at the right and bottom, after the change of colours: void in the labels, in the
    image ImageNet's mean in whole grey levels, which normalisation brings to within half a grey
    level of 0 (published: 0 after normalisation).

    Args:
        image: RGB, H rows and W columns.
        labels: (H, W) label ids, `IGNORE_INDEX` and `UNLABELLED`.
        settings: sizes, ranges and probabilities.
        rng: source of all draws.

    Returns:
        (S, S, 3) uint8 and (S, S) labels.

    Raises:
        ValueError: image and labels differ in shape.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(f"image {(image.height, image.width)} and labels {labels.shape} differ")
    view = _draw_view(labels, settings, rng)
    pixels = view_image(image, view, ColourChange(), view.visible)
    square = Box(0, 0, settings.crop_size, settings.crop_size)
    return (
        pad_box(distort(pixels, settings, rng), square, PADDING),
        pad_box(view_mask(labels, view, view.visible), square, IGNORE_INDEX),
    )


def resized_shape(
    shape: tuple[int, ...], base_size: list[int] | None, factor: float
) -> tuple[int, int]:
    """Height and width of an image of a shape (H, W), resized.

    Its aspect is kept: it fits, as large as can be, into the base size (its own size, if None)
    times the factor, both sides of which are rounded down. Sides are rounded half up, to one pixel
    at least (mmcv's `imrescale`).
    """
    long, short = (int(side * factor) for side in sorted(base_size or shape, reverse=True))
    scale = min(long / max(shape), short / min(shape))
    height, width = (max(int(side * scale + 0.5), 1) for side in shape)
    return height, width


def distort(pixels: np.ndarray, settings: Augmentation, rng: random.Random) -> np.ndarray:
    """Change the colours of an image (h, w, 3), uint8: mmsegmentation's PhotoMetricDistortion.

    Brightness, contrast, saturation and hue change with a probability each; contrast comes second
    or last, with equal chances. Brightness and contrast are cut to whole levels as published.
    Saturation and hue are those of HSV, changed together and rounded once; OpenCV's HSV of 8 bits,
    which the published code goes through, is up to a few levels off.
    """

    def happens() -> bool:
        return rng.random() < settings.photometric

    offset = rng.uniform(-settings.brightness, settings.brightness) if happens() else 0.0
    contrast_first = rng.random() < 0.5
    gain = rng.uniform(*settings.contrast) if happens() else 1.0
    saturation = rng.uniform(*settings.saturation) if happens() else 1.0
    turn = rng.randrange(-settings.hue, settings.hue) if happens() and settings.hue else 0
    first = _cut(LEVELS + offset)
    if contrast_first:
        first = _cut(first * gain)
    pixels = change_hsv(_look_up(pixels, first), saturation=saturation, turn=turn)
    return pixels if contrast_first else _look_up(pixels, _cut(LEVELS * gain))


def change_hsv(pixels: np.ndarray, *, saturation: float, turn: int) -> np.ndarray:
    """Multiply the saturation of an image in HSV, and turn its hue.

    Args:
        pixels: (h, w, 3) uint8, RGB.
        saturation: factor; the saturation ends at 1.
        turn: in 180ths of the circle.
    """
    if saturation == 1.0 and turn == 0:
        return pixels
    # Whole levels, plane by plane, for as long as nothing is divided: several times faster.
    red, green, blue = planes = np.moveaxis(pixels, -1, 0).astype(np.int16, order="C")
    largest = planes.max(axis=0)
    is_red, is_green = largest == red, largest == green
    ahead = np.where(is_red, green - blue, np.where(is_green, blue - red, red - green))
    value, chroma = largest.astype(np.float32), (largest - planes.min(axis=0)).astype(np.float32)
    # The hue in sixths of the circle, from red.
    hue = np.where(is_red, np.float32(0), np.where(is_green, np.float32(2), np.float32(4)))
    hue += ahead / np.maximum(chroma, np.float32(1))
    hue += np.float32(turn / SIXTH)
    hue += np.float32(6) * (hue < 0)
    hue -= np.float32(6) * (hue >= 6)
    chroma = np.minimum(np.float32(saturation) * chroma, value)
    changed = np.empty(pixels.shape, dtype=np.uint8)
    for channel, (sign, centre, end) in enumerate(SHARES):
        share = sign * np.abs(hue - centre) + end
        share = np.minimum(np.maximum(share, np.float32(0)), np.float32(1))
        changed[..., channel] = np.rint(value - chroma * (np.float32(1) - share))
    return changed


def _draw_view(labels: LabelMap, settings: Augmentation, rng: random.Random) -> View:
    """Draw size, crop and flip; padding is at the right and bottom, also of a mirrored image."""
    factor = rng.uniform(*settings.scale_range)
    height, width = resized_shape(labels.shape, settings.base_size, factor)
    crop = _draw_crop(labels, height, width, settings, rng)
    if rng.random() >= settings.flip:
        return View(height, width, crop, mirrored=False)
    left = max(width - crop.right, 0)
    mirrored = Box(crop.top, left, crop.bottom, left + settings.crop_size)
    return View(height, width, mirrored, mirrored=True)


def _draw_crop(
    labels: LabelMap, height: int, width: int, settings: Augmentation, rng: random.Random
) -> Box:
    """A square anywhere in an image that is resized, or at its top left if that is too small.

    As published, ten squares are looked at, and the one after the tenth is taken as it is.
    """
    side = settings.crop_size
    is_any_right = settings.max_share >= 1.0 or labels.min() == labels.max()
    for redraws_left in range(MAX_REDRAWS, -1, -1):
        top = rng.randint(0, max(height - side, 0))
        left = rng.randint(0, max(width - side, 0))
        crop = Box(top, left, top + side, left + side)
        if is_any_right or not redraws_left:
            break
        view = View(height, width, crop, mirrored=False)
        if largest_share(view_mask(labels, view, view.visible)) <= settings.max_share:
            break
    return crop


def largest_share(labels: LabelMap) -> float:
    """Share of the most frequent label, or of unlabelled, in what is not void; 1 if all is."""
    counts = np.unique(labels[labels != IGNORE_INDEX], return_counts=True)[1]
    return float(counts.max() / counts.sum()) if counts.size else 1.0


def _cut(levels: np.ndarray) -> np.ndarray:
    """Grey levels (256,) cut to whole ones in 0 to 255."""
    return np.floor(np.clip(levels, 0.0, 255.0))


def _look_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The new level of every value of an image, uint8."""
    return levels.astype(np.uint8).take(pixels)
