"""Bilateral solver: a mask snapped to the edges of its image.

Letters: H W pixels, V vertices of the grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import cg

from pipeline.models.masks.bilateral import bilateral_solve
from speed.harness import Bench, Pair
from speed.inputs import ellipses, photo

SPATIAL, LUMA, CHROMA = 16, 16, 8
DIMENSIONS = 5
HASH_BASE = 255.0
STEPS = 25
TOLERANCE = 1e-3
SMOOTHNESS = 256.0
CONFIDENCE = 0.999
EDGE = 1e-6
YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])

Floats = NDArray[np.floating]


def published_solve(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Floats:
    """Sparse matrices throughout: splat S, one blur a dimension, system, conjugate gradient."""
    coordinates = _coordinates(image)
    weights = HASH_BASE ** np.arange(DIMENSIONS)
    hashes, first, vertices = np.unique(
        coordinates @ weights, return_index=True, return_inverse=True
    )
    num_pixels, num_vertices = len(coordinates), len(hashes)
    splat = csr_matrix((np.ones(num_pixels), (vertices.ravel(), np.arange(num_pixels))))
    blurs = [_blur(hashes, coordinates[first], weights, axis) for axis in range(DIMENSIONS)]

    def blur(values: Floats) -> Floats:
        total = 2 * DIMENSIONS * values
        for matrix in blurs:
            total = total + matrix @ values
        return total

    counts = splat @ np.ones(num_pixels)
    n = np.ones(num_vertices)
    for _ in range(10):
        n = np.sqrt(n * counts / blur(n))
    m = n * blur(n)
    scale = diags(n)
    confidence = np.full(num_pixels, CONFIDENCE)
    data = splat @ confidence
    system = SMOOTHNESS * (diags(m) - scale @ blur(scale)) + diags(data)
    right_side = splat @ (confidence * mask.ravel())
    preconditioner = diags(1 / np.maximum(system.diagonal(), 1e-5))
    solution, _ = cg(
        system,
        right_side,
        x0=right_side / data,
        rtol=1e-5,
        atol=0.0,
        maxiter=STEPS,
        M=preconditioner,
    )
    return (splat.T @ solution).reshape(mask.shape)


def _coordinates(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(H * W, 5) cells of the pixels: x, y, luma and two chromas."""
    colours = np.tensordot(image, YUV, ([2], [1])) + np.array([0.0, 128.0, 128.0])
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    cells = np.dstack(
        (
            (columns / SPATIAL).astype(int),
            (rows / SPATIAL).astype(int),
            (colours[..., 0] / LUMA).astype(int),
            (colours[..., 1:] / CHROMA).astype(int),
        )
    )
    return cells.reshape(-1, DIMENSIONS)


def _blur(hashes: Floats, cells: NDArray[np.int64], weights: Floats, axis: int) -> csr_matrix:
    """(V, V) sum over the two neighbours of each vertex along one axis."""
    total = csr_matrix((len(hashes), len(hashes)))
    for step in (-1, 1):
        offset = np.zeros(DIMENSIONS)
        offset[axis] = step
        wanted = (cells + offset) @ weights
        place = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
        present = np.flatnonzero(hashes[place] == wanted)
        total = total + csr_matrix(
            (np.ones(len(present)), (present, place[present])), shape=total.shape
        )
    return total


def _off_edges(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image without colours on the edge of a cell, where rounding decides: they lose 1 of 255.

    Greys are such colours. The pipeline computes their cells in integers, exactly.
    """
    image = image.copy()
    while True:
        colours = np.tensordot(image, YUV, ([2], [1])) / (LUMA, CHROMA, CHROMA)
        on_edge = (np.abs(colours - np.round(colours)) < EDGE).any(axis=-1)
        if not on_edge.any():
            return image
        image[on_edge, 1] -= 1


def _prepare(_: Path, quick: bool) -> Pair:
    width, height = (60, 40) if quick else (500, 375)
    image = _off_edges(np.asarray(photo(3, width, height)))
    mask = np.logical_or(*ellipses(3, 2, (height, width)))

    def check(published: Floats, ours: Floats) -> str:
        difference = float(np.abs(published - ours).max())
        assert difference < TOLERANCE, f"outputs differ by {difference:.1e}"
        return f"outputs within {difference:.0e}"

    return Pair(lambda: published_solve(image, mask), lambda: bilateral_solve(image, mask), check)


BENCHES = [
    Bench(
        name="bilateral",
        title="bilateral solver: 500 x 375, 25 steps",
        target=2.5,
        stretch=3.4,
        prepare=_prepare,
    )
]
