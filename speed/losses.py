"""Losses and matching of a training step: semantic, dice, binary cross-entropy, Hungarian.

Letters: B batch, L decoder layers, Q queries, N instances, K categories, C text space, H W pixels,
h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.formats.labels import LABEL_TYPE
from pipeline.models.zutis.losses import mask_loss, semantic_loss
from pipeline.models.zutis.matching import mask_costs, match
from speed.harness import Bench, Pair
from speed.inputs import ellipses, largest_difference, text_dim, unit_rows

NUM_LABELS = 21
SATURATED = 200.0  # logits of this size have a probability of exactly 0 or 1
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

Matches = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class LossInputs:
    """What the losses compare.

    Attributes:
        mask_logits: (B, L, Q, h, w), a leaf.
        patch_tokens: (B, h, w, C) of unit norm, a leaf.
        text: (K, C).
        semantic_masks: (B, H, W), -1 is void.
        instance_masks: B of (N, H, W) boolean.
    """

    mask_logits: Tensor
    patch_tokens: Tensor
    text: Tensor
    semantic_masks: Tensor
    instance_masks: list[Tensor]


@dataclass(frozen=True)
class LossResult:
    """Loss, gradients of the leaves, and the matches of every image and layer."""

    loss: float
    mask_gradient: Tensor
    token_gradient: Tensor
    matches: Matches


def published_losses(
    mask_probs: Tensor,
    patch_tokens: Tensor,
    text: Tensor,
    semantic_masks: Tensor,
    instance_masks: Sequence[Tensor],
) -> tuple[Tensor, Matches]:
    """Embeddings and proposals at full size, every pair's loss with gradients, layer by layer."""
    size = semantic_masks.shape[-2:]
    tokens = F.interpolate(patch_tokens.permute(0, 3, 1, 2), size=size, mode="bilinear")
    logits = torch.einsum("kc,bchw->bkhw", text, tokens)
    semantic = F.cross_entropy(logits, semantic_masks.long(), ignore_index=-1)
    mask = mask_probs.new_zeros(())
    matches: Matches = []
    for image_probs, image_masks in zip(mask_probs, instance_masks, strict=True):
        targets = image_masks.float().flatten(1)
        upsampled = F.interpolate(image_probs, size=size, mode="bilinear").flatten(2)
        for layer in upsampled:
            costs = _pairwise_dice(layer, targets) + _pairwise_bce(layer, targets)
            instances, queries = linear_sum_assignment(costs.detach().cpu().numpy())
            for instance, query in zip(instances, queries, strict=True):
                mask = mask + costs[instance, query]
            matches.append((instances.tolist(), queries.tolist()))
    return semantic + mask / len(mask_probs), matches


def _pairwise_dice(probs: Tensor, targets: Tensor) -> Tensor:
    overlap = 2 * torch.einsum("np,qp->nq", targets, probs) + 1
    return 1 - overlap / (targets.sum(1)[:, None] + probs.sum(1)[None] + 1)


def _pairwise_bce(probs: Tensor, targets: Tensor) -> Tensor:
    """Both maps of every pair are laid out in full, as published."""
    pairs_of_probs = probs[None].repeat(len(targets), 1, 1)
    pairs_of_targets = targets[:, None].repeat(1, len(probs), 1)
    return F.binary_cross_entropy(pairs_of_probs, pairs_of_targets, reduction="none").mean(-1)


def loss_inputs(
    *,
    quick: bool,
    num_instances: int,
    batch: int = 2,
    device: torch.device | str = "cpu",
) -> LossInputs:
    """Some images; the proposals of the second are saturated."""
    layers, queries, side = (2, 10, 48) if quick else (6, 100, 384)
    dim = text_dim(quick=quick)
    grid = side // 8
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(batch * layers, queries, grid // 4, grid // 4, generator=generator)
    mask_logits = 3 * F.interpolate(smooth, size=(grid, grid), mode="bicubic")
    mask_logits = mask_logits.reshape(batch, layers, queries, grid, grid)
    mask_logits[1] = SATURATED * mask_logits[1].sign()
    masks = [ellipses(seed, num_instances, (side, side)) for seed in range(batch)]
    rng = np.random.default_rng(0)
    semantic = np.zeros((batch, side, side), LABEL_TYPE)
    for labels, objects in zip(semantic, masks, strict=True):
        for mask in objects:
            labels[mask] = rng.integers(1, NUM_LABELS)
        labels[: side // 8] = -1
    return LossInputs(
        mask_logits=mask_logits.to(device).requires_grad_(),
        patch_tokens=unit_rows(generator, batch, grid, grid, dim).to(device).requires_grad_(),
        text=unit_rows(generator, NUM_LABELS, dim).to(device),
        semantic_masks=torch.from_numpy(semantic).to(device),
        instance_masks=[torch.from_numpy(mask).to(device) for mask in masks],
    )


def _prepare(_: Path, quick: bool) -> Pair:
    inputs = loss_inputs(quick=quick, num_instances=2 if quick else 5)

    def published() -> LossResult:
        loss, matches = published_losses(
            inputs.mask_logits.sigmoid(),
            inputs.patch_tokens,
            inputs.text,
            inputs.semantic_masks,
            inputs.instance_masks,
        )
        return _backward(inputs, loss, matches)

    def ours() -> LossResult:
        semantic = semantic_loss(inputs.patch_tokens, inputs.text, inputs.semantic_masks)
        mask = mask_loss(inputs.mask_logits.sigmoid(), inputs.instance_masks)
        return _backward(inputs, semantic + mask, [])

    def check(published: LossResult, ours: LossResult) -> str:
        assert _our_matches(inputs) == published.matches, "other matches"
        loss = abs(ours.loss - published.loss) / abs(published.loss)
        assert loss <= LOSS_TOLERANCE, f"losses differ by {loss:.1e}"
        gradient = max(
            *map(largest_difference, ours.mask_gradient, published.mask_gradient),
            largest_difference(ours.token_gradient, published.token_gradient),
        )
        assert gradient <= GRADIENT_TOLERANCE, f"gradients differ by {gradient:.1e}"
        return (
            f"same matches, loss within {loss:.0e}, gradients within {gradient:.0e} of the largest "
            "of an image; one image of saturated proposals"
        )

    return Pair(published, ours, check)


def _backward(inputs: LossInputs, loss: Tensor, matches: Matches) -> LossResult:
    leaves = (inputs.mask_logits, inputs.patch_tokens)
    mask_gradient, token_gradient = torch.autograd.grad(loss, leaves)
    return LossResult(float(loss.detach()), mask_gradient, token_gradient, matches)


def _our_matches(inputs: LossInputs) -> Matches:
    with torch.no_grad():
        mask_probs = inputs.mask_logits.sigmoid()
    return [
        (instances.tolist(), queries.tolist())
        for probs, masks in zip(mask_probs, inputs.instance_masks, strict=True)
        for instances, queries in zip(*match(mask_costs(probs, masks)), strict=True)
    ]


BENCHES = [
    Bench(
        name="losses",
        title="losses and matching with gradients: batch 2, 6 layers, 100 queries, 384 x 384, "
        f"5 instances an image, {NUM_LABELS} labels",
        target=20.0,
        stretch=35.0,
        prepare=_prepare,
        memory_target_mb=300.0,
    )
]
