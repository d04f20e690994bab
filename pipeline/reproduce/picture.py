"""A table as a grid of shaded cells: the number here, and below it the one in print."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from pipeline.report.inputs import score

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, EDGE = 110, 40, 250, 70, 12
SHADE = (31, 104, 171)  # of the largest number; 0 is white
BRIGHT = 0.55  # shares of the largest number above which text is white

# The number in print, and ours.
Pair = tuple[float | None, float | None]


def grid_picture(
    title: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Pair]]
) -> str:
    """An SVG image of a table.

    Args:
        title: above it.
        columns: headings by key.
        rows: by name, the numbers of each column, in percent.
    """
    numbers = [value for row in rows.values() for pair in row.values() for value in pair]
    top = max((value for value in numbers if value is not None), default=0.0) or 1.0
    width = LEFT + CELL_WIDTH * len(columns) + EDGE
    height = TOP + CELL_HEIGHT * len(rows) + 2 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(EDGE, 24, f"{title}: ours, and below it the paper's", size=15, anchor="start"),
    ]
    for index, heading in enumerate(columns.values()):
        parts.append(_text(LEFT + CELL_WIDTH * (index + 0.5), TOP - 10, heading))
    for number, (name, row) in enumerate(rows.items()):
        y = TOP + CELL_HEIGHT * number
        parts.append(_text(LEFT - 10, y + 25, name, anchor="end"))
        for index, column in enumerate(columns):
            paper, ours = row.get(column, (None, None))
            parts.append(_cell(LEFT + CELL_WIDTH * index, y, paper, ours, top))
    return "\n".join([*parts, "</svg>", ""])


def _cell(x: int, y: int, paper: float | None, ours: float | None, top: float) -> str:
    share = max(0.0, ours or 0.0) / top
    red, green, blue = (round(255 + (part - 255) * share) for part in SHADE)
    ink = "white" if share > BRIGHT else "black"
    centre = x + CELL_WIDTH / 2
    return "\n".join(
        [
            f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
            f'fill="rgb({red},{green},{blue})" stroke="#bbb"/>',
            _text(centre, y + 17, score(ours), ink=ink),
            _text(centre, y + 32, score(paper), size=11, ink=ink),
        ]
    )


def _text(
    x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle", ink: str = "black"
) -> str:
    return (
        f'<text x="{x:g}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{ink}">{escape(text)}</text>'
    )
