"""Pictures of predictions, for reports and for users: masks and objects over images.

Images are (H, W, 3) uint8, label maps (H, W) integers with 0 for background and `IGNORE_INDEX` for
void. Small images are enlarged and huge ones reduced, so that every picture can be looked at.
"""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.formats.labels import IGNORE_INDEX

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
LegendEntry = tuple[str, Colour]
Item = TypeVar("Item", bound=np.generic)

MIN_SIDE = 288
MAX_SIDE = 1600
FONT_SIZE = 13
LINE_HEIGHT = 20
MARGIN = 6
OUTLINE = 2
DRAWN_INSTANCES = 20
# Of label ids from 1: the first n are far apart for any n, to the normal eye and to those without
# red or green receptors, and none is grey, dark or like `VOID_COLOUR`.
SAFE_COLOURS: tuple[Colour, ...] = (
    (240, 135, 15),
    (90, 0, 255),
    (150, 255, 240),
    (0, 90, 150),
    (120, 180, 255),
    (180, 0, 0),
    (165, 30, 75),
    (75, 120, 255),
    (255, 255, 0),
    (255, 255, 135),
    (0, 165, 165),
    (15, 210, 135),
)
GOLDEN_RATIO = 0.618034
FIRST_HUE = 0.02
# (saturation, value), taken in turn.
SHADES = ((0.85, 0.92), (0.6, 1.0), (0.9, 0.72))
FADED = 0.35
INK: Colour = (24, 24, 24)
PAPER: Colour = (255, 255, 255)
VOID_COLOUR: Colour = (224, 224, 192)
# Blue and orange rather than green and red: readable with any colour vision.
CORRECT: Colour = (0, 114, 178)
FALSE: Colour = (213, 94, 0)
MISSED: Colour = (240, 228, 66)
CONFUSED: Colour = (204, 121, 167)
ERROR_LEGEND: tuple[LegendEntry, ...] = (
    ("right (TP)", CORRECT),
    ("false (FP)", FALSE),
    ("missed (FN)", MISSED),
    ("wrong category", CONFUSED),
    ("void", VOID_COLOUR),
)


class DrawnInstance(Protocol):
    """A predicted object, as `overlay_instances` reads it."""

    @property
    def label_id(self) -> int: ...

    @property
    def score(self) -> float: ...

    @property
    def mask(self) -> NDArray[np.bool_]: ...

    @property
    def bbox_xyxy(self) -> tuple[int, int, int, int]: ...


def colour_map(count: int) -> Pixels:
    """Colours (count, 3) by label id; 0, the background, is black.

    A label id has its colour whatever `count` is, so a category keeps it from run to run as long as
    its place among the categories stays. The first ones can be told apart with any colour vision;
    of more than those, neighbouring ids lie far apart in hue. No category is grey or dark, as some
    are in VOC's own palette, which label maps have as files: so all show on grey images.
    """
    colours = np.zeros((max(count, 1), 3))
    safe = np.array(SAFE_COLOURS)[: max(count - 1, 0)]
    colours[1 : 1 + len(safe)] = safe
    for label_id in range(1 + len(SAFE_COLOURS), count):
        hue = (FIRST_HUE + (label_id - 1) * GOLDEN_RATIO) % 1
        shade = SHADES[(label_id - 1) % len(SHADES)]
        colours[label_id] = 255 * np.array(colorsys.hsv_to_rgb(hue, *shade))
    return colours[:count].round().astype(np.uint8)


