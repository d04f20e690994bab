"""Bytes to pixels and back: the one robust decoder of photos, and the formats of our shards.

Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.files import Location, is_url
from pipeline.formats.depth import decode, eight_bits
from pipeline.formats.labels import IGNORE_INDEX, LABEL_TYPE, MAX_CATEGORIES, LabelMap

Item = TypeVar("Item", bound=np.generic)

HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow's wheels since 11.3
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if HAS_AVIF else ()))
# Those that Pillow knows for `FORMATS`, the frequent ones first.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".jpe", ".jfif", ".apng", ".pgm", ".ppm", ".pbm", ".pnm", ".pfm"),
    *((".avif", ".avifs") if HAS_AVIF else ()),
)
MAX_ELONGATION = 200
# Enough for 100 million pixels of any format, uncompressed.
MAX_FILE_BYTES = 1 << 30
# A JPEG decoder goes over all pixels once a scan, and a scan of nothing takes a few bytes. Encoders
# write up to some 20.
MAX_SCANS = 100
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
WIDTH_TAG, LENGTH_TAG, TILE_WIDTH_TAG, TILE_LENGTH_TAG = 256, 257, 322, 323
MAX_REASON = 100
ORIENTATION_TAG = 0x0112
# EXIF orientation -> the operation that puts the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF orientation -> the operation that undoes that one; all but two undo themselves.
AS_STORED = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}
QUARTER_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
TIFF_SIGNATURES = (b"II*\0", b"MM\0*")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", *TIFF_SIGNATURES, b"GIF8")
MAX_BYTE_CATEGORIES = 254
BYTE_IGNORE = 255
WORD_IGNORE = 65535


class ImageError(ValueError):
    """An image that cannot be used; the message is a short reason, fit for a table."""


def load_image(
    data: bytes | Path, *, max_pixels: int = 100_000_000, upright: bool = True
) -> Image.Image:
    """Decode a photo to 8-bit RGB, upright.

    EXIF rotation is applied, transparency is laid on white, samples of other depths become 8 bits
    as `pipeline.formats.depth` says, of an animation the first frame is taken. The size is checked
    before any pixel is decoded.

    Args:
        data: content of a JPEG, PNG, WebP, AVIF, BMP, TIFF, GIF or PPM (PGM, PBM, PFM) file, or the
            path of one.
        max_pixels: largest accepted width x height. (Pillow itself refuses some 179 million.)
        upright: apply EXIF rotation; without it pixels stay as they are stored, which is what the
            masks of benchmarks were drawn on.

    Raises:
        ImageError: with the reason: "empty file", "not an image", "truncated", "damaged: ...",
            "too large: ...", "too elongated: WxH", "not supported: ...", "cannot be read: ...".
    """
    content = read_file(data) if isinstance(data, Path) else data
    image = _open(content, max_pixels)
    try:
        # Pillow itself turns a TIFF while it loads it, and forgets the orientation.
        turned = _orientation(image) if isinstance(image, TiffImageFile) else 1
        rgb = as_rgb(decode(image, content))
        to_turn = _orientation(image)  # a PNG may have it after its pixels
    except Exception as error:  # decoders answer hostile bytes with any exception
        raise ImageError(_reason(error)) from None
    turn = UPRIGHT.get(to_turn) if upright else AS_STORED.get(turned)
    return rgb if turn is None else rgb.transpose(turn)


def stored_size(path: Path) -> tuple[int, int]:
    """Height and width of a photo as it is stored, from its header.

    Raises:
        ImageError: the header cannot be read.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            width, height = _size_in_header(image)
            return height, width
    except Exception as error:  # as in `load_image`
        raise ImageError(_reason(error)) from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `load_image` gives a file, which is opened and not loaded."""
    width, height = _size_in_header(image)
    return (height, width) if _orientation(image) in QUARTER_TURNED else (width, height)


def _size_in_header(image: Image.Image) -> tuple[int, int]:
    """Width and height as they are stored; the `size` of a TIFF is upright from Pillow 11 on."""
    if isinstance(image, TiffImageFile):
        return int(image.tag_v2[WIDTH_TAG]), int(image.tag_v2[LENGTH_TAG])
    return image.size


def read_file(path: Location) -> bytes:
    """The bytes of an image file, as many as it has when it is opened.

    Raises:
        ImageError: it is missing, cannot be read, larger than `MAX_FILE_BYTES`, or not a regular
            file: a pipe or a device might never end.
    """
    try:
        if is_url(path):
            return read_range(path, 0, _checked_size(path.stat().st_size))
        with open_regular(path) as file:
            return file.read(_checked_size(os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or one_line(error)}") from None


def read_range(path: Location, start: int, end: int) -> bytes:
    """The bytes of a file from `start` up to `end`, or as many as there are.

    Raises:
        ImageError: as `open_regular`, like OSError.
    """
    if is_url(path):  # one request
        return path.fs.cat_file(path.path, start=start, end=end)
    with open_regular(path) as file:
        file.seek(start)
        return file.read(end - start)


def _checked_size(size: int) -> int:
    if size > MAX_FILE_BYTES:
        raise ImageError(f"too large: {size} bytes")
    return size


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never waits for a pipe's other end.

    Raises:
        ImageError: it is a pipe or a device.
        OSError: it cannot be opened.
    """
    file = cast(BinaryIO, open(path, "rb", opener=_open_at_once))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ImageError("cannot be read: not a regular file")
    return file


