"""Joint transforms of an image and its masks: drawn as a whole, applied only where needed.

All random numbers of a transform are drawn first, from a generator passed in, and make up a `View`,
its geometry, and a `ColourChange`. Any box of the result can then be had by itself.

Letters: H W pixels of an image, h w of a box. Settings are those of the ZUTIS paper, appendix B.2,
as its code applies them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.8, 0.8, 0.2
BLUR_SIGMA = (0.1, 2.0)
# The published kernel has 39 taps; all of them beyond 4 sigma weigh less than a level together.
BLUR_SIGMAS = 4.0
LUMA = np.array([0.299, 0.587, 0.114])
YIQ_OF_RGB = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB_OF_YIQ = np.linalg.inv(YIQ_OF_RGB)
# A turn by t of the hue, in RGB: the first of these, plus cos t times the second, sin t the third.
HUE_LUMA = RGB_OF_YIQ[:, :1] @ YIQ_OF_RGB[:1]
HUE_COSINE = RGB_OF_YIQ[:, 1:] @ YIQ_OF_RGB[1:]
HUE_SINE = RGB_OF_YIQ[:, 2:] @ YIQ_OF_RGB[1:2] - RGB_OF_YIQ[:, 1:2] @ YIQ_OF_RGB[2:]


class Box(NamedTuple):
    """Rows from `top` and columns from `left`, up to `bottom` and `right`, which are not in it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """What cuts this box out of an array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.bottom - self.top) * (self.right - self.left)

    def moved(self, down: int, right: int) -> Box:
        """The same box elsewhere."""
        return Box(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def grown(self, margin: int) -> Box:
        """With a margin on all four sides."""
        return Box(self.top - margin, self.left - margin, self.bottom + margin, self.right + margin)

    def seen_from(self, other: Box) -> Box:
        """With rows and columns counted from the corner of another box."""
        return self.moved(-other.top, -other.left)

    def within(self, other: Box) -> Box:
        """What it shares with another box."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Box(top, left, min(self.bottom, other.bottom), min(self.right, other.right))


@dataclass(frozen=True)
class Sample:
    """One image with its semantic and instance targets, whole and as stored.

    Attributes:
        image: RGB, H rows and W columns.
        semantic: (H, W) integer label ids; 0 is background, IGNORE_INDEX is void.
        instances: (H, W) integer; 1 to `num_instances` name this sample's objects, 0 is none.
        num_instances: number of its objects.
        occupied: a box around all of its objects; None: they may be anywhere.
    """

    image: Image.Image
    semantic: np.ndarray
    instances: np.ndarray
    num_instances: int = 1
    occupied: Box | None = None


@dataclass(frozen=True)
class View:
    """What a square crop shows of an image that is resized and perhaps mirrored.

    Every box of a view counts rows and columns of that resized, mirrored image.

    Attributes:
        height: rows of the resized image.
        width: its columns.
        crop: the square; where it reaches beyond the image there is padding.
        mirrored: whether left and right have changed places.
    """

    height: int
    width: int
    crop: Box
    mirrored: bool

    @property
    def whole(self) -> Box:
        """All of the image."""
        return Box(0, 0, self.height, self.width)

    @property
    def visible(self) -> Box:
        """The part of the image that the crop shows."""
        return self.crop.within(self.whole)


