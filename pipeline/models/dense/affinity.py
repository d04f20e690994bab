"""Averages over the positions of one image that are alike, a few rows of their matrix at a time.

Letters: n positions, D channels, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ELEMENTS = 2**25


def attend_to_alike(
    features: Tensor, values: Tensor, *, shift: float, scale: float = 3.0
) -> Tensor:
    """Attention by softmax(scale * (S - shift * mean S)), where S are the cosines of all pairs.

    Negative entries are left out of the softmax. A position without any other, as the only one of
    an image or where all are nearly the same, attends to itself.

    Args:
        features: (n, D), of which S are the cosines.
        values: (..., n, D').
        shift: factor of the mean.
        scale: factor of all.

    Returns:
        (..., n, D').
    """
    units = F.normalize(features, dim=1)
    mean = units.mean(dim=0).square().sum()

    def attend(rows: slice) -> Tensor:
        logits = scale * (units[rows] @ units.T - shift * mean)
        negative = logits < 0
        logits = logits.masked_fill(negative, -torch.inf)
        logits.diagonal(rows.start).masked_fill_(negative.all(dim=1), 0)
        return logits.softmax(dim=1) @ values

    return _by_rows(attend, len(features))


def average_of_alike(features: Tensor, values: Tensor, *, threshold: float = 0.4) -> Tensor:
    """Values (n, D') averaged by the cosines of features (n, D) that reach the threshold."""
    units = F.normalize(features, dim=1)

    def average(rows: slice) -> Tensor:
        cosines = units[rows] @ units.T
        kept = cosines.masked_fill(cosines < threshold, 0)
        return F.normalize(kept, p=1, dim=1) @ values

    return _by_rows(average, len(features))


def row_slices(count: int) -> list[slice]:
    """Rows of a matrix (count, count), so many at a time that they have `MAX_ELEMENTS` at most."""
    step = max(1, MAX_ELEMENTS // count)
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def _by_rows(make: Callable[[slice], Tensor], count: int) -> Tensor:
    """What `make` gives for slices of `count` rows, together (..., count, D)."""
    return torch.cat([make(rows) for rows in row_slices(count)], dim=-2)
