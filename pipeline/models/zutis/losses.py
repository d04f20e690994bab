"""Training losses of ZUTIS: cross-entropy of labels, dice and binary cross-entropy of masks.

Both are sums divided by a number. The parts of a batch that is too large for one pass, or shared by
several processes, add up to the loss of the whole if each takes the whole's number as `divisor`.

Everything is computed in float32, inside autocast too. Letters: B batch, L decoder layers,
Q queries, N instances, M matched pairs, K categories, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.layers.interpolate import upsample
from pipeline.models.layers.parts import sum_by_parts
from pipeline.models.zutis.matching import MatchingSamples, mask_costs, match

MaskReduction = Literal["sum", "mean"]

MAPS_AT_ONCE = 4


def semantic_loss(
    patch_tokens: Tensor,
    text_embeddings: Tensor,
    semantic_masks: Tensor,
    *,
    logit_scale: float = 1.0,
    ignore_index: int = -1,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of upsampled token-text similarities (ZUTIS paper, section 3.2).

    Tokens upsampled and then compared with text, without renormalising, give the same logits as
    similarities upsampled, which is what happens here: it is linear either way, and far cheaper.

    Args:
        patch_tokens: (B, h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm.
        semantic_masks: (B, H, W) label ids in [0, K), or `ignore_index`.
        logit_scale: factor on the similarities; 1 is the published value, in equation 4 as in the
            code. CLIP was trained with its learned temperature, a factor near 100.
        ignore_index: label of the pixels left out.
        divisor: scalar, pixels that count in the whole of which this is a part, at least 1; by
            default those of `semantic_masks`.

    Returns:
        Scalar mean over all pixels of the batch that count; 0 if there is none.
    """

    def cross_entropy(similarity: Tensor, targets: Tensor) -> Tensor:
        logits = upsample(similarity, targets.shape[-2:])
        return F.cross_entropy(logits, targets.long(), ignore_index=ignore_index, reduction="sum")[
            None
        ]

    with torch.autocast(patch_tokens.device.type, enabled=False):
        similarity = patch_tokens.float() @ text_embeddings.float().T * logit_scale
        maps = similarity.permute(0, 3, 1, 2).contiguous()
        total = sum_by_parts(cross_entropy, maps, semantic_masks)[0]
        if divisor is None:
            divisor = num_counted(semantic_masks, ignore_index=ignore_index).clamp(min=1)
        return total / divisor


def num_counted(semantic_masks: Tensor, *, ignore_index: int = -1) -> Tensor:
    """How many pixels of (B, H, W) count in `semantic_loss`: a scalar, int64, on their device."""
    return (semantic_masks != ignore_index).sum()


def mask_loss(
    mask_probs: Tensor,
    instance_masks: Sequence[Tensor],
    *,
    dice_weight: float = 1.0,
    bce_weight: float = 1.0,
    reduction: MaskReduction = "sum",
    matching: MatchingSamples = "pixels",
    divisor: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Dice and binary cross-entropy of matched proposals, at every decoder layer (section 3.3).

    Queries without an instance cost nothing. Images whose masks are all empty are skipped (they
    still count in the batch size); one empty mask among others is matched, as published.

    Args:
        mask_probs: (B, L, Q, h, w) mask proposals in [0, 1], upsampled to the masks' size as
            probabilities.
        instance_masks: B boolean tensors (N, H, W); N may differ and be 0.
        dice_weight: weight of the dice part, in the matching and in the loss.
        bce_weight: weight of the binary cross-entropy part, likewise.
        reduction: "sum", as in the published code: over pairs, layers and images, divided by the
            batch size alone, so that it grows with layers and objects beside a cross-entropy that
            does not. "mean": over all pairs of all layers. The paper does not say.
        matching: where the costs of the matching are taken, see `mask_costs`; the losses of the
            matched pairs are always taken at every pixel.
        divisor: scalar, images ("sum") or pairs ("mean", at least 1) of the whole of which this is
            a part; by default those of this batch.
        generators: B generators on the CPU for what `mask_costs` draws; by default torch's own.

    Returns:
        Scalar, 0 (with zero gradients) if no image has an object.

    Raises:
        ValueError: the number of images differs.
        PipelineError: the proposals are not finite.
    """
    if len(mask_probs) != len(instance_masks):
        raise ValueError(f"{len(mask_probs)} images but {len(instance_masks)} sets of masks")
    weights = {"dice_weight": dice_weight, "bce_weight": bce_weight}
    # The device is asked once.
    occupied = torch.nonzero(_occupied(instance_masks))[:, 0].tolist()
    # All costs are queued before the first match waits for the device.
    costs = [
        mask_costs(
            mask_probs[i],
            instance_masks[i],
            samples=matching,
            generator=generators[i] if generators else None,
            **weights,
        )
        for i in occupied
    ]
    total = mask_probs.float().sum() * 0
    matched_pairs = 0
    pair_losses = partial(_pair_losses, dice_weight=dice_weight, bce_weight=bce_weight)
    for i, cost in zip(occupied, costs, strict=True):
        instances, queries = match(cost)
        layers = torch.arange(len(queries))[:, None].expand_as(queries)
        matched = mask_probs[i][layers.flatten(), queries.flatten()]
        targets = instance_masks[i][instances.flatten()].to(matched.device)
        with torch.autocast(matched.device.type, enabled=False):
            (part,) = sum_by_parts(pair_losses, matched.float(), targets, size=MAPS_AT_ONCE)
            total = total + part
        matched_pairs += len(targets)
    if divisor is not None:
        return total / divisor
    return total / (len(mask_probs) if reduction == "sum" else max(1, matched_pairs))


def num_pairs(instance_masks: Sequence[Tensor], *, num_layers: int, num_queries: int) -> Tensor:
    """How many pairs `mask_loss` matches: a scalar, int64, on the masks' device.

    Args:
        instance_masks: B boolean tensors (N, H, W), as for `mask_loss`.
        num_layers: decoder layers L.
        num_queries: queries Q.
    """
    occupied = _occupied(instance_masks)
    pairs = [num_layers * min(len(masks), num_queries) for masks in instance_masks]
    return (occupied * torch.tensor(pairs).to(occupied.device, non_blocking=True)).sum()


def _occupied(instance_masks: Sequence[Tensor]) -> Tensor:
    """Whether each image has an object: (B,) boolean."""
    return torch.stack([masks.any() for masks in instance_masks])


def _pair_losses(
    mask_probs: Tensor, targets: Tensor, *, dice_weight: float, bce_weight: float
) -> Tensor:
    """Sum (1,) of the losses of pairs: `mask_probs` (M, h, w), boolean `targets` (M, H, W)."""
    # Rounding must not leave [0, 1], where the logarithms end.
    probs = upsample(mask_probs[:, None], targets.shape[-2:]).clamp(0, 1).flatten(1)
    masks = targets.flatten(1).float()
    overlap = 2 * (probs * masks).sum(1) + 1
    dice = 1 - overlap / (probs.sum(1) + masks.sum(1) + 1)
    bce = F.binary_cross_entropy(probs, masks, reduction="none").mean(1)
    return (dice_weight * dice + bce_weight * bce).sum(0, keepdim=True)
