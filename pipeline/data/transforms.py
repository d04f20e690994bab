"""Joint transforms of an image and its masks, every random draw from a generator passed in.

Letters: H W pixels. Settings are those of the ZUTIS paper, appendix B.2, as its code applies them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from pipeline.data.labels import IGNORE_INDEX

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.8, 0.8, 0.2
BLUR_SIGMA = (0.1, 2.0)
LUMA = np.array([0.299, 0.587, 0.114])
YIQ_OF_RGB = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB_OF_YIQ = np.linalg.inv(YIQ_OF_RGB)


@dataclass(frozen=True)
class Sample:
    """One image with its semantic and instance targets.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        semantic: (H, W) integer label ids; 0 is background, IGNORE_INDEX is void.
        instances: (H, W) integer; 1 to `num_instances` name this sample's objects, 0 is none.
        num_instances: Number of its objects, also of those that a crop has moved out of sight.
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: np.ndarray
    num_instances: int = 1


def random_scale(sample: Sample, scale_range: tuple[float, float], rng: random.Random) -> Sample:
    """Resize by a factor uniform in `scale_range`: bilinear for the image, nearest for the masks.

    Sizes are rounded down, to one pixel at least.
    """
    height, width = sample.semantic.shape
    factor = rng.uniform(*scale_range)
    new_height, new_width = max(int(height * factor), 1), max(int(width * factor), 1)
    if (new_height, new_width) == (height, width):
        return sample
    image = Image.fromarray(sample.image)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    rows = _nearest(height, new_height)
    columns = _nearest(width, new_width)
    return replace(
        sample,
        image=np.asarray(resized),
        semantic=sample.semantic.take(rows, axis=0).take(columns, axis=1),
        instances=sample.instances.take(rows, axis=0).take(columns, axis=1),
    )


def random_crop(sample: Sample, size: int, rng: random.Random) -> Sample:
    """Cut a random `size` x `size` window out of a sample.

    A side that is too short is padded at one end, chosen at random: the image with its mean
    colour, the semantic mask with IGNORE_INDEX, the instances with 0.
    """
    height, width = sample.semantic.shape
    top = rng.randint(0, max(height - size, 0))
    left = rng.randint(0, max(width - size, 0))
    window = np.s_[top : top + size, left : left + size]
    image = sample.image[window]
    semantic = sample.semantic[window]
    instances = sample.instances[window]
    pad_height, pad_width = size - semantic.shape[0], size - semantic.shape[1]
    if pad_height or pad_width:
        before = rng.choice((0, pad_height)), rng.choice((0, pad_width))
        image = _pad(image, size, before, mean_colour(sample.image))
        semantic = _pad(semantic, size, before, IGNORE_INDEX)
        instances = _pad(instances, size, before, 0)
    return replace(sample, image=image, semantic=semantic, instances=instances)


def random_flip(sample: Sample, probability: float, rng: random.Random) -> Sample:
    """Mirror left and right with this probability."""
    if rng.random() >= probability:
        return sample
    return replace(
        sample,
        image=sample.image[:, ::-1],
        semantic=sample.semantic[:, ::-1],
        instances=sample.instances[:, ::-1],
    )


def random_colour_jitter(image: np.ndarray, probability: float, rng: random.Random) -> np.ndarray:
    """With this probability, change brightness, contrast, saturation and hue, in random order.

    Factors are uniform in [0.2, 1.8], the turn of the hue in [-0.2, 0.2] of the colour circle: the
    published strengths. The four are one affine map of the colours, applied in a single pass: hue
    turns around the grey axis (the published code turns it in HSV, some six times slower), and
    colours are clipped once, at the end.

    Args:
        image: (H, W, 3) uint8.
        probability: Chance that the image changes at all.
        rng: Source of the draws.

    Returns:
        (H, W, 3) uint8.
    """
    if rng.random() >= probability:
        return image
    mean = np.append(mean_colour(image), 1.0)
    colour_map = np.eye(4)
    steps = ["brightness", "contrast", "saturation", "hue"]
    rng.shuffle(steps)
    for step in steps:
        if step == "brightness":
            change = _brightness(_factor(BRIGHTNESS, rng))
        elif step == "contrast":
            grey = float(LUMA @ (colour_map @ mean)[:3])
            change = _contrast(_factor(CONTRAST, rng), grey)
        elif step == "saturation":
            change = _saturation(_factor(SATURATION, rng))
        else:
            change = _hue(rng.uniform(-HUE, HUE))
        colour_map = change @ colour_map
    rows = tuple(colour_map[:3].ravel().tolist())
    return np.asarray(Image.fromarray(image).convert("RGB", rows))


def random_greyscale(image: np.ndarray, probability: float, rng: random.Random) -> np.ndarray:
    """With this probability, replace the colours of an (H, W, 3) uint8 image by their luma."""
    if rng.random() >= probability:
        return image
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def random_blur(image: np.ndarray, probability: float, rng: random.Random) -> np.ndarray:
    """With this probability, blur an (H, W, 3) uint8 image; sigma is uniform in [0.1, 2] pixels."""
    if rng.random() >= probability:
        return image
    sigma = rng.uniform(*BLUR_SIGMA)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def mean_colour(image: np.ndarray) -> np.ndarray:
    """Mean of an (H, W, 3) uint8 image, rounded down: (3,) uint8."""
    # Rows first: many times faster than both axes at once.
    totals = image.sum(axis=0, dtype=np.uint64).sum(axis=0)
    return (totals // np.uint64(image.shape[0] * image.shape[1])).astype(np.uint8)


def _nearest(length: int, new_length: int) -> np.ndarray:
    centres = (np.arange(new_length) + 0.5) * (length / new_length)
    return np.minimum(centres.astype(np.intp), length - 1)


def _pad(
    array: np.ndarray, size: int, before: tuple[int, int], fill: np.ndarray | int
) -> np.ndarray:
    padded = np.empty((size, size, *array.shape[2:]), dtype=array.dtype)
    padded[:] = fill
    top, left = before
    padded[top : top + array.shape[0], left : left + array.shape[1]] = array
    return padded


def _factor(strength: float, rng: random.Random) -> float:
    return rng.uniform(1.0 - strength, 1.0 + strength)


def _brightness(factor: float) -> np.ndarray:
    return np.diag([factor, factor, factor, 1.0])


def _contrast(factor: float, grey: float) -> np.ndarray:
    change = _brightness(factor)
    change[:3, 3] = (1.0 - factor) * grey
    return change


def _saturation(factor: float) -> np.ndarray:
    change = _brightness(factor)
    change[:3, :3] += (1.0 - factor) * LUMA
    return change


def _hue(turn: float) -> np.ndarray:
    cosine, sine = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    change = np.eye(4)
    rotation = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    change[:3, :3] = RGB_OF_YIQ @ rotation @ YIQ_OF_RGB
    return change
