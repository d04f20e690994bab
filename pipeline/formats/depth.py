"""Samples of any depth as 8 bits a channel: the one rule of what is black and what is white.

Up to 8 bits they are as the format has them. Beyond, black is 0 and white is

1. what the file says its samples reach, if none exceeds it: PNG's sBIT, the maxval of Netpbm,
   TIFF's SMaxSampleValue, MaxSampleValue, BitsPerSample. 65535 of 16 bits says nothing;
2. of 16 bits: the largest value of 8, 10, 12, 14 or 16 bits, the fewest that hold all samples;
3. of 32 bits and of signed integers: 1 for floats in [0, 1], 255 for values in [0, 255] that reach
   128; else white is the largest value, and black the smallest.

None of these holds if it makes all samples black.

The colours of an image have one white, its alpha another. NaN is black.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

WORD_DEPTHS = (8, 10, 12, 14, 16)
FULL_WORD = 65535
# From here on, the high bytes of 16-bit samples say that all 16 bits are in use.
FULL_HIGH_BYTE = 64
# The last level becomes 255, and a value of 16 bits keeps its high byte.
BELOW_256 = np.float32(255.999)
# Raw modes of which Pillow keeps the high bytes only.
WORD_COLOURS = re.compile(r"(LA|RGB[AaX]?|CMYK);16([BLN])")
OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# libtiff hands these out in the machine's order of bytes, Pillow takes them in that of the file.
SWAPPED = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
SIGNIFICANT_BITS = re.compile(rb"\0\0\0([\1-\4])sBIT(.{4})", re.DOTALL)
# Tags of TIFF.
BITS, PHOTOMETRIC, MAX_VALUE, PLANES, SAMPLE_FORMAT, SIGNED_MAX_VALUE = 258, 262, 281, 284, 339, 341
WHITE_IS_ZERO, SEPARATE = 0, 2
UNSIGNED, SIGNED = (1,), (2,)

Band = np.ndarray


def decode(image: ImageFile.ImageFile, content: bytes) -> Image.Image:
    """The pixels of a file, 8 bits a channel; they may have alpha or a palette.

    Args:
        image: the file, opened and not loaded.
        content: its bytes.

    Raises:
        NotImplementedError: samples that Pillow misreads.
        ValueError: "truncated", or no sample is a number. Pillow raises anything.
    """
    codec, rawmode, maxval = _coding(image)
    if codec == "ppm":
        return _decode_netpbm(image, content, maxval)
    if codec == "ppm_plain" and maxval > 255 and image.mode != "I":
        raise NotImplementedError("Netpbm as text with colours of more than 8 bits")
    if codec == "raw" and _tag(image, PLANES) == SEPARATE and max(_tag(image, BITS)) > 8:
        raise NotImplementedError("planes of more than 8 bits without compression")
    if codec == "libtiff" and sys.byteorder == "little":
        _use_rawmode(image, SWAPPED.get(rawmode, rawmode))
    if WORD_COLOURS.fullmatch(rawmode):
        return _decode_words(image, content, rawmode)
    image.load()
    if 255 < maxval < FULL_WORD:  # of text, which Pillow scales to 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return eight_bits(image, _stated_white(image, content))


def eight_bits(image: Image.Image, stated: float | None = None) -> Image.Image:
    """An image in memory, 8 bits a channel.

    Args:
        image: of any mode.
        stated: the largest value of its samples, if a file says so.

    Raises:
        ValueError: no sample is a number.
    """
    is_signed_byte = image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        gray = Image.fromarray(_narrow([values], stated)[0])
        _whiten(gray, [values], image.info.get("transparency"))
    elif image.mode in ("I", "F") or is_signed_byte:
        values = np.asarray(image)
        if is_signed_byte:
            values = values.view(np.int8)
        elif _tag(image, BITS) == (32,) and _tag(image, SAMPLE_FORMAT) in (None, UNSIGNED):
            values = values.view(np.uint32)
        gray = Image.fromarray(_stretch(values, stated))
    else:
        return image
    return ImageOps.invert(gray) if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO else gray


def _tag(image: Image.Image, number: int) -> Any:
    return image.tag_v2.get(number) if isinstance(image, TiffImageFile) else None


def _coding(image: ImageFile.ImageFile) -> tuple[str, str, int]:
    """Codec and raw mode of a file that is not loaded; of Netpbm also its maxval, if not 255."""
    if not image.tile:
        return "", "", 0
    codec, _, _, args = image.tile[0]
    if not isinstance(args, tuple):
        return codec, str(args), 0
    return codec, str(args[0]), args[1] if codec.startswith("ppm") else 0


def _use_rawmode(image: ImageFile.ImageFile, rawmode: str) -> None:
    """Have a file's samples, not loaded yet, taken for others of the same size."""
    make_tile = getattr(ImageFile, "_Tile", lambda *parts: parts)  # tuples before Pillow 11
    image.tile = [
        make_tile(codec, box, start, (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode)
        for codec, box, start, args in image.tile
    ]


def _decode_netpbm(image: ImageFile.ImageFile, content: bytes, maxval: int) -> Image.Image:
    """Pixels of a binary file whose maxval is not that of its type; Pillow's loop is slow."""
    num_bands, start = len(image.getbands()), image.tile[0][2]
    dtype = np.dtype(">u2" if maxval > 255 else "u1")
    count = image.width * image.height * num_bands
    if len(content) - start < count * dtype.itemsize:
        raise ValueError("truncated")
    values = np.frombuffer(content, dtype, count, start)
    bands = _narrow(np.moveaxis(values.reshape(image.height, image.width, num_bands), 2, 0), maxval)
    mode = "L" if num_bands == 1 else image.mode
    return Image.merge(mode, [Image.fromarray(band) for band in bands])


def _decode_words(image: ImageFile.ImageFile, content: bytes, rawmode: str) -> Image.Image:
    """Pixels whose colours have 16 bits each: Pillow keeps one byte of them at a time."""
    is_premultiplied = rawmode.startswith("RGBa")
    if is_premultiplied:  # or the high bytes would be divided by themselves
        rawmode = rawmode.replace("a", "A")
        _use_rawmode(image, rawmode)
    image.load()
    num_colours = 3 if image.mode == "RGBA" and not is_premultiplied else len(image.getbands())
    stated, transparent = _stated_white(image, content), image.info.get("transparency")
    peaks = np.array(image.getextrema())[:, 1]
    groups = (peaks[:num_colours], peaks[num_colours:])
    is_full = all(group.max() >= FULL_HIGH_BYTE for group in groups if group.size)
    if is_full and not (is_premultiplied or stated or transparent):
        return image
    if _tag(image, PLANES) == SEPARATE:  # libtiff chooses the bytes
        raise NotImplementedError("planes of fewer than 16 bits in 16")
    low = _low_bytes(image, content, rawmode)
    words = [
        np.asarray(image.getchannel(band)).astype(np.uint16) << 8 | np.asarray(low.getchannel(band))
        for band in range(len(peaks))
    ]
    bands = _narrow(words[:num_colours], stated) + _narrow(words[num_colours:], stated)
    mode = "RGBa" if is_premultiplied else image.mode
    result = Image.merge(mode, [Image.fromarray(band) for band in bands])
    _whiten(result, words, transparent)
    return result.convert("RGBA") if is_premultiplied else result


def _low_bytes(image: ImageFile.ImageFile, content: bytes, rawmode: str) -> Image.Image:
    """The low bytes of the samples of which `image` has the high ones."""
    low = Image.open(io.BytesIO(content), formats=(image.format or "",))
    colours, _, order = rawmode.partition(";16")
    _use_rawmode(low, "RGBA" if colours == "LA" else f"{colours};16{OTHER_BYTE[order]}")
    low.load()
    if colours != "LA":
        return low
    _, gray, _, alpha = low.split()
    return Image.merge("RGBA", (gray, gray, gray, alpha))


def _whiten(image: Image.Image, words: Sequence[Band], transparent: Any) -> None:
    """Make white what PNG's tRNS, one value a band, says is transparent."""
    if transparent is not None:
        values = transparent if isinstance(transparent, tuple) else (transparent,)
        hits = [band == value for band, value in zip(words, values, strict=True)]
        image.paste("white", mask=Image.fromarray(np.logical_and.reduce(hits)))


def _stated_white(image: Image.Image, content: bytes) -> float | None:
    """The largest value that the samples of a deep file may have, as far as it says so."""
    if image.format == "PNG":
        found = SIGNIFICANT_BITS.search(content, 0, max(0, content.find(b"IDAT")))
        return 2.0 ** max(found[2][: found[1][0]]) - 1 if found else None
    for tag in (SIGNED_MAX_VALUE, MAX_VALUE):
        value = _tag(image, tag)
        try:
            return float(max(value) if isinstance(value, tuple) else value)
        except (TypeError, ValueError, ArithmeticError):  # absent, or no number
            continue
    bits = _tag(image, BITS)
    return 2.0 ** max(bits) - 1 if bits and 8 < max(bits) < 16 else None


def _fitting(white: float | None, largest: float) -> float | None:
    """A stated white, if it fits the samples: none exceeds it, nor are all of them black."""
    return white if white is not None and largest <= white <= 256 * largest else None


def _narrow(bands: Iterable[Band], stated: float | None) -> list[Band]:
    """Unsigned samples of up to 16 bits as bytes, all with the same white."""
    bands = list(bands)
    largest = max((int(band.max()) for band in bands), default=0)
    white = _fitting(None if stated == FULL_WORD else stated, largest) or next(
        full for full in (2**depth - 1 for depth in WORD_DEPTHS) if largest <= full
    )
    return [(band * (BELOW_256 / np.float32(white))).astype(np.uint8) for band in bands]


def _stretch(values: Band, stated: float | None) -> Band:
    """Other samples (H, W) as bytes."""
    numbers = values[np.isfinite(values)]
    if not numbers.size:
        raise ValueError("no sample is a number")
    black, white = float(numbers.min()), float(numbers.max())
    if black >= 0 and (usual := _fitting(stated, white) or _usual_white(white, values.dtype)):
        black, white = 0.0, usual
    scale = 255 / (white - black) if white > black else 0.0
    with np.errstate(invalid="ignore"):  # of NaN
        return np.stack([_scaled_row(row, black, scale) for row in values])


def _usual_white(largest: float, dtype: np.dtype) -> float | None:
    if largest <= 1 and dtype.kind == "f":
        return _fitting(1.0, largest)
    return 255.0 if 128 <= largest <= 255 else None


def _scaled_row(row: Band, black: float, scale: float) -> Band:
    """One row, in double precision without holding all of them so."""
    scaled = np.nan_to_num((row.astype(np.float64) - black) * scale, nan=0, posinf=255, neginf=0)
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)
