"""Masks (H, W) that are hard for outlines: thin, one pixel, at the border, with holes and parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RING = """
.......
.#####.
.#...#.
.#.#.#.
.#...#.
.#####.
.......
"""
CORNERS_TOUCH = """
#.#.#
.#.#.
#.#.#
"""
TWO_HOLES_AND_TWO_PARTS = """
######....
#.##.#..##
######..##
..........
"""
HOLE_TOUCHES_CORNER_OF_HOLE = """
#####
#.###
##.##
#####
"""
DIAGONAL = """
#......
.#.....
..#....
...#...
"""
DRAWN = {
    "ring": RING,
    "corners": CORNERS_TOUCH,
    "two": TWO_HOLES_AND_TWO_PARTS,
    "hole_at_hole": HOLE_TOUCHES_CORNER_OF_HOLE,
    "diagonal": DIAGONAL,
}


def drawn(text: str) -> NDArray[np.bool_]:
    """The mask of a drawing, # a pixel."""
    return np.array([[letter == "#" for letter in line] for line in text.split()])


def hard_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks by name, none of them empty."""
    masks = {name: drawn(text) for name, text in DRAWN.items()}
    masks["pixel"] = np.ones((1, 1), bool)
    for name, place in (("first", (0, 0)), ("last", (-1, -1)), ("middle", (4, 9))):
        masks[f"{name}_pixel"] = np.zeros((9, 17), bool)
        masks[f"{name}_pixel"][place] = True
    masks["whole"] = np.ones((5, 12), bool)
    masks["row"] = np.zeros((6, 40), bool)
    masks["row"][5] = True
    masks["column"] = masks["row"].T.copy()
    masks["frame"] = np.ones((30, 50), bool)
    masks["frame"][1:-1, 1:-1] = False
    generator = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        masks[f"noise_{share}"] = generator.random((40, 25)) < share
    y, x = np.mgrid[:60, :90]
    masks["disc"] = (y - 30) ** 2 + (x - 50) ** 2 < 29**2
    return masks