def overlay_semantic(
    image: Pixels,
    labels: NDArray[np.integer],
    palette: Pixels,
    *,
    names: Sequence[str] | None = None,
    context: Collection[int] = (),
) -> Image.Image:
    """Label colours over a grey image, with a legend strip of the names that occur.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) label ids.
        palette: (K + 1, 3) uint8 by label id, see `colour_map`.
        names: K category names; without them there is no legend.
        context: label ids whose pixels are black.
    """
    _check_sizes(image, labels)
    is_context = np.isin(labels, list(context))
    palette = palette.copy()
    palette[list(context)] = 0
    colours = np.zeros_like(image)
    colours[labels > 0] = palette[labels[labels > 0]]
    colours[labels == IGNORE_INDEX] = VOID_COLOUR
    grey = np.where(is_context[..., None], np.uint8(0), _grey(image))
    picture = _blend(grey, colours, where=labels != 0, alpha=0.55)
    if names is None:
        return picture
    present = [int(label_id) for label_id in np.unique(labels) if label_id > 0]
    return add_legend(picture, [(names[i - 1], _colour(palette[i])) for i in present])


def overlay_instances(
    image: Pixels,
    instances: Iterable[DrawnInstance],
    *,
    names: Sequence[str],
    context: Collection[int] = (),
) -> Image.Image:
    """The best `DRAWN_INSTANCES` objects, each in a colour of its own, outlined and named.

    Args:
        image: (H, W, 3) uint8.
        instances: objects, the best first; it is drawn last, on top.
        names: category names in the order of the label ids from 1.
        context: label ids whose objects are black.
    """
    drawn = list(islice(instances, DRAWN_INSTANCES))
    masks = [instance.mask for instance in drawn]
    palette = colour_map(len(drawn) + 1)
    palette[1:][[instance.label_id in context for instance in drawn]] = 0
    colours = image.copy()
    covered = np.zeros(image.shape[:2], dtype=bool)
    for number, mask in reversed(list(enumerate(masks, start=1))):
        _check_sizes(image, mask)
        colours[mask] = palette[number]
        covered |= mask
    picture = np.asarray(_blend(image, colours, where=covered, alpha=0.5)).copy()
    for number, mask in reversed(list(enumerate(masks, start=1))):
        picture[_outline(_resize(mask, picture.shape[:2]))] = palette[number]
    result = Image.fromarray(picture)
    draw = ImageDraw.Draw(result)
    scale_x, scale_y = result.width / image.shape[1], result.height / image.shape[0]
    for instance in reversed(drawn):
        x0, y0 = instance.bbox_xyxy[0] * scale_x, instance.bbox_xyxy[1] * scale_y
        caption = f"{names[instance.label_id - 1]} {instance.score:.2f}"
        _draw_caption(draw, result.size, (int(x0), int(y0)), caption)
    return result


def overlay_errors(
    image: Pixels, prediction: NDArray[np.integer], target: NDArray[np.integer]
) -> Image.Image:
    """Where a prediction is right, false, missed or of the wrong category, with a legend.

    Background that was left alone is a pale grey image.
    """
    _check_sizes(image, prediction)
    _check_sizes(image, target)
    scored = target != IGNORE_INDEX
    found, real = prediction > 0, target > 0
    colours = np.full_like(image, VOID_COLOUR)
    colours[scored & found & real & (prediction == target)] = CORRECT
    colours[scored & found & ~real] = FALSE
    colours[scored & ~found & real] = MISSED
    colours[scored & found & real & (prediction != target)] = CONFUSED
    pale = (_grey(image) * (1 - FADED) + 255 * FADED).astype(np.uint8)
    picture = _blend(pale, colours, where=~scored | found | real, alpha=0.6)
    return add_legend(picture, ERROR_LEGEND)


