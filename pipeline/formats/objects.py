"""`mask.png`: the pseudo-mask of an image, or those of several objects of it.

One object is stored as 255, several as their numbers from 1; 0 is what is none. Where only the
union counts, it is what exceeds 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.images import decode_png, encode_png

MAX_OBJECTS = 3


def encode_objects(masks: NDArray[np.bool_]) -> bytes:
    """PNG file of the masks (N, H, W) of up to `MAX_OBJECTS` objects.

    The first that has a pixel keeps it. An object of which nothing is left has no number.

    Raises:
        ValueError: there are more objects.
    """
    if len(masks) > MAX_OBJECTS:
        raise ValueError(f"{len(masks)} objects, at most {MAX_OBJECTS}")
    first = np.where(masks.any(axis=0), masks.argmax(axis=0) + 1, 0)
    numbers, ids = np.unique(first[first > 0], return_inverse=True)
    if len(numbers) <= 1:
        return encode_png(first > 0)
    stored = np.zeros(first.shape, np.uint8)
    stored[first > 0] = ids + 1
    return encode_png(stored)


def decode_objects(data: bytes) -> NDArray[np.uint8]:
    """Numbers (H, W) of the objects of a `mask.png`, from 1; 0 is none.

    A file with larger values than `MAX_OBJECTS` has one object: whatever exceeds 0.

    Raises:
        ImageError: `data` is not a whole PNG file.
    """
    stored = decode_png(data)
    if stored.max(initial=0) > MAX_OBJECTS:
        stored = stored > 0
    return stored.astype(np.uint8)
