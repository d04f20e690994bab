"""Copy-paste: one training image out of several samples (ZUTIS paper, 3.2 and appendix B.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pipeline.data.transforms import Sample


def copy_paste(
    samples: Sequence[Sample], rng: random.Random, *, keep_last_row_column: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paste the objects of all later samples onto the first, the canvas, which keeps its own.

    The object of a sample is every pixel with a label id above 0, taken as one piece; it lands at a
    uniform position inside the canvas and covers what was pasted before. Per object two integers
    are drawn, top before left; a sample without an object draws nothing.

    Args:
        samples: The canvas and the samples to paste, all of one size (H, W).
        rng: Source of the positions.
        keep_last_row_column: Paste objects whole. The published code, and so the default, cuts
            off the last row and the last column of each object's box, and an object one pixel high
            or wide vanishes (its position is drawn all the same).

    Returns:
        (H, W, 3) uint8 image, (H, W) semantic mask of the canvas's type, and (N, H, W) boolean
        instance masks, N the sum of `num_instances`. Instances that are covered, out of sight or
        were never pasted remain as empty masks.

    Raises:
        ValueError: no sample, or samples of different sizes.
    """
    if not samples:
        raise ValueError("copy_paste needs at least one sample, the canvas")
    canvas = samples[0]
    image, semantic = canvas.image.copy(), canvas.semantic.copy()
    instances = canvas.instances.astype(np.int32)
    num_instances = canvas.num_instances
    for sample in samples[1:]:
        if sample.semantic.shape != semantic.shape:
            raise ValueError(
                f"a sample of size {sample.semantic.shape} cannot be pasted onto a canvas of size "
                f"{semantic.shape}"
            )
        box = _object_box(sample.semantic, keep_last_row_column=keep_last_row_column)
        if box is not None:
            top, left, height, width = box
            source = np.s_[top : top + height, left : left + width]
            new_top = rng.randint(0, semantic.shape[0] - height)
            new_left = rng.randint(0, semantic.shape[1] - width)
            place = np.s_[new_top : new_top + height, new_left : new_left + width]
            inside = sample.semantic[source] > 0
            pasted = sample.instances[source].astype(np.int32)
            pasted[pasted > 0] += num_instances
            np.copyto(image[place], sample.image[source], where=inside[..., None])
            np.copyto(semantic[place], sample.semantic[source], where=inside)
            np.copyto(instances[place], pasted, where=inside)
        num_instances += sample.num_instances
    ids = np.arange(1, num_instances + 1, dtype=np.int32)
    return image, semantic, instances == ids[:, None, None]


def _object_box(
    semantic: np.ndarray, *, keep_last_row_column: bool
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of the box that is pasted; None if there is no object."""
    inside = semantic > 0
    rows = np.flatnonzero(inside.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(inside.any(axis=0))
    extra = 1 if keep_last_row_column else 0
    height = int(rows[-1] - rows[0]) + extra
    width = int(columns[-1] - columns[0]) + extra
    return int(rows[0]), int(columns[0]), height, width
