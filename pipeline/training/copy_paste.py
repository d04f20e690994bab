"""Copy-paste: one training image out of several samples (ZUTIS paper, 3.2 and appendix B.2).

Letters: N instances, H W pixels of the training image, h w of a cutout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE
from pipeline.training.transforms import (
    Box,
    ColourChange,
    Sample,
    View,
    bounding_box,
    pad_box,
    shown_box,
    view_image,
    view_mask,
)


@dataclass(frozen=True)
class Canvas:
    """What objects are pasted onto.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        semantic: (H, W) int16 label ids; 0 is background, IGNORE_INDEX is void.
        instances: (H, W) integer; 1 to `num_instances` name its own objects, 0 is none.
        num_instances: number of its objects, also of those that a crop has moved out of sight.
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: np.ndarray
    num_instances: int


@dataclass(frozen=True)
class Cutout:
    """An object in the box that is pasted; a side of the box may be 0.

    Attributes:
        image: (h, w, 3) uint8, RGB.
        semantic: (h, w) integer label ids; those above 0 are the object.
    """

    image: np.ndarray
    semantic: np.ndarray


def make_canvas(sample: Sample, view: View, change: ColourChange) -> Canvas:
    """A view of a sample with all of its objects; the padding is void and shows none of them."""
    seen = view.visible
    crop = view.crop.seen_from(seen)
    semantic = view_mask(sample.semantic, view, seen).astype(LABEL_TYPE)
    return Canvas(
        image=view_image(sample.image, view, change, view.crop),
        semantic=pad_box(semantic, crop, IGNORE_INDEX),
        instances=pad_box(view_mask(sample.instances, view, seen), crop, 0),
        num_instances=sample.num_instances,
    )


def cut_out(
    sample: Sample,
    view: View,
    change: ColourChange,
    *,
    instance: int,
    keep_last_row_column: bool = False,
) -> Cutout | None:
    """What a view of a sample shows of one of its instances; None if that is nothing.

    The object is every pixel of the instance with a label id above 0, taken as one piece; for
    `keep_last_row_column` see `object_box`.
    """
    seen = view.visible
    if sample.occupied is not None:
        seen = shown_box(sample.occupied, view, sample.instances.shape).within(seen)
    if min(seen.shape) <= 0:
        return None
    inside = view_mask(sample.instances, view, seen) == instance
    around = bounding_box(inside)
    if around is None:
        return None
    part = around.moved(seen.top, seen.left)
    labels = view_mask(sample.semantic, view, part)
    semantic = np.where(inside[around.slices], labels, BACKGROUND)
    box = object_box(semantic, keep_last_row_column=keep_last_row_column)
    if box is None:
        return None
    image = view_image(sample.image, view, change, box.moved(part.top, part.left))
    return Cutout(image, semantic[box.slices])


def object_box(semantic: np.ndarray, *, keep_last_row_column: bool = False) -> Box | None:
    """The box that is pasted of an object; None if there is no object.

    Args:
        semantic: (H, W) integer label ids; those above 0 are the object.
        keep_last_row_column: keep the object whole. The published code, and so the default, cuts
            off the last row and the last column of its box, of which none is left if it is one
            pixel high or wide.
    """
    box = bounding_box(semantic > 0)
    if box is None or keep_last_row_column:
        return box
    return Box(box.top, box.left, box.bottom - 1, box.right - 1)


def copy_paste(
    canvas: Canvas, cutouts: Sequence[Cutout | None], rng: random.Random
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paste objects onto a canvas, which keeps its own.

    Each lands at a uniform position inside the canvas and covers what was pasted before. Per object
    two integers are drawn, top before left, even if its box has no pixel; None draws nothing.

    Args:
        canvas: the canvas, (H, W).
        cutouts: what to paste, none of it larger than the canvas.
        rng: source of the positions.

    Returns:
        (H, W, 3) uint8 image, (H, W) semantic mask of the canvas's type, and (N, H, W) boolean
        instance masks: the canvas's own, then one a cutout. Instances that are covered, out of
        sight or were never pasted remain as empty masks.
    """
    image, semantic = canvas.image.copy(order="C"), canvas.semantic.copy()
    pixels = _as_pixels(image)
    num_instances = canvas.num_instances + len(cutouts)
    instances = canvas.instances.astype(np.min_scalar_type(num_instances))
    for instance, cutout in enumerate(cutouts, start=canvas.num_instances + 1):
        if cutout is None:
            continue
        height, width = cutout.semantic.shape
        top = rng.randint(0, semantic.shape[0] - height)
        left = rng.randint(0, semantic.shape[1] - width)
        place = Box(top, left, top + height, left + width).slices
        inside = cutout.semantic > 0
        np.copyto(pixels[place], _as_pixels(cutout.image), where=inside)
        np.copyto(semantic[place], cutout.semantic, where=inside)
        instances[place][inside] = instance
    ids = np.arange(1, num_instances + 1, dtype=instances.dtype)
    return image, semantic, instances == ids[:, None, None]


def _as_pixels(image: np.ndarray) -> np.ndarray:
    """An (H, W, 3) image as (H, W) pixels, which are copied many times faster than their channels.

    It is a view if the image is contiguous.
    """
    return np.ascontiguousarray(image).view(f"V{3 * image.itemsize}")[..., 0]
