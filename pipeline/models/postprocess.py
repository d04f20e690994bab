"""Dense embeddings and mask proposals -> label maps and scored instances (ZUTIS paper, 3.3).

Letters: B batch, Q queries, N kept queries, K categories, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Suppression = Literal["none", "hard", "linear", "gaussian"]
ScoreResolution = Literal["token", "pixel"]

BACKGROUND = 0
EPSILON = 1e-7
CATEGORY_CHUNK = 64
MASK_CHUNK = 16
PIXEL_CHUNK = 1 << 16


@dataclass(frozen=True)
class Instance:
    """One predicted object.

    Attributes:
        label_id: 1 or more.
        score: in [0, 1], after suppression.
        mask: (H, W) boolean, not empty.
        bbox_xyxy: x0, y0, x1, y1 of the outermost mask pixels, both ends inclusive.
    """

    label_id: int
    score: float
    mask: NDArray[np.bool_]
    bbox_xyxy: tuple[int, int, int, int]


def semantic_logits(
    patch_tokens: Tensor, text_embeddings: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Cosine of every pixel with every category.

    Args:
        patch_tokens: (B, h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm.
        size: (H, W) to which the logits are upsampled; None leaves them on the token grid.

    Returns:
        (B, K, H, W) or (B, K, h, w) logits.
    """
    logits = (patch_tokens @ text_embeddings.T).permute(0, 3, 1, 2)
    return logits if size is None else _upsample(logits, size)