@dataclass(frozen=True)
class ColourChange:
    """A change of the colours of a crop.

    Attributes:
        jitter: names and strengths of the steps of the jitter, in order; none, if there is none.
        greyscale: whether colours are replaced by their luma.
        blur_sigma: in pixels; 0 is no blur.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    greyscale: bool = False
    blur_sigma: float = 0.0


# Large images are reduced by whole factors to about this side before their mean is taken.
MEAN_SIDE = 48.0
NO_COLOUR = np.zeros(3, dtype=np.uint8)
# The masks of a sample are asked for one after the other, in two directions each.
NEAREST_KEPT = 16


def draw_view(
    height: int,
    width: int,
    *,
    scale_range: tuple[float, float],
    crop_size: int,
    flip: float,
    rng: random.Random,
) -> View:
    """Draw scale, crop and flip of an image of this size.

    Args:
        height: H.
        width: W.
        scale_range: the factor of both sides is uniform in it. Sides are rounded down, to one pixel
            at least.
        crop_size: side of the crop, which is uniform within the image. A side of the image that is
            too short is padded at one end, chosen at random.
        flip: probability of mirroring left and right.
        rng: source of the draws.
    """
    factor = rng.uniform(*scale_range)
    height, width = max(int(height * factor), 1), max(int(width * factor), 1)
    top = rng.randint(0, max(height - crop_size, 0))
    left = rng.randint(0, max(width - crop_size, 0))
    pad_height, pad_width = max(crop_size - height, 0), max(crop_size - width, 0)
    if pad_height or pad_width:
        top -= rng.choice((0, pad_height))
        left -= rng.choice((0, pad_width))
    mirrored = rng.random() < flip
    if mirrored:
        left = width - crop_size - left
    return View(height, width, Box(top, left, top + crop_size, left + crop_size), mirrored)


def draw_colour_change(
    *, jitter: float, greyscale: float, blur: float, rng: random.Random
) -> ColourChange:
    """Draw a change of colours.

    The jitter changes brightness, contrast, saturation and hue, in random order, by the published
    strengths: factors are uniform in [0.2, 1.8], the turn of the hue in [-0.2, 0.2] of the colour
    circle. The sigma of the blur is uniform in [0.1, 2] pixels.

    Args:
        jitter: probability of the jitter.
        greyscale: probability of losing all colour.
        blur: probability of a blur.
        rng: source of the draws.
    """
    steps = _draw_jitter(rng) if rng.random() < jitter else ()
    is_grey = rng.random() < greyscale
    sigma = rng.uniform(*BLUR_SIGMA) if rng.random() < blur else 0.0
    return ColourChange(steps, is_grey, sigma)


def view_image(image: Image.Image, view: View, change: ColourChange, box: Box) -> np.ndarray:
    """The pixels of a box of a view, resized bilinearly, their colours changed.

    Padding has the mean colour of the image. The jitter is one affine map of the colours: hue turns
    around the grey axis (the published code turns it in HSV, some six times slower), and colours
    are clipped once, at the end. Contrast is relative to the mean of the whole crop, and a blur
    sees the pixels around the box, so the result is what the whole crop would have there. But only
    what the box needs is resized, which rounds some values to another level.

    Args:
        image: RGB.
        view: what is seen of it.
        change: the change of colours.
        box: within the view's crop, not in its padding alone; its sides may be 0.

    Returns:
        (h, w, 3) uint8.
    """
    if 0 in box.shape:
        return np.empty((*box.shape, 3), dtype=np.uint8)
    # One more than the blur's: what is mirrored at the end of the padding is padding.
    reach = len(_half_kernel(change.blur_sigma)) if change.blur_sigma else 0
    needed = box.grown(reach).within(view.crop)
    shown = needed.within(view.whole)
    resized = _resize(image, view, shown)
    if needed == shown and not change.jitter:
        return np.asarray(_change_colours(resized, change, NO_COLOUR))[box.seen_from(shown).slices]
    is_padded = view.visible != view.crop
    fill = _mean_colour(image, view, view.whole) if is_padded else NO_COLOUR
    mean = _mean_of_crop(image, view, fill) if change.jitter else NO_COLOUR
    near = needed.within(view.whole.grown(reach))
    if near != shown:
        padded = pad_box(np.asarray(resized), near.seen_from(shown), fill)
        resized = Image.fromarray(padded)
    changed = np.asarray(_change_colours(resized, change, mean))
    if box.within(near) == box:
        return changed[box.seen_from(near).slices]
    padding = _change_colours(Image.fromarray(fill[None, None]), change, mean)
    return pad_box(changed, box.seen_from(near), np.asarray(padding))


def view_mask(mask: np.ndarray, view: View, box: Box) -> np.ndarray:
    """A visible box (h, w) of a view of a mask (H, W), resized to the nearest neighbour."""
    rows = _nearest(mask.shape[0], view.height)
    columns = _nearest(mask.shape[1], view.width)
    if view.mirrored:
        columns = columns[::-1]
    return mask.take(rows[box.top : box.bottom], axis=0).take(columns[box.left : box.right], axis=1)


def shown_box(box: Box, view: View, shape: tuple[int, int]) -> Box:
    """Where a view shows a box of a mask of this shape (H, W), resized as by `view_mask`."""
    rows, columns = _nearest(shape[0], view.height), _nearest(shape[1], view.width)
    top, bottom = np.searchsorted(rows, (box.top, box.bottom)).tolist()
    left, right = np.searchsorted(columns, (box.left, box.right)).tolist()
    if view.mirrored:
        left, right = view.width - right, view.width - left
    return Box(top, left, bottom, right)


def bounding_box(inside: np.ndarray) -> Box | None:
    """Smallest box around the true pixels (H, W); None if there is none."""
    rows = np.flatnonzero(inside.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(inside.any(axis=0))
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def pad_box(array: np.ndarray, box: Box, fill: np.ndarray | int) -> np.ndarray:
    """A box of an array (H, W, ...) that it may reach beyond, filled up with `fill` there."""
    shared = box.within(Box(0, 0, *array.shape[:2]))
    if shared == box:
        return array[box.slices]
    padded = np.empty((*box.shape, *array.shape[2:]), dtype=array.dtype)
    # One row, then whole rows: many times faster than pixel by pixel.
    padded[:1] = fill
    padded[1:] = padded[:1]
    padded[shared.seen_from(box).slices] = array[shared.slices]
    return padded


def _draw_jitter(rng: random.Random) -> tuple[tuple[str, float], ...]:
    strengths = {
        "brightness": (1.0 - BRIGHTNESS, 1.0 + BRIGHTNESS),
        "contrast": (1.0 - CONTRAST, 1.0 + CONTRAST),
        "saturation": (1.0 - SATURATION, 1.0 + SATURATION),
        "hue": (-HUE, HUE),
    }
    steps = list(strengths)
    rng.shuffle(steps)
    return tuple((step, rng.uniform(*strengths[step])) for step in steps)


def _resize(image: Image.Image, view: View, box: Box) -> Image.Image:
    """A box within the image of a view."""
    resized = image.resize(
        box.shape[::-1], Image.Resampling.BILINEAR, _source_box(image, view, box)
    )
    if view.mirrored:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return resized


def _source_box(image: Image.Image, view: View, box: Box) -> tuple[float, float, float, float]:
    """Where a box of a view lies in the image as stored: left, top, right, bottom."""
    left, right = box.left, box.right
    if view.mirrored:
        left, right = view.width - right, view.width - left
    width, height = image.width, image.height
    # A quotient last: the image's own edges come out exactly.
    return (
        left * width / view.width,
        box.top * height / view.height,
        right * width / view.width,
        box.bottom * height / view.height,
    )


def _mean_colour(image: Image.Image, view: View, box: Box) -> np.ndarray:
    """Mean colour (3,), uint8, of a box of a view."""
    region = _source_box(image, view, box)
    pixel = image.resize((1, 1), Image.Resampling.BOX, region, reducing_gap=MEAN_SIDE)
    return np.array(pixel.getpixel((0, 0)), dtype=np.uint8)


def _mean_of_crop(image: Image.Image, view: View, fill: np.ndarray) -> np.ndarray:
    """Mean colour (3,) of the crop of a view, with its padding of the colour `fill`."""
    seen = view.visible
    if seen == view.crop:
        return _mean_colour(image, view, seen)
    if seen == view.whole:
        return fill
    share = seen.area / view.crop.area
    return share * _mean_colour(image, view, seen) + (1.0 - share) * fill


def _change_colours(image: Image.Image, change: ColourChange, mean: np.ndarray) -> Image.Image:
    """An RGB image changed; `mean` is the mean colour (3,) of the crop that it is part of."""
    if change.jitter:
        image = image.convert("RGB", _colour_map(change.jitter, mean))
    if change.greyscale:
        image = image.convert("L")
    if change.blur_sigma:
        image = Image.fromarray(_blurred(np.asarray(image), change.blur_sigma))
    return image.convert("RGB") if change.greyscale else image


def _half_kernel(sigma: float) -> np.ndarray:
    """Weights of a Gaussian at 0, 1, 2, ... pixels, float32; with their mirror they sum to 1."""
    weights = np.exp(-0.5 * (np.arange(math.ceil(BLUR_SIGMAS * sigma) + 1) / sigma) ** 2)
    return (weights / (2 * weights.sum() - weights[0])).astype(np.float32)


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Pixels (h, w) or (h, w, 3), uint8, blurred; mirrored about their edges as OpenCV does it."""
    weights = _half_kernel(sigma)
    reach = len(weights) - 1
    margins = [(reach, reach), (reach, reach), (0, 0)][: pixels.ndim]
    values = np.pad(pixels, margins, mode="reflect").astype(np.float32)
    for axis in (0, 1):
        values = _smoothed(values, weights, axis)
    return np.rint(values, out=values).astype(np.uint8)