def one_line(error: object) -> str:
    """What an exception says, on one line of printable text, cut where it gets long."""
    line = " ".join(str(error).split())[:MAX_REASON]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def shrink_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the short side is at most `side` pixels; smaller images are left alone."""
    short = min(image.size)
    if short <= side:
        return image
    width, height = (max(1, round(length * side / short)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize_nearest(values: NDArray[Item], size: tuple[int, int]) -> NDArray[Item]:
    """Values (h, w) at `size` (H, W): each pixel takes the value its centre falls on."""
    rows = (2 * np.arange(size[0]) + 1) * values.shape[0] // (2 * size[0])
    columns = (2 * np.arange(size[1]) + 1) * values.shape[1] // (2 * size[1])
    return values[rows[:, None], columns]


def is_plain_jpeg(data: bytes, image: Image.Image) -> bool:
    """Whether `data` is a JPEG that every reader decodes to `image`.

    `image` is what `load_image` made of `data`, perhaps shrunk since. Plain means: gray or RGB, one
    frame, no EXIF rotation, the same size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            return (
                header.format == "JPEG"
                and header.mode in ("L", "RGB")
                and header.size == image.size
                and _orientation(header) == 1
            )
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """JPEG file of an RGB image, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """PNG file of an array.

    Args:
        array: (H, W) or (H, W, 3) uint8, (H, W) uint16, or (H, W) bool, stored as 0 and 255.
    """
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"expected bool, uint8 or uint16, got {array.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Array of a PNG file written by `encode_png`: (H, W) or (H, W, 3), uint8 or uint16.

    Raises:
        ImageError: `data` is not a whole PNG file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.array(image)
    except Exception as error:  # as in `load_image`
        raise ImageError(_reason(error)) from None


def png_size(data: bytes) -> tuple[int, int]:
    """Height and width of a PNG file, from its header.

    Raises:
        ImageError: the header cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return image.height, image.width
    except Exception as error:  # as in `load_image`
        raise ImageError(_reason(error)) from None


def encode_label(label: np.ndarray, num_categories: int) -> bytes:
    """PNG file of label ids.

    Up to 254 categories it is 8-bit gray with ignore as 255, beyond 16-bit with ignore as 65535.

    Args:
        label: (H, W) integers in -1 (ignore) .. num_categories.
        num_categories: K, without background.

    Raises:
        ValueError: a value out of that range, or more than `MAX_CATEGORIES`.
    """
    if not 0 <= num_categories <= MAX_CATEGORIES:
        raise ValueError(f"num_categories must be in 0..{MAX_CATEGORIES}, got {num_categories}")
    if label.size and (label.min() < IGNORE_INDEX or label.max() > num_categories):
        raise ValueError(
            f"label ids must be in {IGNORE_INDEX}..{num_categories}, "
            f"got {label.min()}..{label.max()}"
        )
    is_byte = num_categories <= MAX_BYTE_CATEGORIES
    ignore = BYTE_IGNORE if is_byte else WORD_IGNORE
    stored = label.astype(np.uint8 if is_byte else np.uint16)
    stored[label == IGNORE_INDEX] = ignore
    return encode_png(stored)


