"""Pixel-adaptive mask refinement (Araslanov, Roth: "Single-Stage Semantic Segmentation from Image
Labels", 2020, section 4.2): scores flow between neighbours of like colour.

Letters: B images, K label ids, H W pixels, P neighbours of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.layers.interpolate import upsample
from pipeline.params.base import PamrParams

AROUND = [place for place in product((-1, 0, 1), repeat=2) if place != (0, 0)]
STD_EPS, STD_SCALE = 1e-8, 0.1


def refined(maps: Tensor, images: Tensor, params: PamrParams) -> Tensor:
    """Maps (B, K, h, w) brought to the size of images (B, 3, H, W), and refined there."""
    maps = upsample(maps, images.shape[-2:])
    return refine(maps, images, dilations=params.dilations, steps=params.steps)


def refine(scores: Tensor, images: Tensor, *, dilations: Sequence[int], steps: int) -> Tensor:
    """Scores (B, K, H, W) after some steps, each a mean of the neighbours by their affinity.

    Args:
        scores: float32.
        images: (B, 3, H, W) in any linear scale.
        dilations: distances in pixels of a pixel's eight neighbours.
        steps: number of steps.
    """
    weights = affinity(images.float(), dilations)
    for _ in range(steps):
        around = _neighbours(scores, dilations)
        total = torch.zeros_like(scores)
        for number, shifted in enumerate(around):
            total.addcmul_(shifted, weights[:, number : number + 1])
        scores = total
    return scores


def affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights (B, P, H, W) of a pixel's neighbours, which sum to 1.

    The softmax of -|D| / (1e-8 + 0.1 std), averaged over colours: D is the difference to the
    neighbour, std the deviation in the 3 x 3 squares of all dilations. Beyond the border lies what
    is nearest.
    """
    around = torch.stack(list(_neighbours(images, dilations)), dim=2)
    own = images[:, :, None]
    squares = torch.cat((around, own.expand(-1, -1, len(dilations), -1, -1)), dim=2)
    std = squares.std(dim=2, keepdim=True)
    return (-(around - own).abs() / (STD_EPS + STD_SCALE * std)).mean(dim=1).softmax(dim=1)


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Maps (B, C, H, W) shifted by each neighbour's place."""
    height, width = maps.shape[-2:]
    for dilation in dilations:
        padded = F.pad(maps, (dilation,) * 4, mode="replicate")
        for row, column in AROUND:
            top, left = dilation * (1 + row), dilation * (1 + column)
            yield padded[..., top : top + height, left : left + width]
