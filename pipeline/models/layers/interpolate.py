"""Bilinear upsampling of maps, whole or in part: a strip that stays in the cache, a window, a few.

The values of a part are those that `upsample` gives for the whole map, on the CPU to the last bit.
That matters: where proposals saturate, one bit decides whether a logarithm is floored, and with it
which query an instance is matched with. Letters: n source cells, m target cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LONG_ROW = 1 << 13  # values for which a call of torch does not count
UPSAMPLED_ELEMENTS = 1 << 26


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, K, h, w) at another size (H, W)."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def upsampled_parts(
    maps: Tensor, *sizes: Sequence[int], max_elements: int = UPSAMPLED_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """Maps of many labels, upsampled a few at a time, so that hundreds of them fit into memory.

    Args:
        maps: (B, K, h, w).
        sizes: (H, W) of each resizing, one after the other.
        max_elements: number of upsampled values held at a time, if one label has no more.

    Yields:
        The number of a part's first label, and its maps (B, k, H, W) at the last size.
    """
    pixels = max(height * width for height, width in sizes)
    step = max(1, max_elements // (len(maps) * pixels))
    for start in range(0, maps.shape[1], step):
        part = maps[:, start : start + step]
        for size in sizes:
            part = upsample(part, size)
        yield start, part


def upsampled_labels(
    scores: Tensor, *sizes: Sequence[int], max_elements: int = UPSAMPLED_ELEMENTS
) -> Tensor:
    """The label with the largest upsampled score at every pixel, of equals the first.

    Args:
        scores: (B, K, h, w).
        sizes: (H, W) of each resizing: one, or as mmsegmentation does it two, to the size of the
            network's input and from there to the image's.
        max_elements: see `upsampled_parts`.

    Returns:
        Label ids (B, H, W), int64.
    """
    best = scores.new_full((len(scores), *sizes[-1]), -torch.inf)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for start, part in upsampled_parts(scores, *sizes, max_elements=max_elements):
        best, labels = better_labels(best, labels, start, part)
    return labels


def better_labels(best: Tensor, labels: Tensor, start: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score and its label, both (B, H, W), after some more labels.

    Args:
        best: (B, H, W) so far.
        labels: (B, H, W) int64, of `best`; where they are equal it stays.
        start: number of the first label of `part`.
        part: (B, k, H, W) scores of k labels.
    """
    part_best, part_labels = part.max(dim=1)
    labels = torch.where(part_best > best, part_labels + start, labels)
    return torch.maximum(best, part_best), labels


def joint_foreground_labels(scores: Tensor, *sizes: Sequence[int], scale: float | None) -> Tensor:
    """The best label at every pixel; 0, background, only where all others together are no likelier.

    Several categories that are alike share what is theirs, and each of them may have less than the
    background where their sum has more: at an object's rim, and on what could be either.

    Args:
        scores: (B, 1 + K, h, w), the background's first.
        sizes: as in `upsampled_labels`.
        scale: factor of the upsampled scores in their softmax; None for scores that are
            probabilities already.

    Returns:
        Label ids (B, H, W), int64.
    """
    background = next(upsampled_parts(scores[:, :1], *sizes))[1][:, 0]
    best = torch.full_like(background, -torch.inf)
    labels = torch.zeros_like(background, dtype=torch.int64)
    total = torch.zeros_like(background)
    for start, part in upsampled_parts(scores[:, 1:], *sizes):
        best, labels = better_labels(best, labels, 1 + start, part)
        # Odds against the background; huge ones may be infinite.
        odds = part if scale is None else (scale * (part - background[:, None])).exp()
        total += odds.sum(dim=1)
    return torch.where(total > (background if scale is None else 1.0), labels, 0)


class Taps(NamedTuple):
    """Where each of m target cells along one axis takes its value from.

    Attributes:
        lower: (m,) int64 source cell at or before it.
        upper: (m,) int64 source cell after it.
        lower_weight: (m,) float32 weight of `lower`.
        upper_weight: (m,) float32 weight of `upper`; the two sum to 1.
    """

    lower: Tensor
    upper: Tensor
    lower_weight: Tensor
    upper_weight: Tensor

    def at(self, cells: Tensor | slice) -> Taps:
        """The taps of some of the target cells."""
        return Taps(*(values[cells] for values in self))

    def to(self, device: torch.device) -> Taps:
        """The same on another device."""
        return Taps(*(values.to(device, non_blocking=True) for values in self))


def bilinear_taps(length: int, new_length: int) -> Taps:
    """Taps, on the CPU, of an axis of n = `length` cells that grows to m = `new_length` cells."""
    # torch keeps the scale in float32 and rounds once after scaling and shifting.
    scale = torch.tensor(length / new_length, dtype=torch.float32).double()
    centres = torch.arange(new_length, dtype=torch.float64) + 0.5
    position = (scale * centres - 0.5).float().clamp_(min=0)
    lower = position.long().clamp_(max=length - 1)
    upper_weight = (position - lower).clamp_(0, 1)
    return Taps(lower, (lower + 1).clamp_(max=length - 1), 1 - upper_weight, upper_weight)


def interpolate(maps: Tensor, taps: Taps, dim: int) -> Tensor:
    """Values at the taps along one axis of float32 maps.

    Args:
        maps: any shape, n cells along `dim`.
        taps: of n cells, on the device of `maps`.
        dim: the axis, not negative. Of the two axes of a map, columns go before rows.

    Returns:
        The same shape but for m cells along `dim`.
    """
    if dim == 0 and maps.stride(0) >= LONG_ROW and not maps.is_cuda:
        return _interpolate_rows(maps, taps)
    upper = maps.index_select(dim, taps.upper).mul_(_repeated(taps.upper_weight, maps, dim))
    return upper.addcmul_(
        maps.index_select(dim, taps.lower), _repeated(taps.lower_weight, maps, dim)
    )


def _interpolate_rows(maps: Tensor, taps: Taps) -> Tensor:
    """`interpolate` along a first axis of few and long rows, without weights of their size."""
    result = maps.new_empty((len(taps.lower), *maps.shape[1:]))
    rows = (result, *(values.tolist() for values in taps))
    for row, lower, upper, lower_weight, upper_weight in zip(*rows, strict=True):
        torch.mul(maps[upper], upper_weight, out=row).add_(maps[lower], alpha=lower_weight)
    return result


def _repeated(weights: Tensor, maps: Tensor, dim: int) -> Tensor:
    """Weights (m,) repeated over the later axes of the maps: vectorised only if contiguous."""
    later = maps.shape[dim + 1 :]
    return weights.view(-1, *[1] * len(later)).expand(-1, *later).contiguous()
