"""Pictures of the report: label ids over images, thumbnails, data URIs; pure and deterministic."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.images import encode_jpeg
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.pictures.overlays import colour_map

PALENESS = 0.5
LABEL_ALPHA = 0.75
STRIPE = 8
QUALITIES = (85, 75, 60, 45, 30)


def category_colour(label_id: int) -> str:
    """Colour of a label id as "#rrggbb", the same as in the overlays of predictions."""
    red, green, blue = colour_map(label_id + 1)[label_id]
    return f"#{red:02x}{green:02x}{blue:02x}"


def paint_labels(image: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint label ids over an image.

    Background is pale and without colour, categories have theirs, ignored pixels are hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) label ids or `IGNORE_INDEX`.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: image and labels differ in size.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"labels {labels.shape}: expected the image's {image.shape[:2]}")
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    colours = colour_map(max(int(labels.max(initial=0)), 0) + 1)[np.maximum(labels, 0)]
    painted = np.where(
        (labels > 0)[..., None],
        (1 - LABEL_ALPHA) * grey + LABEL_ALPHA * colours,
        (1 - PALENESS) * grey + PALENESS * 255,
    )
    painted = np.where((labels == IGNORE_INDEX)[..., None], _hatching(labels.shape), painted)
    return painted.round().astype(np.uint8)


def fit_image(image: Image.Image, side: int) -> Image.Image:
    """Shrink an image so that its long side is at most `side` pixels; smaller ones stay."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def enlarge_image(image: Image.Image, side: int) -> Image.Image:
    """Repeat the pixels of an image a whole number of times, to at most `side` on the long side.

    So a browser that fits a tiny picture to its place leaves every pixel a sharp square.
    """
    factor = max(1, side // max(image.size))
    if factor == 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def picture(image: Image.Image, *, alt: str, max_bytes: int) -> dict[str, object]:
    """What the template needs to show an RGB image: data URI (JPEG), size, alternative text.

    Quality falls until the file fits into `max_bytes`; at the lowest it is taken as it is.
    """
    data = b""
    for quality in QUALITIES:
        data = encode_jpeg(image, quality=quality)
        if len(data) <= max_bytes:
            break
    return {
        "uri": "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        "width": image.width,
        "height": image.height,
        "alt": alt,
    }


def _hatching(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(H, W, 1) diagonal stripes."""
    rows, columns = np.indices(shape)
    is_light = (rows + columns) // STRIPE % 2 == 0
    return np.where(is_light, 245.0, 70.0).astype(np.float32)[..., None]
