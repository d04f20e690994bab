"""Frames of a video with the objects that were followed, at the frames' own size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.overlays import DrawnInstance, Pixels, colour_map

NUM_COLOURS = 500  # tracks further apart may share one
ALPHA = 0.5
FONT_SIZE = 13
INK, PAPER = (24, 24, 24), (255, 255, 255)


def overlay_tracks(
    image: Pixels,
    instances: Sequence[DrawnInstance],
    track_ids: Sequence[int],
    *,
    names: Sequence[str],
) -> Image.Image:
    """Objects in the colours of their tracks, outlined, with number and name.

    Args:
        image: (H, W, 3) uint8.
        instances: objects, the best first; it is drawn last, on top.
        track_ids: of each, from 1.
        names: category names in the order of the label ids from 1.
    """
    palette = _palette()
    colours = image.astype(np.float32)
    drawn = list(zip(instances, track_ids, strict=True))[::-1]
    for instance, track_id in drawn:
        mask, colour = instance.mask, palette[(track_id - 1) % NUM_COLOURS]
        edge = mask & ~_eroded(mask)
        colours[mask] = (1 - ALPHA) * image[mask] + ALPHA * colour
        colours[edge] = colour
    picture = Image.fromarray(colours.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for instance, track_id in drawn:
        x, y = instance.bbox_xyxy[:2]
        _caption(draw, picture.size, (x, y), f"{track_id} {names[instance.label_id - 1]}")
    return picture


def overlay_label_map(image: Pixels, labels: NDArray[np.integer]) -> Image.Image:
    """Label colours over an image, for a network that finds no objects.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) label ids from 0, which is not drawn.
    """
    palette = colour_map(int(labels.max(initial=0)) + 1)
    colours = (1 - ALPHA) * image + ALPHA * palette[np.maximum(labels, 0)]
    chosen = np.where((labels > 0)[..., None], colours, image)
    return Image.fromarray(chosen.round().astype(np.uint8))


@cache
def _palette() -> Pixels:
    return colour_map(NUM_COLOURS + 1)[1:]


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are of the mask, too; the border of the image is outside."""
    wide = np.pad(mask, 1)
    return wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def _caption(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[int, int], text: str
) -> None:
    """Text on a white plate, moved inwards where it would leave the picture."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = int(font.getlength(text)) + 7, FONT_SIZE + 5
    x = max(0, min(corner[0], size[0] - width))
    y = max(0, min(corner[1], size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=PAPER, outline=INK)
    draw.text((x + 3, y + 1), text, fill=INK, font=font)
