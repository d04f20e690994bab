"""Labels of a training step of DenseCLIP+ (DenseCLIP paper, section 3.4).

Letters: B images, H W pixels, h w cells of the logits, R rows of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.formats.labels import IGNORE_INDEX, UNLABELLED
from pipeline.models.layers.interpolate import upsampled_labels


def fill_unlabelled(truth: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Truth, and pseudo-labels where there is none.

    Args:
        truth: (B, H, W) label ids, `IGNORE_INDEX` and `UNLABELLED`; what it says stays.
        pseudo_labels: (B, H, W) label ids or `IGNORE_INDEX`.

    Returns:
        (B, H, W) int64 label ids and `IGNORE_INDEX`.
    """
    return torch.where(truth == UNLABELLED, pseudo_labels.long(), truth.long())


def own_labels(logits: Tensor, rows: Sequence[int], size: Sequence[int]) -> Tensor:
    """The row of the highest upsampled logit among some, at every pixel.

    Args:
        logits: (B, R, h, w); no gradient flows back.
        rows: those that may win.
        size: (H, W).

    Returns:
        (B, H, W) int64 rows.
    """
    candidates = torch.tensor(rows, device=logits.device)
    return candidates[upsampled_labels(logits.detach()[:, candidates], size)]


def doubtful_void(labels: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Labels (B, H, W), void where the confidence (B, H, W) is below the threshold."""
    return labels.masked_fill(confidence < threshold, IGNORE_INDEX)
