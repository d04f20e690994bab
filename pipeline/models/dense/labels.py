"""Labels of pixels from a dense labeller's scores of patches.

Letters: B images, H W pixels, K label ids, h w grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.models.layers.interpolate import UPSAMPLED_ELEMENTS, better_labels, upsampled_parts

LOGIT_SCALE = 100.0


def label_and_confidence(
    scores: Tensor,
    size: tuple[int, int],
    *,
    scale: float | None = LOGIT_SCALE,
    through: Sequence[Sequence[int]] = (),
    max_elements: int = UPSAMPLED_ELEMENTS,
    change: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels of pixels from scores of patches.

    Scores are upsampled bilinearly and the largest wins; labels are taken a few at a time, so that
    hundreds of them fit into memory.

    Args:
        scores: (B, K, h, w).
        size: (H, W).
        scale: the winner's confidence is its softmax(scale * score). None, for scores that key
            smoothing made probabilities: its share of the sum of all positive scores.
        through: (H, W) of resizings before that to `size`, see `upsampled_labels`.
        max_elements: number of upsampled scores held at a time, if one label has no more.
        change: what becomes of the upsampled scores (B, k, H, W) of the labels from a number on.

    Returns:
        Label ids (B, H, W), int64, and confidence (B, H, W) in [0, 1], float32.
    """
    best = scores.new_full((len(scores), *size), -torch.inf)
    label = torch.zeros_like(best, dtype=torch.int64)
    total = _no_total(best, scale)
    for start, part in upsampled_parts(scores, *through, size, max_elements=max_elements):
        part = part if change is None else change(start, part)
        best, label = better_labels(best, label, start, part)
        total = _add(total, part, scale)
    return label, _share(best, total, scale)


def labels_one_by_one(
    scores: Callable[[Tensor], Tensor], images: Tensor, *, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The same for images (B, 3, H, W) one after the other, where scores of all pixels are large.

    Args:
        scores: images (1, 3, H, W) -> their scores (1, K, h, w).
        images: in [0, 1].
        scale: as there.
    """
    height, width = images.shape[-2:]
    found = [
        label_and_confidence(scores(image), (height, width), scale=scale)
        for image in images.split(1)
    ]
    labels, confidence = zip(*found, strict=True)
    return torch.cat(labels), torch.cat(confidence)


def probability(
    scores: Tensor,
    number: int,
    size: Sequence[int],
    *,
    scale: float | None = LOGIT_SCALE,
    through: Sequence[Sequence[int]] = (),
    max_elements: int = UPSAMPLED_ELEMENTS,
) -> Tensor:
    """Probability of one label at every pixel, (B, H, W) float32; see `label_and_confidence`.

    Args:
        scores: (B, K, h, w).
        number: of the label, from 0.
        size: (H, W).
        scale: as there; where the label wins, this is its confidence.
        through: as there.
        max_elements: as there.
    """
    [(_, own)] = upsampled_parts(scores[:, number : number + 1], *through, size)
    total = _no_total(own[:, 0], scale)
    for _, part in upsampled_parts(scores, *through, size, max_elements=max_elements):
        total = _add(total, part, scale)
    return _share(own[:, 0], total, scale)


def _no_total(like: Tensor, scale: float | None) -> Tensor:
    return torch.full_like(like, -torch.inf) if scale is not None else torch.zeros_like(like)


def _add(total: Tensor, part: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return total + part.clamp(min=0).sum(dim=1)
    return torch.logaddexp(total, (scale * part).logsumexp(dim=1))


def _share(score: Tensor, total: Tensor, scale: float | None) -> Tensor:
    """What a score is of the total, in [0, 1]."""
    if scale is None:
        return (score.clamp(min=0) / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)
    return (scale * score - total).exp().clamp(max=1)
