"""The bilateral solver: grid, bistochastisation, solution, largest component."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.models.masks import bilateral
from pipeline.models.masks.bilateral import bilateral_grid, bilateral_solve, bistochastise

from .checks import Parts, Result, close, equal
from .vectors import Vectors

SOLVER_BOUND = 1e-9
BISTOCHASTIC_RELATIVE = 1e-9


def solver(vectors: Vectors) -> Parts:
    """The solver's constants, then every case."""
    yield "params", partial(_constants, vectors)
    for part in vectors.parts():
        yield part, partial(_case, vectors, part)


def _constants(vectors: Vectors) -> Iterator[Result]:
    ours = {
        "lam": bilateral.SMOOTHNESS,
        "A_diag_min": bilateral.MIN_DIAGONAL,
        "cg_tol": bilateral.TOLERANCE,
        "cg_maxiter": bilateral.MAX_STEPS,
        "bistochastize_iterations": bilateral.BISTOCHASTIC_STEPS,
    }
    published = vectors.record["params"]
    for key, value in ours.items():
        yield equal(f"{vectors.name}/params/{key}", value, published[key])


def _case(vectors: Vectors, part: str) -> Iterator[Result]:
    name, io, record = (
        f"{vectors.name}/{part}",
        vectors.io.part(part),
        vectors.record["cases"][part],
    )
    sigmas = {key: record[key] for key in ("sigma_spatial", "sigma_luma", "sigma_chroma")}
    image, coarse = io["image"].numpy(), io["coarse_mask"].numpy()
    grid = bilateral_grid(image, **sigmas)
    n, m = bistochastise(grid)
    refined = bilateral_solve(
        image, coarse, **sigmas, confidence=vectors.record["params"]["confidence"]
    )
    yield equal(f"{name}/n_vertices", len(grid.pixel_counts), record["n_vertices"])
    yield equal(f"{name}/vertex_of_pixel", grid.vertex_of_pixel, io["vertex_of_pixel"])
    for key, values in (("bistochastic_n", n), ("bistochastic_m", m)):
        yield close(f"{name}/{key}", values, io[key], relative=BISTOCHASTIC_RELATIVE)
    yield close(f"{name}/refined", refined, io["refined"], bound=SOLVER_BOUND)
    yield equal(f"{name}/largest_component", _largest_component(refined), io["largest_component"])


def _largest_component(soft_mask: NDArray[np.floating]) -> NDArray[np.bool_]:
    """What SelfMask's demonstration shows of a (H, W) solver output, which no stage does.

    The second largest label counts, the background included: the background itself where an object
    is larger, and everything where there is none.
    """
    labels, _ = ndimage.label(ndimage.binary_fill_holes(soft_mask > 0.5))
    areas = np.bincount(labels.ravel())
    if len(areas) == 1:
        return np.ones(soft_mask.shape, dtype=bool)
    return labels == np.argsort(areas, kind="stable")[-2]
