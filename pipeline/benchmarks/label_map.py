"""Examples whose truth is one PNG of labels, and how such PNGs are read.

Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.benchmarks.example import InstanceTarget, MaskHeader
from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX, LabelMap

INDEX_MODES = ("1", "L", "P", "I;16", "I")
GREY_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
HALF = 128
# In a PNG's header: bits per channel, colour type, and the type that is greys without alpha.
DEPTH_BYTE, COLOUR_BYTE, GREYS = 24, 25, 0


@dataclass(frozen=True)
class LabelMapExample:
    """One image with a label map and no objects; see `Example`.

    Attributes:
        image_id: see `Example`.
        image_path: the image file.
        mask_path: the PNG of labels.
        decode: reads `mask_path` into label ids (H, W).
        vocabulary: see `Example`.
        indices: the palette indices that may be label ids or void; none if colours decide.
    """

    image_id: str
    image_path: Path
    mask_path: Path
    decode: Callable[[Path], LabelMap]
    vocabulary: Sequence[str] | None = None
    indices: Iterable[int] = ()

    def mask_headers(self) -> list[MaskHeader]:
        return [read_header(self.mask_path, self.indices)]

    def semantic(self) -> LabelMap:
        return self.decode(self.mask_path)

    def instances(self) -> list[InstanceTarget]:
        raise PipelineError(
            f"{self.mask_path}: a label map, which tells no objects apart; remove `instance` from "
            "the benchmark's metrics"
        )

    def void(self) -> NDArray[np.bool_]:
        return self.semantic() == IGNORE_INDEX


def read_indices(path: Path, modes: Sequence[str] = INDEX_MODES) -> NDArray[np.integer]:
    """Stored values (H, W) of a PNG of labels: palette indices, or greys of 1 to 16 bits.

    Args:
        path: the file.
        modes: Pillow's names of the kinds of PNG that are accepted.

    Raises:
        PipelineError: missing, unreadable, or of another kind, as a picture in colours is.
    """
    expected = "label ids as palette indices (mode P) or greys"
    content, image = _open(path, modes, expected)
    values = np.array(image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if image.mode == "L" and content[COLOUR_BYTE] == GREYS:
        # Pillow spreads greys of 2 and 4 bits over 0 to 255.
        values //= 255 // (2 ** content[DEPTH_BYTE] - 1)
    return values


def read_greys(path: Path) -> NDArray[np.uint8]:
    """Grey levels (H, W) of a PNG of up to 8 bits, whatever way they are stored; alpha is dropped.

    Raises:
        PipelineError: missing, unreadable, or of 16 bits.
    """
    _, image = _open(path, GREY_MODES, "grey levels from 0 to 255")
    return np.array(image.convert("L"))


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Channels (H, W, 3) of an RGB PNG.

    Raises:
        PipelineError: missing, unreadable, or stored in another way.
    """
    _, image = _open(path, ("RGB",), "the three channels red, green, blue (mode RGB)")
    return np.array(image)


def read_header(
    path: Path, indices: Iterable[int] = (), standard: Mapping[int, bytes] | None = None
) -> MaskHeader:
    """Size of a PNG, and the colours of some palette indices, from its header.

    Args:
        path: the file.
        indices: of the palette; those beyond its end are left out.
        standard: see `MaskHeader`.

    Raises:
        PipelineError: missing or not a PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            palette = image.palette.getdata()[1] if image.mode == "P" and image.palette else b""
            return MaskHeader(
                path, (image.height, image.width), colours_of(palette, indices), standard or {}
            )
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such mask; expected a PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PipelineError(f"{path}: not a readable PNG mask ({error})") from None


def colours_of(palette: bytes, indices: Iterable[int]) -> dict[int, bytes]:
    """Index -> RGB of those of `indices` that a palette of RGB triples has."""
    return {
        index: palette[3 * index : 3 * index + 3] for index in indices if 3 * index < len(palette)
    }


def check_label_ids(labels: NDArray[np.integer], num_categories: int, path: Path) -> None:
    """Raise if `labels`, read from `path`, holds a label id above the number of categories."""
    highest = int(labels.max(initial=0))
    if highest > num_categories:
        raise PipelineError(
            f"{path}: label id {highest}, but the benchmark has {num_categories} categories; "
            "correct its `categories`"
        )


def _open(path: Path, modes: Sequence[str], expected: str) -> tuple[bytes, Image.Image]:
    """Content and decoded image of a PNG."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such mask; expected a PNG of {expected}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <")[0]  # without the address of the buffer
        raise PipelineError(f"{path}: not a readable PNG mask ({reason})") from None
    if image.mode not in modes:
        raise PipelineError(f"{path}: a PNG of mode {image.mode}; expected {expected}")
    return content, image