def decode_label(data: bytes) -> LabelMap:
    """Label ids (H, W) of a file written by `encode_label`; ignore is -1.

    Raises:
        ImageError: `data` is not a whole PNG file of one channel, or a label id is out of range.
    """
    stored = decode_png(data)
    if stored.ndim != 2:
        raise ImageError(f"not a label image: shape {stored.shape}")
    is_void = stored == (BYTE_IGNORE if stored.dtype == np.uint8 else WORD_IGNORE)
    largest = int(stored.max(initial=0, where=~is_void))
    if largest > MAX_CATEGORIES:
        raise ImageError(f"not a label image: label id {largest}, at most {MAX_CATEGORIES}")
    label = stored.astype(LABEL_TYPE)
    label[is_void] = IGNORE_INDEX
    return label


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Parse the header and check the size it announces."""
    if not content:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(_why_unidentified(content)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise ImageError(f"too large: {pixels.group() if pixels else '?'} pixels") from None
    except Exception as error:  # as above: any exception may come out of a parser
        raise ImageError(_reason(error)) from None
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"damaged: size {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(f"too large: {width}x{height}")
    # Scaling the short side of such a strip to a network's input would take gigabytes.
    if max(image.size) > MAX_ELONGATION * min(image.size):
        raise ImageError(f"too elongated: {width}x{height}")
    _check_cost(image, content, max_pixels)
    return image


def _why_unidentified(content: bytes) -> str:
    if content.startswith(TIFF_SIGNATURES):
        try:
            TiffImageFile(io.BytesIO(content))
        except Exception as error:  # as in `load_image`
            if "unknown pixel mode" in str(error):
                return "not supported: a TIFF of samples of this kind"
    return "damaged: header" if content.startswith(SIGNATURES) else "not an image"


def _check_cost(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Refuse a file that takes far more memory or time than its size announces."""
    if isinstance(image, TiffImageFile):
        tile = [image.tag_v2.get(tag, 1) for tag in (TILE_WIDTH_TAG, TILE_LENGTH_TAG)]
        if not all(isinstance(length, int) for length in tile):
            raise ImageError("damaged: size of tiles")
        if tile[0] * tile[1] > max_pixels:
            raise ImageError(f"too large: tiles of {tile[0]}x{tile[1]}")
    elif isinstance(image, JpegImageFile) and _most_scans(content) > MAX_SCANS:
        scans = _num_scans(content)
        if scans > MAX_SCANS:
            raise ImageError(f"too large: {scans} scans")


def _most_scans(content: bytes) -> int:
    """No fewer than the scans of a JPEG, seen many times faster than by `bytes.count`."""
    marker = int.from_bytes(bytes([0xFF, START_OF_SCAN]), "little")
    pairs = (
        np.frombuffer(content, "<u2", count=(len(content) - start) // 2, offset=start)
        for start in (0, 1)
    )
    return sum(int(np.count_nonzero(part == marker)) for part in pairs)


def _num_scans(content: bytes) -> int:
    """Number of scans of a JPEG, those of embedded thumbnails not counted."""
    scans, position = 0, 2
    while marker := JPEG_MARKER.search(content, position):
        kind = content[marker.end() - 1]
        if kind == END_OF_IMAGE:
            break
        scans += kind == START_OF_SCAN
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the metadata cannot be parsed."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        return 1
    return value if value in UPRIGHT else 1


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in memory, of any mode: transparency on white, depths as `depth` says.

    Raises:
        ValueError: floats of which none is a number.
    """
    image = eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    """A short reason, the same in every run: Pillow's text without memory addresses."""
    if isinstance(error, MemoryError):
        return "too large: out of memory"
    text = re.sub(r"<[^>]*>", "", str(error)).strip()
    if isinstance(error, NotImplementedError):
        return f"not supported: {text}"
    if "truncated" in text.lower():
        return "truncated"
    return f"damaged: {one_line(text) or type(error).__name__}"
