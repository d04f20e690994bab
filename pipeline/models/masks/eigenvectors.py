"""The smallest eigenvectors of a graph's normalised Laplacian. Letters: n positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh

# A full decomposition costs n^3; Lanczos iteration finds the same few vectors at n^2 each.
MAX_DENSE_POSITIONS = 1024


def smallest_eigenvectors(
    affinity: NDArray[np.float64],
    count: int,
    *,
    seed: int = 0,
    max_dense: int = MAX_DENSE_POSITIONS,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The `count` smallest solutions of (D - A) v = lambda D v, D the row sums of `affinity` A.

    With more than `max_dense` positions they are found by iteration, which starts at random from
    `seed`.

    Args:
        affinity: (n, n), symmetric, with positive row sums; it is overwritten.
        count: of solutions, the constant one included.
        seed: see above.
        max_dense: see above.

    Returns:
        (count,) eigenvalues in [0, 2], ascending, and (n, count) vectors, each of unit length in
        the metric of D.
    """
    scale = 1 / np.sqrt(affinity.sum(axis=1))
    # With w = sqrt(D) v the problem is the ordinary one of the largest eigenvalues of this matrix.
    affinity *= scale[:, None]
    affinity *= scale
    num_positions = len(affinity)
    if num_positions <= max(max_dense, count):
        subset = (num_positions - count, num_positions - 1)
        values, vectors = eigh(affinity, subset_by_index=subset)
        if len(values) < count:  # LAPACK drops eigenvalues of a subset if most are all alike
            values, vectors = eigh(affinity, driver="evd")
            values, vectors = values[-count:], vectors[:, -count:]
    else:
        start = np.random.default_rng(seed).standard_normal(num_positions)
        values, vectors = eigsh(affinity, count, which="LA", v0=start)
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
    return 1 - values[::-1], vectors[:, ::-1] * scale[:, None]
