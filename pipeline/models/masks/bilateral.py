"""Bilateral solver: snaps a coarse mask to the edges of its image (Barron and Poole, 2016).

Pixels are gathered in the cells ("vertices") of a grid over position and colour; the mask is then
smoothed over neighbouring cells and handed back to the pixels. SelfMask and ZUTIS refine their
pseudo-masks with it. Letters: H W pixels, V vertices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse
from scipy.sparse.linalg import cg

Floats = NDArray[np.float64]

# Millionths, so that colours are exact integers: a grey has exactly U = V = 128, the edge of a
# cell at the default sigma, and rounding would scatter greys over the cells on both sides.
COLOUR_UNIT = 1_000_000
RGB_TO_YUV = np.array(
    [[299_000, 587_000, 114_000], [-168_736, -331_264, 500_000], [500_000, -418_688, -81_312]],
    dtype=np.int32,
)
YUV_OFFSET = np.array([0, 128, 128], dtype=np.int32) * COLOUR_UNIT

BLUR_CENTRE = 2  # weight of the cell itself in each of the five dimensions
BISTOCHASTIC_STEPS = 10
SMOOTHNESS = 256.0
MIN_DIAGONAL = 1e-5
MAX_STEPS = 25  # the published code stops here, well before convergence
TOLERANCE = 1e-5


@dataclass(frozen=True)
class BilateralGrid:
    """The occupied cells of an image's bilateral grid.

    Attributes:
        vertex_of_pixel: (H, W) vertex index of each pixel; vertices are ordered by their
            coordinates, V most significant, then U, Y, y, x.
        pixel_counts: (V,) number of pixels of each vertex.
        blur: (V, V) symmetric weights: 10 on the diagonal, 1 between axis neighbours.
    """

    vertex_of_pixel: NDArray[np.int32]
    pixel_counts: Floats
    blur: sparse.csr_array

    def splat(self, values: Floats) -> Floats:
        """Sum (H, W) pixel values over each vertex: (V,)."""
        sums = np.bincount(self.vertex_of_pixel.ravel(), values.ravel())
        return sums.astype(np.float64)

    def slice(self, values: Floats) -> Floats:
        """Give each pixel the value of its vertex: (V,) -> (H, W)."""
        return values[self.vertex_of_pixel]


def bilateral_grid(
    image: NDArray[np.uint8], *, sigma_spatial: float, sigma_luma: float, sigma_chroma: float
) -> BilateralGrid:
    """Build the grid of an RGB image.

    Args:
        image: (H, W, 3) uint8, RGB.
        sigma_spatial: side of a cell in pixels.
        sigma_luma: its extent in Y, of 0..255.
        sigma_chroma: its extent in U and in V.

    Raises:
        ValueError: the image is empty or not (H, W, 3) uint8, or a sigma is not positive.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"expected an (H, W, 3) uint8 image, got {image.dtype} {image.shape}")
    if min(sigma_spatial, sigma_luma, sigma_chroma) <= 0:
        raise ValueError(
            f"sigmas must be positive, got {sigma_spatial}, {sigma_luma}, {sigma_chroma}"
        )
    height, width = image.shape[:2]
    coordinates = [
        np.floor(np.arange(width) / sigma_spatial)[None, :],
        np.floor(np.arange(height) / sigma_spatial)[:, None],
        *_colour_cells(image, (sigma_luma, sigma_chroma, sigma_chroma)),
    ]
    cells = np.zeros((height, width), np.int64)
    steps = []
    step = 1
    for coordinate in coordinates:
        cells += coordinate.astype(np.int64) * step
        steps.append(step)
        step *= int(coordinate.max()) + 2  # one more than needed: neighbours never wrap around
    vertices, vertex_of_pixel = _sorted_unique(cells.ravel())
    return BilateralGrid(
        vertex_of_pixel=vertex_of_pixel.reshape(height, width),
        pixel_counts=np.bincount(vertex_of_pixel).astype(np.float64),
        blur=_blur_matrix(vertices, steps),
    )


def _colour_cells(image: NDArray[np.uint8], sigmas: tuple[float, ...]) -> list[Floats]:
    """Cell of each pixel along Y, U and V, (H, W) each."""
    channels = [image[..., channel].astype(np.int32) for channel in range(3)]
    cells = []
    for weights, offset, sigma in zip(RGB_TO_YUV, YUV_OFFSET, sigmas, strict=True):
        level = sum((w * c for w, c in zip(weights, channels, strict=True)), start=offset)
        cells.append(np.floor(level / (COLOUR_UNIT * sigma)))
    return cells


