"""Masks as polygons along the edges of their pixels, which lose nothing.

A polygon is (N, 2) integer corners x, y, where pixel (row, column) is the square from (column, row)
to (column + 1, row + 1). COCO's and YOLO's files know no holes: a polygon goes from its outline to
each hole and back on the same way, so that readers which fill by the even-odd rule, as pycocotools
does, leave the hole free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Polygon = NDArray[np.int64]


class Part(NamedTuple):
    """One connected part of a mask, pixels connected by their sides.

    Attributes:
        outline: clockwise as seen.
        holes: anticlockwise.
    """

    outline: Polygon
    holes: list[Polygon]


def parts(mask: NDArray[np.bool_]) -> list[Part]:
    """The parts of a mask (H, W), from the top; none of an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    cropped = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    labels, count = ndimage.label(cropped)
    found = [Part(np.empty((0, 2), np.int64), []) for _ in range(count)]
    for ring in _rings(cropped):
        x, y = ring[0]
        ring += (left, top)
        if labels[y, x]:
            found[labels[y, x] - 1] = Part(ring, found[labels[y, x] - 1].holes)
        else:
            found[labels[y - 1, x] - 1].holes.append(ring[::-1])
    return found


def polygons(mask: NDArray[np.bool_]) -> list[Polygon]:
    """One polygon for each part of a mask (H, W), its holes joined to it."""
    return [_joined(part.outline, part.holes) for part in parts(mask)]


def one_polygon(mask: NDArray[np.bool_]) -> Polygon:
    """All parts of a mask (H, W) with their holes as one polygon; one without corners if empty."""
    found = sorted(parts(mask), key=lambda part: -len(part.outline))
    if not found:
        return np.empty((0, 2), np.int64)
    largest, *others = found
    rings = [*largest.holes, *(_joined(part.outline, part.holes) for part in others)]
    return _joined(largest.outline, rings)


def _joined(outline: Polygon, rings: Sequence[Polygon]) -> Polygon:
    """The outline with a way to each ring and back, at the nearest corners of both."""
    if not rings:
        return outline
    tree = cKDTree(outline)
    detours: dict[int, list[Polygon]] = {}
    for ring in rings:
        distances, nearest = tree.query(ring)
        start = int(distances.argmin())
        there = np.roll(ring, -start, axis=0)
        detours.setdefault(int(nearest[start]), []).append(np.vstack([there, there[:1]]))
    pieces, done = [], 0
    for place in sorted(detours):
        corner = outline[place : place + 1]
        pieces.append(outline[done : place + 1])
        for detour in detours[place]:
            pieces += [detour, corner]
        done = place + 1
    return np.vstack([*pieces, outline[done:]])


def _rings(mask: NDArray[np.bool_]) -> Iterator[Polygon]:
    """The closed ways along the edges of a mask, each from its top left corner to the right.

    The corners of a row, from the left, are ends of horizontal edges in pairs, those of a column
    of vertical ones. Where two pixels touch at a corner alone, it is there twice, and the ways keep
    the pixels apart.
    """
    y, x, is_falling = _corners(mask)
    count = len(x)
    across = np.arange(count) ^ 1  # the other end of the horizontal edge
    # The copies of a double corner keep their order in its column where its pixels fall.
    order = np.lexsort((np.where(is_falling, np.arange(count), -np.arange(count)), y, x))
    along = np.empty(count, np.int64)
    along[order] = order[np.arange(count) ^ 1]
    corners = np.stack([x, y], axis=1)
    across_list, along_list, is_done = across.tolist(), along.tolist(), bytearray(count)
    for start in range(count):
        if is_done[start]:
            continue
        ring, place = [], start
        while not is_done[place]:
            other = across_list[place]
            is_done[place] = is_done[other] = True
            ring += [place, other]
            place = along_list[other]
        yield corners[ring]


def _corners(
    mask: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Rows and columns of the corners, sorted by both, and where two pixels fall from the left.

    A corner has one or three pixels around it, or two across, and then is there twice.
    """
    framed = np.pad(mask, 1)
    above, below = framed[:-1], framed[1:]
    around = [above[:, :-1], above[:, 1:], below[:, :-1], below[:, 1:]]
    upper_left, upper_right, lower_left, lower_right = around
    is_odd = upper_left ^ upper_right ^ lower_left ^ lower_right
    is_double = (upper_left == lower_right) & (upper_right == lower_left)
    is_double &= upper_left != upper_right
    rows, columns = np.nonzero(is_odd | is_double)
    times = 1 + is_double[rows, columns]
    return (
        np.repeat(rows, times),
        np.repeat(columns, times),
        np.repeat(is_double[rows, columns] & upper_left[rows, columns], times),
    )
