"""Picture of a confusion matrix, and the pairs of classes that are confused most.

K classes, the background among them where it counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.overlays import FALSE, INK, MARGIN, PAPER, Colour, Pixels, add_legend
from pipeline.scoring.confusion import shares, worst_pairs

SIDE = 640  # of the matrix, where its cells need not be larger or smaller
CELL = (11, 28)  # smallest that can be named, largest
MAX_SIDE = 2816  # of the matrix: 256 classes can be named
NAME_LENGTH = 32
FONT_SIZE = 14
BOX = 3
DARKEST: Colour = (8, 48, 107)
NO_PIXEL: Colour = (226, 226, 226)
SCALE = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)  # shares in the legend
UNSEEN = FALSE


def draw_confusion(
    counts: NDArray[np.integer], names: Sequence[str], unseen: Collection[int] = ()
) -> Image.Image:
    """Rows are true classes, columns predictions, colours shares of the true class's pixels.

    Unseen classes come last; where true and predicted class are both unseen is boxed. The worst
    pairs are listed below. Without space for them, hundreds of names are left out.

    Args:
        counts: (K, K) pixels by target (row) and prediction (column).
        names: K classes.
        unseen: places of the unseen ones.
    """
    order = [*(i for i in range(len(names)) if i not in unseen), *sorted(unseen)]
    matrix = _matrix(shares(counts)[np.ix_(order, order)], num_unseen=len(unseen))
    if len(names) * CELL[0] <= MAX_SIDE:
        colours = [UNSEEN if i in unseen else INK for i in order]
        matrix = _with_names(matrix, [_short(names[i]) for i in order], colours)
    legend = [(f"{share:.0%}".replace("%", " %"), _colour(share)) for share in SCALE]
    picture = add_legend(matrix, [*legend, ("no true pixel", NO_PIXEL)])
    return _with_lines(picture, above=_title(unseen), below=_pairs(counts, names))


def describe_pairs(counts: NDArray[np.integer], names: Sequence[str]) -> list[str]:
    """The worst pairs in words: `horse taken for cow: 34.2 %`, of the pixels of horses."""
    return [
        f"{names[true]} taken for {names[predicted]}: {100 * share:.1f} %"
        for true, predicted, share in worst_pairs(counts)
    ]


def _title(unseen: Collection[int]) -> list[str]:
    boxed = "; boxed: both unseen" if unseen else ""
    return [f"Rows: true class. Columns: predicted{boxed}."]


def _pairs(counts: NDArray[np.integer], names: Sequence[str]) -> list[str]:
    if not counts.any():
        return ["No pixel was scored."]
    pairs = describe_pairs(counts, [_short(name) for name in names])
    return ["Most confused, in percent of the true class:" if pairs else "No mistakes.", *pairs]


def _matrix(share: NDArray[np.float64], *, num_unseen: int) -> Image.Image:
    """The cells alone, with the box."""
    cell = max(1, min(max(SIDE // len(share), CELL[0]), CELL[1], MAX_SIDE // len(share)))
    side = min(cell * len(share), MAX_SIDE)
    cells = Image.fromarray(_colours(share))
    picture = cells.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, side - 1, side - 1), outline=INK)
    if num_unseen:
        corner = side - round(side * num_unseen / len(share))
        draw.rectangle((corner, corner, side - 1, side - 1), outline=UNSEEN, width=BOX)
    return picture


def _colours(share: NDArray[np.float64]) -> Pixels:
    """White to `DARKEST` by the root of the share, so that small ones show."""
    depth = np.sqrt(np.nan_to_num(share))[..., None]
    mixed = (1 - depth) * np.array(PAPER) + depth * np.array(DARKEST)
    return np.where(np.isnan(share)[..., None], NO_PIXEL, mixed.round()).astype(np.uint8)


def _colour(share: float) -> Colour:
    red, green, blue = _colours(np.array([[share]]))[0, 0].tolist()
    return red, green, blue


def _with_names(
    matrix: Image.Image, names: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """The matrix with names of the rows at its left and of the columns, upright, above it."""
    cell = matrix.width // len(names)
    font = ImageFont.load_default(min(FONT_SIZE, cell - 1))
    width = int(max(font.getlength(name) for name in names)) + 2 * MARGIN
    rows = Image.new("RGB", (width, matrix.height), PAPER)
    columns = rows.copy()
    for strip, anchor, x in ((rows, "rm", width - MARGIN), (columns, "lm", MARGIN)):
        draw = ImageDraw.Draw(strip)
        for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
            y = number * cell + cell // 2
            draw.text((x, y), name, fill=colour, font=font, anchor=anchor)
    result = Image.new("RGB", (width + matrix.width, width + matrix.height), PAPER)
    result.paste(rows, (0, width))
    result.paste(columns.transpose(Image.Transpose.ROTATE_90), (width, 0))
    result.paste(matrix, (width, width))
    return result


def _with_lines(picture: Image.Image, *, above: Sequence[str], below: Sequence[str]) -> Image.Image:
    font, line = ImageFont.load_default(FONT_SIZE), FONT_SIZE + MARGIN
    width = int(max(font.getlength(text) for text in (*above, *below))) + 2 * MARGIN
    top = len(above) * line + MARGIN
    height = top + picture.height + len(below) * line + 2 * MARGIN
    result = Image.new("RGB", (max(width, picture.width), height), PAPER)
    result.paste(picture, (0, top))
    draw = ImageDraw.Draw(result)
    for start, lines in ((MARGIN // 2, above), (top + picture.height + MARGIN, below)):
        for number, text in enumerate(lines):
            draw.text((MARGIN, start + number * line), text, fill=INK, font=font)
    return result


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."