def add_legend(picture: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """Picture with a white strip of coloured squares and names below it, wrapped to its width."""
    if not entries:
        return picture
    places, rows = _flow([_text_width(name) + LINE_HEIGHT for name, _ in entries], picture.width)
    height = rows * LINE_HEIGHT + MARGIN
    result = Image.new("RGB", (picture.width, picture.height + height), PAPER)
    result.paste(picture, (0, 0))
    draw = ImageDraw.Draw(result)
    for (name, colour), (x, row) in zip(entries, places, strict=True):
        y = picture.height + MARGIN // 2 + row * LINE_HEIGHT
        box = (x, y + 4, x + LINE_HEIGHT - 8, y + LINE_HEIGHT - 4)
        draw.rectangle(box, fill=colour, outline=INK)
        draw.text((x + LINE_HEIGHT - 4, y + 2), name, fill=INK, font=_font())
    return result


def grid(pictures: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Pictures row by row on white, `columns` in a row, the tops of a row aligned."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    cell = max(picture.width for picture in pictures) + MARGIN
    heights = [max(picture.height for picture in row) for row in rows]
    size = (cell * min(columns, len(pictures)) - MARGIN, sum(heights) + MARGIN * (len(rows) - 1))
    result = Image.new("RGB", size, PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            result.paste(picture, (column * cell, top))
        top += height + MARGIN
    return result


def displayed(image: Pixels) -> Image.Image:
    """The image alone, at the size that the overlays have."""
    height, width = _display_size(image)
    picture = Image.fromarray(image)
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _grey(image: Pixels) -> Pixels:
    """The image without colour, so that only labels have one."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def _blend(
    image: Pixels, colours: Pixels, *, where: NDArray[np.bool_], alpha: float
) -> Image.Image:
    base = np.asarray(displayed(image), dtype=np.float32)
    size = base.shape[:2]
    weight = alpha * _resize(where, size)[..., None].astype(np.float32)
    mixed = base * (1 - weight) + _resize(colours, size) * weight
    return Image.fromarray(mixed.round().astype(np.uint8))


def _display_size(image: Pixels) -> tuple[int, int]:
    """(H, W) of the picture: enlarged by a whole factor, or reduced to `MAX_SIDE`."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    factor = min(-(-MIN_SIDE // min(height, width)), MAX_SIDE // max(height, width))
    return height * factor, width * factor


def _resize(values: NDArray[Item], size: tuple[int, ...]) -> NDArray[Item]:
    """Nearest neighbour to `size` (H, W)."""
    rows = (np.arange(size[0]) + 0.5) * values.shape[0] // size[0]
    columns = (np.arange(size[1]) + 0.5) * values.shape[1] // size[1]
    return values[rows.astype(int)][:, columns.astype(int)]


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask within `OUTLINE` of its edge; the image's border counts as one."""
    inner = np.pad(mask, 1)
    for _ in range(OUTLINE):
        core = inner.copy()
        core[1:] &= inner[:-1]
        core[:-1] &= inner[1:]
        core[:, 1:] &= inner[:, :-1]
        core[:, :-1] &= inner[:, 1:]
        inner = core
    return mask & ~inner[1:-1, 1:-1]


def _draw_caption(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], corner: tuple[int, int], text: str
) -> None:
    """Text on a white plate at `corner`, moved inwards where it would leave the picture."""
    width, height = _text_width(text) + 6, LINE_HEIGHT - 2
    x = max(0, min(corner[0], size[0] - width))
    y = max(0, min(corner[1], size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=PAPER, outline=INK)
    draw.text((x + 3, y + 1), text, fill=INK, font=_font())


def _flow(widths: Sequence[int], limit: int) -> tuple[list[tuple[int, int]], int]:
    """Places (x, row) of items set in lines no wider than `limit`, and the number of lines."""
    places: list[tuple[int, int]] = []
    x, row = MARGIN, 0
    for width in widths:
        if x > MARGIN and x + width > limit:
            x, row = MARGIN, row + 1
        places.append((x, row))
        x += width + 2 * MARGIN
    return places, row + 1


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _text_width(text: str) -> int:
    return int(_font().getlength(text)) + 1


def _colour(values: Pixels) -> Colour:
    return int(values[0]), int(values[1]), int(values[2])


def _check_sizes(image: Pixels, labels: NDArray[np.generic]) -> None:
    if labels.shape != image.shape[:2]:
        raise ValueError(f"map {labels.shape}: expected the image's {image.shape[:2]}")
