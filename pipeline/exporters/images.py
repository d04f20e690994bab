"""Files of images that every tool decodes to the same pixels."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.formats.images import encode_jpeg, encode_png, is_plain_jpeg, load_image

LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
PLAIN_MODES = ("L", "RGB")
DEPTH_BYTE = 24  # of a PNG's header: bits per channel


class ImageFile(NamedTuple):
    """An image as it is exported: suffix with its dot, content, width and height in pixels."""

    suffix: str
    data: bytes
    width: int
    height: int


def portable(data: bytes, *, upright: bool = True) -> ImageFile:
    """A JPEG or PNG of 8 bits, grey or RGB, that no reader turns; the file itself if it is one.

    Others become JPEG if they were lossy, else PNG.

    Args:
        data: content of an image file.
        upright: apply EXIF rotation; else it is forgotten, and pixels stay as they are stored.

    Raises:
        ImageError: as `load_image`.
    """
    image = load_image(data, upright=upright)
    if is_plain_jpeg(data, image):
        return ImageFile(".jpg", data, *image.size)
    header = Image.open(io.BytesIO(data))
    if _is_plain_png(header, data):
        return ImageFile(".png", data, *image.size)
    if header.format in LOSSY:
        return ImageFile(".jpg", encode_jpeg(image), *image.size)
    return ImageFile(".png", encode_png(np.asarray(image)), *image.size)


def as_jpeg(file_name: str, data: bytes) -> bytes:
    """An exported image as JPEG, the file itself if it is one."""
    return data if file_name.endswith(".jpg") else encode_jpeg(load_image(data))


def _is_plain_png(header: Image.Image, data: bytes) -> bool:
    return (
        header.format == "PNG"
        and data[DEPTH_BYTE] == 8
        and header.mode in PLAIN_MODES
        and not header.has_transparency_data
        and getattr(header, "n_frames", 1) == 1
        and not header.getexif()
    )