def _sorted_unique(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The different values, ascending, and the place of each value among them.

    By a hash table: there are few different values, and sorting all of them takes longer.
    """
    encoded = pa.array(values).dictionary_encode()
    found = encoded.dictionary.to_numpy()
    order = np.argsort(found)
    place = np.empty(len(found), np.int32)
    place[order] = np.arange(len(found), dtype=np.int32)
    return found[order], place[encoded.indices.to_numpy()]


def _blur_matrix(vertices: NDArray[np.int64], steps: list[int]) -> sparse.csr_array:
    """Weights between the ascending cell numbers `vertices`, `steps` apart in each dimension."""
    num_vertices = len(vertices)
    everyone = np.arange(num_vertices)
    firsts, seconds = [], []
    for step in steps:
        place = np.searchsorted(vertices, vertices + step).clip(max=num_vertices - 1)
        has_neighbour = vertices[place] == vertices + step
        firsts.append(everyone[has_neighbour])
        seconds.append(place[has_neighbour])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    rows = np.concatenate((everyone, first, second))
    columns = np.concatenate((everyone, second, first))
    weights = np.ones(len(rows))
    weights[:num_vertices] = BLUR_CENTRE * len(steps)
    return sparse.csr_array((weights, (rows, columns)), shape=(num_vertices, num_vertices))


def bistochastise(grid: BilateralGrid) -> tuple[Floats, Floats]:
    """Scale the blur so that its rows sum to the pixel counts: vectors n and m, both (V,).

    diag(n) blur diag(n) has row sums m; ten rounds bring m close to the pixel counts.
    """
    n = np.ones_like(grid.pixel_counts)
    for _ in range(BISTOCHASTIC_STEPS):
        n = np.sqrt(n * grid.pixel_counts / (grid.blur @ n))
    return n, n * (grid.blur @ n)


def bilateral_solve(
    image: NDArray[np.uint8],
    target: NDArray[np.generic],
    *,
    sigma_spatial: float = 16,
    sigma_luma: float = 16,
    sigma_chroma: float = 8,
    confidence: float = 0.999,
    max_steps: int = MAX_STEPS,
    scale: float = 1.0,
) -> Floats:
    """Smooth `target` along the colours of `image`.

    Args:
        image: (H, W, 3) uint8, RGB.
        target: (H, W) mask or map, usually of 0 and 1.
        sigma_spatial: side of a grid cell in pixels.
        sigma_luma: its extent in luma.
        sigma_chroma: its extent in each chroma.
        confidence: weight of the target at every pixel, in (0, 1].
        max_steps: bound on the steps of conjugate gradient, which ends earlier once converged. The
            published code stops at 25, before that; results agree with it at that step only.
        scale: below 1, solve at this fraction of height and width and enlarge the result: faster,
            and not what the published code computes.

    Returns:
        (H, W) float64 map; the refined mask is where it exceeds 0.5.

    Raises:
        ValueError: image and target differ in size, or see `bilateral_grid`.
    """
    if target.shape != image.shape[:2]:
        raise ValueError(f"target {target.shape} and image {image.shape} differ in size")
    size = target.shape
    if scale < 1:
        smaller = tuple(max(1, round(side * scale)) for side in size)
        image, target = _resized(image, smaller), _resized(target.astype(np.float32), smaller)
        sigma_spatial *= scale
    grid = bilateral_grid(
        image, sigma_spatial=sigma_spatial, sigma_luma=sigma_luma, sigma_chroma=sigma_chroma
    )
    solution = grid.slice(_solve(grid, target, confidence=confidence, max_steps=max_steps))
    if scale < 1:
        return _resized(solution.astype(np.float32), size).astype(np.float64)
    return solution


def _solve(
    grid: BilateralGrid, target: NDArray[np.generic], *, confidence: float, max_steps: int
) -> Floats:
    """The smoothed target (H, W) at the vertices of the grid: (V,)."""
    n, m = bistochastise(grid)
    smoothing = sparse.diags_array(m) - sparse.diags_array(n) @ grid.blur @ sparse.diags_array(n)
    weights = grid.splat(np.full(target.shape, confidence))
    system = (SMOOTHNESS * smoothing + sparse.diags_array(weights)).tocsr()
    right_side = grid.splat(confidence * target.astype(np.float64))
    preconditioner = sparse.diags_array(1 / np.maximum(system.diagonal(), MIN_DIAGONAL))
    solution, _ = cg(
        system,
        right_side,
        x0=right_side / weights,
        rtol=TOLERANCE,
        atol=0.0,
        maxiter=max_steps,
        M=preconditioner,
    )
    return solution  # type: ignore[no-any-return]


def _resized(values: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """An image or a float32 map at another size (H, W): averages if smaller, bilinear if larger."""
    height, width = size
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))