def semantic_prediction(
    patch_tokens: Tensor, text_embeddings: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Label id of every pixel: the argmax of `semantic_logits`, of equals the smallest.

    Categories are upsampled a few at a time, so memory does not grow with K.

    Args:
        patch_tokens: (B, h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm, background first.
        size: (H, W) of the prediction; None stays on the token grid.

    Returns:
        (B, H, W) or (B, h, w) int64 label ids.
    """
    best, labels = None, None
    for start in range(0, len(text_embeddings), CATEGORY_CHUNK):
        chunk = text_embeddings[start : start + CATEGORY_CHUNK]
        values, indices = semantic_logits(patch_tokens, chunk, size).max(dim=1)
        if best is None or labels is None:
            best, labels = values, indices
            continue
        labels = torch.where(values > best, indices + start, labels)
        best = torch.maximum(values, best)
    if labels is None:
        raise ValueError("text_embeddings has no row")
    return labels


@torch.no_grad()
def instance_predictions(
    mask_probs: Tensor,
    patch_tokens: Tensor,
    text_embeddings: Tensor,
    size: tuple[int, int] | None = None,
    *,
    threshold: float = 0.5,
    temperature: float = 5.0,
    suppression: Suppression = "hard",
    max_overlap: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    score_resolution: ScoreResolution = "token",
) -> list[Instance]:
    """Labelled, scored and suppressed instances of one image.

    The final masks are proposals upsampled as probabilities and thresholded. Those labelled
    background and empty ones are dropped.

    Args:
        mask_probs: (Q, h, w) proposals of the last decoder layer, in [0, 1].
        patch_tokens: (h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm, background first.
        size: (H, W) of the masks; None stays on the token grid.
        threshold: Probability above which a pixel belongs to a mask.
        temperature: Factor on the cosine inside the sigmoid of the category score.
        suppression: Non-maximum suppression among masks of one label. "hard" removes masks that
            overlap a better one, "linear" and "gaussian" lower their scores, "none" keeps all.
        max_overlap: IoU up to which "hard" and "linear" leave a score alone.
        sigma: Width of "gaussian": the factor is exp(-IoU^2 / sigma).
        min_score: Scores that fall to this or below are dropped by suppression.
        score_resolution: Where labels and scores are decided. "token", as in the published code:
            over the proposal thresholded on the token grid, another region than the final mask.
            "pixel": over the final mask. The paper does not say (Algorithm 1 leaves upsampling out
            "for readability").

    Returns:
        Instances by falling score, of equals the earlier query first.

    Raises:
        ValueError: `suppression` is unknown.
    """
    if suppression not in get_args(Suppression):
        raise ValueError(f"suppression {suppression!r} is none of {get_args(Suppression)}")
    labels, scores = _label_proposals(
        mask_probs.float(),
        patch_tokens.float(),
        text_embeddings.float(),
        size=size if score_resolution == "pixel" else None,
        threshold=threshold,
        temperature=temperature,
    )
    # Background and empty masks influence no other mask, so they can go before suppression.
    candidates = (labels != BACKGROUND).nonzero()[:, 0]
    masks = _final_masks(mask_probs[candidates].float(), size, threshold)
    occupied = masks.flatten(1).any(1)
    masks, candidates = masks[occupied], candidates[occupied]
    label_ids = labels[candidates].cpu().numpy()
    final_scores = scores[candidates].double().cpu().numpy()
    if suppression != "none":
        final_scores = _suppress(
            masks,
            label_ids,
            final_scores,
            suppression=suppression,
            max_overlap=max_overlap,
            sigma=sigma,
            min_score=min_score,
        )
    order = [i for i in np.argsort(-final_scores, kind="stable") if final_scores[i] >= 0]
    return [
        Instance(
            label_id=int(label_ids[i]),
            score=float(final_scores[i]),
            mask=masks[int(i)].cpu().numpy(),
            bbox_xyxy=_bounding_box(masks[int(i)]),
        )
        for i in order
    ]


def _label_proposals(
    mask_probs: Tensor,
    patch_tokens: Tensor,
    text_embeddings: Tensor,
    *,
    size: tuple[int, int] | None,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Label id and score of every proposal at `size` (None: on the token grid), both (Q,).

    The mask score is the mean probability inside the mask; the category score the sigmoid of the
    scaled cosine between the mean embedding inside the mask and the text. An empty mask is
    background.
    """
    area, mass, coverage = _regions(mask_probs, size, threshold)
    area = area + EPSILON
    mask_scores = mass / area
    embeddings = coverage.flatten(1) @ patch_tokens.flatten(0, 1) / area[:, None]
    embeddings = embeddings / (embeddings.norm(dim=1, keepdim=True) + EPSILON)
    similarity, labels = (embeddings @ text_embeddings.T).max(dim=1)
    return labels, mask_scores * (temperature * similarity).sigmoid()


def _regions(
    mask_probs: Tensor, size: tuple[int, int] | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholded proposals at `size`: area and sum of probabilities (Q,), coverage (Q, h, w).

    Coverage weighs the tokens so that their sum is that of the upsampled embeddings inside: the
    transpose of bilinear upsampling, which spares a (H, W, C) map.
    """
    if size is None:
        inside = (mask_probs > threshold).to(mask_probs.dtype)
        return inside.flatten(1).sum(1), (mask_probs * inside).flatten(1).sum(1), inside
    rows, columns = (
        F.interpolate(torch.eye(cells, device=mask_probs.device)[None], size=pixels, mode="linear")
        for cells, pixels in zip(mask_probs.shape[-2:], size, strict=True)
    )
    parts = []
    for chunk in mask_probs.split(MASK_CHUNK):
        probs = _upsample(chunk[None], size)[0]
        inside = (probs > threshold).to(probs.dtype)
        mass = (probs * inside).flatten(1).sum(1)
        parts.append((inside.flatten(1).sum(1), mass, rows @ inside @ columns.transpose(1, 2)))
    area, mass, coverage = (torch.cat(values) for values in zip(*parts, strict=True))
    return area, mass, coverage


def _final_masks(mask_probs: Tensor, size: tuple[int, int] | None, threshold: float) -> Tensor:
    """(N, H, W) boolean masks, a few upsampled at a time."""
    if size is None:
        return mask_probs > threshold
    masks = mask_probs.new_empty((len(mask_probs), *size), dtype=torch.bool)
    for start in range(0, len(mask_probs), MASK_CHUNK):
        chunk = mask_probs[start : start + MASK_CHUNK]
        masks[start : start + MASK_CHUNK] = _upsample(chunk[None], size)[0] > threshold
    return masks


def _suppress(
    masks: Tensor,
    label_ids: NDArray[np.int64],
    scores: NDArray[np.float64],
    *,
    suppression: Suppression,
    max_overlap: float,
    sigma: float,
    min_score: float,
) -> NDArray[np.float64]:
    """Scores after suppression within each label; dropped masks get -1."""
    result = np.full_like(scores, -1.0)
    for label_id in np.unique(label_ids):
        members = np.flatnonzero(label_ids == label_id)
        iou = _pairwise_iou(masks[torch.from_numpy(members).to(masks.device)])
        weights = _decay(iou, suppression=suppression, max_overlap=max_overlap, sigma=sigma)
        result[members] = _decayed_scores(scores[members], weights, min_score)
    return result


def _decay(
    iou: NDArray[np.float64], *, suppression: Suppression, max_overlap: float, sigma: float
) -> NDArray[np.float64]:
    """Factor on the score of a mask that overlaps a better one by `iou`."""
    if suppression == "gaussian":
        return np.exp(-(iou**2) / sigma)
    lowered = 1 - iou if suppression == "linear" else np.zeros_like(iou)
    return np.where(iou > max_overlap, lowered, 1.0)


def _decayed_scores(
    scores: NDArray[np.float64], weights: NDArray[np.float64], min_score: float
) -> NDArray[np.float64]:
    """Take the best remaining mask, weaken the others by it, and so on; -1 where dropped."""
    scores, result = scores.copy(), np.full_like(scores, -1.0)
    remaining = np.ones(len(scores), dtype=bool)
    while remaining.any():
        best = int(np.argmax(np.where(remaining, scores, -np.inf)))
        result[best] = scores[best]
        remaining[best] = False
        scores[remaining] *= weights[best, remaining]
        remaining &= scores > min_score
    return result


def _pairwise_iou(masks: Tensor) -> NDArray[np.float64]:
    """(N, N) intersection over union of (N, H, W) boolean masks, pixels a block at a time."""
    flat = masks.flatten(1)
    overlap = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for block in flat.split(PIXEL_CHUNK, dim=1):
        # Counts below 2^24 are exact in float32.
        values = block.float()
        overlap += values @ values.T
    area = overlap.diagonal()
    union = area[:, None] + area - overlap
    return (overlap / (union + EPSILON)).cpu().numpy()


def _bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """Inclusive x0, y0, x1, y1 of a mask that is not empty."""
    columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