def _smoothed(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Weighted sums along one axis, shorter by the reach of the weights at both ends."""
    reach = len(weights) - 1
    length = values.shape[axis] - 2 * reach

    def at(start: int) -> np.ndarray:
        return values[(*[slice(None)] * axis, slice(start, start + length))]

    total = weights[0] * at(reach)
    for distance in range(1, reach + 1):
        total += weights[distance] * (at(reach - distance) + at(reach + distance))
    return total


@lru_cache(maxsize=NEAREST_KEPT)
def _nearest(length: int, new_length: int) -> np.ndarray:
    """For each new pixel the nearest of `length` old ones, ascending; read-only."""
    centres = (np.arange(new_length) + 0.5) * (length / new_length)
    nearest = np.minimum(centres.astype(np.intp), length - 1)
    nearest.setflags(write=False)
    return nearest


def _colour_map(jitter: tuple[tuple[str, float], ...], mean: np.ndarray) -> tuple[float, ...]:
    """The jitter of a crop of this mean colour (3,) as an affine map, row by row: 12 numbers.

    All steps but the hue blend colours with what is left of them at strength 0: black, the grey
    level of the mean, or the grey level of each colour.
    """
    homogeneous = np.append(mean, 1.0)
    colour_map = np.eye(3, 4)
    for step, strength in jitter:
        if step == "hue":
            colour_map = _turn_hue(strength) @ colour_map
            continue
        neutral = np.zeros(4)
        if step == "contrast":
            neutral[3] = LUMA @ (colour_map @ homogeneous)
        elif step == "saturation":
            neutral = LUMA @ colour_map
        colour_map = strength * colour_map + (1.0 - strength) * neutral
    return tuple(colour_map.ravel().tolist())


def _turn_hue(turn: float) -> np.ndarray:
    angle = 2 * math.pi * turn
    return HUE_LUMA + math.cos(angle) * HUE_COSINE + math.sin(angle) * HUE_SINE
