"""Bilinear upsampling without torch, for networks that run elsewhere.

What `interpolate` does with tensors, with NumPy's arrays; the two agree to rounding. Letters: K
labels, n source cells, m target cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Taps(NamedTuple):
    """Where each of m target cells along one axis takes its value from.

    Attributes:
        lower: (m,) int64 source cell at or before it.
        upper: (m,) int64 source cell after it.
        upper_weight: (m,) float32 weight of `upper`; `lower` has the rest of 1.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    upper_weight: NDArray[np.float32]

    def at(self, cells: slice) -> Taps:
        """The taps of some of the target cells."""
        return Taps(self.lower[cells], self.upper[cells], self.upper_weight[cells])


def bilinear_taps(length: int, new_length: int) -> Taps:
    """Taps of an axis of n = `length` cells that grows to m = `new_length` cells."""
    # torch keeps the scale in float32 and rounds once after scaling and shifting.
    scale = float(np.float32(length / new_length))
    places = (scale * (np.arange(new_length) + 0.5) - 0.5).astype(np.float32).clip(min=0)
    lower = places.astype(np.int64).clip(max=length - 1)
    upper_weight = (places - lower.astype(np.float32)).clip(0, 1)
    return Taps(lower, (lower + 1).clip(max=length - 1), upper_weight)


def interpolate(maps: NDArray[np.float32], taps: Taps, axis: int) -> NDArray[np.float32]:
    """Values at the taps along one axis (-2 rows, -1 columns) of float32 maps (..., h, w)."""
    weight = taps.upper_weight if axis == -1 else taps.upper_weight[:, None]
    found = maps.take(taps.upper, axis=axis)
    found *= weight
    found += maps.take(taps.lower, axis=axis) * (1 - weight)
    return found


def upsample(maps: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """Maps (..., h, w) at another size (H, W)."""
    rows, columns = (
        bilinear_taps(cells, pixels) for cells, pixels in zip(maps.shape[-2:], size, strict=True)
    )
    return interpolate(interpolate(maps, columns, -1), rows, -2)


def upsampled_planes(
    scores: NDArray[np.float32], *sizes: Sequence[int]
) -> Iterator[NDArray[np.float32]]:
    """The map of each label at the last size, so that one is in memory at a time.

    Args:
        scores: (K, h, w).
        sizes: (H, W) of each resizing, one after the other.

    Yields:
        (H, W), K times.
    """
    for plane in scores:
        for size in sizes:
            plane = upsample(plane, size)
        yield plane


def upsampled_labels(scores: NDArray[np.float32], *sizes: Sequence[int]) -> NDArray[np.int64]:
    """Number (H, W) of the label with the largest upsampled score, of equals the first."""
    best = np.full(tuple(sizes[-1]), -np.inf, dtype=np.float32)
    labels = np.zeros(best.shape, dtype=np.int64)
    for number, plane in enumerate(upsampled_planes(scores, *sizes)):
        _keep_better(best, labels, number, plane)
    return labels


def _keep_better(
    best: NDArray[np.float32], labels: NDArray[np.int64], number: int, plane: NDArray[np.float32]
) -> None:
    """Put a label's scores (H, W) and its number where they are larger than the best so far."""
    labels[plane > best] = number
    np.maximum(best, plane, out=best)


def joint_foreground_labels(
    scores: NDArray[np.float32], *sizes: Sequence[int], scale: float
) -> NDArray[np.int64]:
    """Number (H, W) of the best label; 0 only where all others together are no likelier.

    As `pipeline.models.layers.interpolate.joint_foreground_labels`.

    Args:
        scores: (1 + K, h, w), the background's first.
        sizes: (H, W) of each resizing.
        scale: factor of the scores.
    """
    background = next(upsampled_planes(scores[:1], *sizes))
    best = np.full_like(background, -np.inf)
    labels = np.zeros(best.shape, dtype=np.int64)
    total = np.zeros_like(background)
    for number, plane in enumerate(upsampled_planes(scores[1:], *sizes), start=1):
        _keep_better(best, labels, number, plane)
        with np.errstate(over="ignore"):  # odds against the background; huge ones are infinite
            total += np.exp(scale * (plane - background))
    return np.where(total > 1, labels, 0)


def upsampled_probability(
    scores: NDArray[np.float32], number: int, *sizes: Sequence[int], scale: float
) -> NDArray[np.float32]:
    """Softmax (H, W) of scale x the upsampled scores, at one label.

    Args:
        scores: (K, h, w).
        number: of the label, from 0.
        sizes: (H, W) of each resizing.
        scale: factor of the scores.
    """
    own = next(upsampled_planes(scores[number : number + 1], *sizes))
    # Each term is the odds of a label against this one; a huge one makes the probability 0.
    with np.errstate(over="ignore"):
        odds = sum(np.exp(scale * (plane - own)) for plane in upsampled_planes(scores, *sizes))
    return np.asarray(1 / odds, dtype=np.float32)
