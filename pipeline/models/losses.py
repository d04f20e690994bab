"""Training losses of ZUTIS: cross-entropy, dice, binary cross-entropy, matching.

Everything is computed in float32, inside autocast too. Letters: B batch, L decoder layers,
Q queries, N instances, P matched pairs, K categories, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.errors import PipelineError

MaskReduction = Literal["sum", "mean"]

LOG_FLOOR = -100.0


def semantic_loss(
    patch_tokens: Tensor,
    text_embeddings: Tensor,
    semantic_masks: Tensor,
    *,
    logit_scale: float = 1.0,
    ignore_index: int = -1,
) -> Tensor:
    """Cross-entropy of upsampled token-text similarities (ZUTIS paper, section 3.2).

    Tokens upsampled and then compared with text, without renormalising, give the same logits as
    similarities upsampled, which is what happens here: it is linear either way, and far cheaper.

    Args:
        patch_tokens: (B, h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm.
        semantic_masks: (B, H, W) label ids in [0, K), or `ignore_index`.
        logit_scale: Factor on the similarities; 1 is the published value, in equation 4 as in the
            code. CLIP was trained with its learned temperature, a factor near 100.
        ignore_index: Label of the pixels left out.

    Returns:
        Scalar mean over all pixels of the batch that count; 0 if there is none.
    """
    with torch.autocast(patch_tokens.device.type, enabled=False):
        similarity = patch_tokens.float() @ text_embeddings.float().T * logit_scale
        logits = _upsample(similarity.permute(0, 3, 1, 2), semantic_masks.shape[-2:])
        targets = semantic_masks.long()
        total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
        return total / (targets != ignore_index).sum().clamp(min=1)


@torch.no_grad()
def mask_costs(
    mask_probs: Tensor,
    instance_masks: Tensor,
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
) -> Tensor:
    """Cost of giving each instance of an image to each query, without gradients.

    Args:
        mask_probs: (L, Q, h, w) mask proposals of one image, in [0, 1].
        instance_masks: (N, H, W) boolean.
        dice_weight: Weight of the dice part.
        bce_weight: Weight of the binary cross-entropy part.

    Returns:
        (L, N, Q) costs, float32.
    """
    with torch.autocast(mask_probs.device.type, enabled=False):
        size = instance_masks.shape[-2:]
        targets = instance_masks.flatten(1).to(mask_probs.device, torch.float32)
        # One layer at a time: only (Q, H * W) is ever held.
        return torch.stack(
            [
                dice_weight * _pairwise_dice(probs, targets)
                + bce_weight * _pairwise_bce(probs, targets)
                for probs in (_upsample_probs(layer, size).flatten(1) for layer in mask_probs)
            ]
        )


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


def mask_loss(
    mask_probs: Tensor,
    instance_masks: Sequence[Tensor],
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    reduction: MaskReduction = "sum",
) -> Tensor:
    """Dice and binary cross-entropy of matched proposals, at every decoder layer (section 3.3).

    Queries without an instance cost nothing. Images whose masks are all empty are skipped (they
    still count in the batch size); one empty mask among others is matched, as published.

    Args:
        mask_probs: (B, L, Q, h, w) mask proposals in [0, 1], upsampled to the masks' size as
            probabilities.
        instance_masks: B boolean tensors (N, H, W); N may differ and be 0.
        dice_weight: Weight of the dice part, in the matching and in the loss.
        bce_weight: Weight of the binary cross-entropy part, likewise.
        reduction: "sum", as in the published code: over pairs, layers and images, divided by the
            batch size alone, so that it grows with layers and objects beside a cross-entropy that
            does not. "mean": over all pairs of all layers. The paper does not say.

    Returns:
        Scalar, 0 (with zero gradients) if no image has an object.

    Raises:
        ValueError: the number of images differs.
        PipelineError: the proposals are not finite.
    """
    if len(mask_probs) != len(instance_masks):
        raise ValueError(f"{len(mask_probs)} images but {len(instance_masks)} sets of masks")
    weights = {"dice_weight": dice_weight, "bce_weight": bce_weight}
    occupied = [i for i, masks in enumerate(instance_masks) if bool(masks.any())]
    # All costs are queued before the first match waits for the device.
    costs = [mask_costs(mask_probs[i], instance_masks[i], **weights) for i in occupied]
    total = mask_probs.float().sum() * 0
    num_pairs = 0
    for i, cost in zip(occupied, costs, strict=True):
        instances, queries = match(cost)
        layers = torch.arange(len(queries))[:, None].expand_as(queries)
        matched = mask_probs[i][layers.flatten(), queries.flatten()]
        targets = instance_masks[i][instances.flatten()].to(matched.device, torch.float32)
        total = total + _matched_loss(matched, targets, **weights)
        num_pairs += len(targets)
    return total / (len(mask_probs) if reduction == "sum" else max(1, num_pairs))


def _matched_loss(
    mask_probs: Tensor, targets: Tensor, *, dice_weight: float, bce_weight: float
) -> Tensor:
    """Sum of the losses of pairs: `mask_probs` (P, h, w) against float `targets` (P, H, W)."""
    with torch.autocast(mask_probs.device.type, enabled=False):
        probs = _upsample_probs(mask_probs, targets.shape[-2:]).flatten(1)
        targets = targets.flatten(1)
        overlap = 2 * (probs * targets).sum(1) + 1
        dice = 1 - overlap / (probs.sum(1) + targets.sum(1) + 1)
        bce = F.binary_cross_entropy(probs, targets, reduction="none").mean(1)
        return (dice_weight * dice + bce_weight * bce).sum()


def _pairwise_dice(probs: Tensor, targets: Tensor) -> Tensor:
    """(N, Q) dice losses of (Q, H * W) against (N, H * W)."""
    overlap = 2 * (targets @ probs.T) + 1
    return 1 - overlap / (targets.sum(1)[:, None] + probs.sum(1) + 1)


def _pairwise_bce(probs: Tensor, targets: Tensor) -> Tensor:
    """(N, Q) mean binary cross-entropies of (Q, H * W) against (N, H * W), logs floored."""
    log_inside = probs.log().clamp_(min=LOG_FLOOR)
    log_outside = (-probs).log1p_().clamp_(min=LOG_FLOOR)
    outside = log_outside.sum(1)
    return -(targets @ (log_inside - log_outside).T + outside) / probs.shape[1]


def _upsample_probs(probs: Tensor, size: Sequence[int]) -> Tensor:
    """(P, h, w) to (P, H, W); rounding must not leave [0, 1], where the logs end."""
    return _upsample(probs.float()[:, None], size)[:, 0].clamp(0, 1)


def _upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
