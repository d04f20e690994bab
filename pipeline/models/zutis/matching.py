"""Which mask proposal answers for which instance: costs of all pairs, and the best matching.

Everything is computed in float32, inside autocast too, and without gradients. Letters: L decoder
layers, Q queries, N instances, H W pixels, h w token grid; P pixels of a strip, U of them inside
some instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.layers.interpolate import Taps, bilinear_taps, interpolate

MatchingSamples = Literal["pixels", "points", "tokens"]

LOG_FLOOR = -100.0
POINTS_PER_SIDE = 64
STRIP_VALUES = 1 << 19  # 2 MB of probabilities: what a processor's cache holds
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
LIFT = 2.0**24


@dataclass(frozen=True)
class _Strip:
    """Some rows of the instance masks of an image.

    Attributes:
        taps: of its rows on the token grid.
        occupied: (U,) indices of its pixels inside some instance; None for all of them.
        targets: (N, U) float32, the masks at those pixels.
    """

    taps: Taps
    occupied: Tensor | None
    targets: Tensor


@torch.no_grad()
def mask_costs(
    mask_probs: Tensor,
    instance_masks: Tensor,
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    samples: MatchingSamples = "pixels",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cost of giving each instance of an image to each query: dice and binary cross-entropy.

    Every pair shares two logarithms a query and pixel; all else about pairs is a matrix product.

    Args:
        mask_probs: (L, Q, h, w) mask proposals of one image, in [0, 1].
        instance_masks: (N, H, W) boolean, on the same device.
        dice_weight: weight of the dice part.
        bce_weight: weight of the binary cross-entropy part.
        samples: where proposals and masks are compared. "pixels", as published: at every pixel,
            proposals upsampled as probabilities. The others are faster and may match otherwise:
            "points": at the crossings of 64 rows and 64 columns, drawn anew each time;
            "tokens": on the token grid, with the share of each mask in a token.
        generator: on the CPU, for what "points" draws; by default torch's own.

    Returns:
        (L, N, Q) costs, float32.
    """
    device = mask_probs.device
    grid = (mask_probs.shape[-2], mask_probs.shape[-1])
    masks = instance_masks
    if samples == "tokens":
        masks = F.adaptive_avg_pool2d(instance_masks.float(), grid)
    rows, columns = (
        bilinear_taps(cells, pixels).to(device)
        for cells, pixels in zip(grid, masks.shape[-2:], strict=True)
    )
    if samples == "points":
        chosen = [
            torch.randperm(n, generator=generator)[:POINTS_PER_SIDE].to(device)
            for n in masks.shape[-2:]
        ]
        rows, columns = rows.at(chosen[0]), columns.at(chosen[1])
        masks = masks[:, chosen[0]][:, :, chosen[1]]
    with torch.autocast(device.type, enabled=False):
        strips = _strips(masks, rows, num_queries=mask_probs.shape[1])
        area = masks.flatten(1).sum(1, dtype=torch.float32)
        costs = []
        for layer in mask_probs.float():
            tokens = interpolate(layer.permute(1, 2, 0).contiguous(), columns, dim=1)
            overlap, mass, logs = _sums(tokens, strips)
            dice = 1 - (2 * overlap + 1) / (area[:, None] + mass + 1)
            costs.append(dice_weight * dice - bce_weight * logs / math.prod(masks.shape[-2:]))
        return torch.stack(costs)


def match(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Pair instances with queries at the least total cost, each layer by itself.

    Args:
        costs: (L, N, Q).

    Returns:
        Instance indices and query indices, both (L, P) int64 on the CPU with P = min(N, Q),
        instances ascending.

    Raises:
        PipelineError: a cost is not finite, so training has diverged.
    """
    costs = costs.cpu()
    if not torch.isfinite(costs).all():
        raise PipelineError(
            "mask loss: the network's mask proposals are not finite, training has diverged; "
            "lower the learning rates"
        )
    pairs = np.array([linear_sum_assignment(layer) for layer in costs.numpy()])
    instances, queries = torch.from_numpy(pairs.astype(np.int64)).unbind(1)
    return instances, queries


def _strips(masks: Tensor, rows: Taps, *, num_queries: int) -> list[_Strip]:
    """Cut masks (N, H, W) into strips whose upsampled proposals stay in the processor's cache."""
    height, width = masks.shape[-2:]
    # A GPU has no use for small pieces, and an index would make the CPU wait for it.
    in_pieces = not masks.is_cuda
    step = max(1, STRIP_VALUES // (width * num_queries)) if in_pieces else height
    strips = []
    for start in range(0, height, step):
        part = slice(start, start + step)
        targets = masks[:, part].flatten(1)
        occupied = None
        if in_pieces:
            occupied = (targets > 0).any(0).nonzero()[:, 0]
            targets = targets[:, occupied]
        strips.append(_Strip(rows.at(part), occupied, targets.float()))
    return strips


def _sums(tokens: Tensor, strips: list[_Strip]) -> tuple[Tensor, Tensor, Tensor]:
    """What the costs of one layer need, from tokens (h, W, Q) with their columns upsampled.

    Returns:
        The sum of the probabilities inside each instance (N, Q), their sum over all pixels (Q,),
        and the sum (N, Q) of log p inside the instance and log(1 - p) outside of it.
    """
    num_instances, num_queries = len(strips[0].targets), tokens.shape[-1]
    mass, outside = tokens.new_zeros(2, num_queries)
    overlap, inside = tokens.new_zeros(2, num_instances, num_queries)
    for strip in strips:
        probs = interpolate(tokens, strip.taps, dim=0).flatten(0, 1)
        mass += probs.sum(0)
        logs_outside = probs.neg().log1p_().clamp_(min=LOG_FLOOR)
        outside += logs_outside.sum(0)
        if strip.occupied is not None:
            probs, logs_outside = (
                values.index_select(0, strip.occupied) for values in (probs, logs_outside)
            )
        overlap.addmm_(strip.targets, probs)
        inside.addmm_(strip.targets, _floored_log(probs).sub_(logs_outside))
    return overlap, mass, inside + outside


def _floored_log(probs: Tensor) -> Tensor:
    """Natural logarithms, not below `LOG_FLOOR`."""
    if probs.is_cuda or not len(probs) or float(probs.min()) >= SMALLEST_NORMAL:
        return probs.log().clamp_(min=LOG_FLOOR)
    # At 0 and at denormal numbers the CPU's logarithm takes ten times as long: stay above them.
    lifted = (probs * LIFT).clamp_(min=math.exp(LOG_FLOOR) * LIFT)
    return lifted.log_().sub_(math.log(LIFT)).clamp_(min=LOG_FLOOR)
