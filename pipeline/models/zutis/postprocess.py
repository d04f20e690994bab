"""Dense embeddings and mask proposals -> label maps and scored instances (ZUTIS paper, 3.3).

Letters: B batch, Q queries, N kept queries, K categories, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.formats.predictions import Instance
from pipeline.models.layers.interpolate import (
    Taps,
    better_labels,
    bilinear_taps,
    interpolate,
    upsample,
)
from pipeline.models.zutis.instances import (
    EPSILON,
    MAX_OVERLAP,
    MIN_SCORE,
    SIGMA,
    Crop,
    Suppression,
    crop_of,
    near,
    occupied,
    suppressed_instances,
)

ScoreResolution = Literal["token", "pixel"]
NameRegions = Callable[[Tensor, Tensor], Tensor]

BACKGROUND = 0
CATEGORY_CHUNK = 64
MASK_CHUNK = 16


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
    return logits if size is None else upsample(logits, size)


def semantic_prediction(
    patch_tokens: Tensor, text_embeddings: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Label id of every pixel: the argmax of `semantic_logits`, of equals the smallest.

    As in the published evaluation logits go from the token grid to `size` at once, whatever the
    size of the network's input. Categories are upsampled a few at a time, so memory does not grow
    with K.

    Args:
        patch_tokens: (B, h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm, background first.
        size: (H, W) of the prediction; None stays on the token grid.

    Returns:
        (B, H, W) or (B, h, w) int64 label ids.
    """
    if not len(text_embeddings):
        raise ValueError("text_embeddings has no row")
    pixels = size or patch_tokens.shape[1:3]
    best = patch_tokens.new_full((len(patch_tokens), *pixels), -torch.inf)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(text_embeddings), CATEGORY_CHUNK):
        chunk = text_embeddings[start : start + CATEGORY_CHUNK]
        best, labels = better_labels(
            best, labels, start, semantic_logits(patch_tokens, chunk, size)
        )
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
    max_overlap: float = MAX_OVERLAP,
    sigma: float = SIGMA,
    min_score: float = MIN_SCORE,
    score_resolution: ScoreResolution = "token",
    refined_probs: Tensor | None = None,
    name_regions: NameRegions | None = None,
) -> list[Instance]:
    """Labelled, scored and suppressed instances of one image.

    The final masks are proposals upsampled as probabilities and thresholded. Those labelled
    background and empty ones are dropped.

    Args:
        mask_probs: (Q, h, w) proposals of the last decoder layer, in [0, 1].
        patch_tokens: (h, w, C) of unit norm.
        text_embeddings: (K, C) of unit norm, background first.
        size: (H, W) of the masks; None stays on the token grid.
        threshold: probability above which a pixel belongs to a mask.
        temperature: factor on the cosine inside the sigmoid of the category score.
        suppression: non-maximum suppression among masks of one label. "hard" removes masks that
            overlap a better one, "linear" and "gaussian" lower their scores, "none" keeps all.
        max_overlap: IoU up to which "hard" and "linear" leave a score alone.
        sigma: width of "gaussian": the factor is exp(-IoU^2 / sigma).
        min_score: scores that fall to this or below are dropped by suppression.
        score_resolution: where labels and scores are decided. "token", as in the published code:
            over the proposal thresholded on the token grid, another region than the final mask.
            "pixel": over the final mask. The paper does not say (Algorithm 1 leaves upsampling out
            "for readability").
        refined_probs: (Q, h', w') what the final masks are made of; None for `mask_probs`. Labels
            and scores stay those of `mask_probs`.
        name_regions: chooses the label ids (N,) of the N proposals that are not background, from
            their boxes (N, 4) on the token grid, as shares of its sides, and their cosines (N, K);
            None for the nearest.

    Returns:
        Instances by falling score, of equals the earlier query first.

    Raises:
        ValueError: `suppression` is unknown.
    """
    labels, scores, embeddings = _label_proposals(
        mask_probs.float(),
        patch_tokens.float(),
        text_embeddings.float(),
        size=size if score_resolution == "pixel" else None,
        threshold=threshold,
        temperature=temperature,
        name_regions=name_regions,
    )
    # Background and empty masks influence no other mask, so they can go before suppression.
    candidates = (labels != BACKGROUND).nonzero()[:, 0]
    target_size = size or (mask_probs.shape[1], mask_probs.shape[2])
    final_probs = mask_probs if refined_probs is None else refined_probs
    crops = _crops(final_probs[candidates].float().cpu(), target_size, threshold)
    return suppressed_instances(
        crops,
        labels[candidates].cpu().numpy(),
        scores[candidates].cpu().double().numpy(),
        target_size,
        embeddings=embeddings[candidates].cpu().numpy(),
        suppression=suppression,
        max_overlap=max_overlap,
        sigma=sigma,
        min_score=min_score,
    )


def _label_proposals(
    mask_probs: Tensor,
    patch_tokens: Tensor,
    text_embeddings: Tensor,
    *,
    size: tuple[int, int] | None,
    threshold: float,
    temperature: float,
    name_regions: NameRegions | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Label id, score (Q,) and embedding (Q, C) of every proposal at `size` (None: on the grid).

    The mask score is the mean probability inside the mask; the category score the sigmoid of the
    scaled cosine between the mean embedding inside the mask and the text. An empty mask is
    background.
    """
    area, mass, coverage = _regions(mask_probs, size, threshold)
    area = area + EPSILON
    mask_scores = mass / area
    embeddings = coverage.flatten(1) @ patch_tokens.flatten(0, 1) / area[:, None]
    embeddings = embeddings / (embeddings.norm(dim=1, keepdim=True) + EPSILON)
    cosines = embeddings @ text_embeddings.T
    labels = cosines.argmax(dim=1)
    if name_regions is not None:
        _name_again(labels, cosines, mask_probs > threshold, name_regions)
    similarity = cosines.gather(1, labels[:, None])[:, 0]
    return labels, mask_scores * (temperature * similarity).sigmoid(), embeddings


def _name_again(labels: Tensor, cosines: Tensor, inside: Tensor, name_regions: NameRegions) -> None:
    """Change labels (Q,) of masks (Q, h, w) that reach a token and are no background."""
    asked = ((labels != BACKGROUND) & inside.flatten(1).any(dim=1)).nonzero()[:, 0]
    if len(asked):
        labels[asked] = name_regions(_boxes(inside[asked]), cosines[asked, 1:])


def _boxes(inside: Tensor) -> Tensor:
    """Top, left, bottom, right of masks (N, h, w), none empty, as shares of the sides: (N, 4)."""
    ends = []
    for other_axis, cells in zip((2, 1), inside.shape[1:], strict=True):
        occupied_cells = inside.any(dim=other_axis).long()
        ends.append(occupied_cells.argmax(dim=1) / cells)
        ends.append(1 - occupied_cells.flip(1).argmax(dim=1) / cells)
    return torch.stack(ends, dim=1)[:, [0, 2, 1, 3]]


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
        probs = upsample(chunk[None], size)[0]
        inside = (probs > threshold).to(probs.dtype)
        mass = (probs * inside).flatten(1).sum(1)
        parts.append((inside.flatten(1).sum(1), mass, rows @ inside @ columns.transpose(1, 2)))
    area, mass, coverage = (torch.cat(values) for values in zip(*parts, strict=True))
    return area, mass, coverage


def _crops(mask_probs: Tensor, size: tuple[int, int], threshold: float) -> list[Crop | None]:
    """Proposals (N, h, w), upsampled to `size` and thresholded; None for an empty mask.

    A pixel can exceed the threshold only next to a token that reaches it, so no other is computed.
    """
    rows, columns = (
        bilinear_taps(cells, pixels)
        for cells, pixels in zip(mask_probs.shape[-2:], size, strict=True)
    )
    reached = (mask_probs >= threshold).numpy()
    boxes = zip(
        _near(occupied(reached, 2), rows), _near(occupied(reached, 1), columns), strict=True
    )
    wide = upsample(mask_probs[:, None], (mask_probs.shape[1], size[1]))[:, 0]
    return [
        _crop(probs[:, box[1]], rows.at(box[0]), box[0].start, box[1].start, threshold)
        if is_reached
        else None
        for probs, is_reached, box in zip(wide, occupied(reached, (1, 2)), boxes, strict=True)
    ]


def _near(reached: NDArray[np.bool_], taps: Taps) -> list[slice]:
    return near(reached, taps.lower.numpy(), taps.upper.numpy())


def _crop(probs: Tensor, rows: Taps, top: int, left: int, threshold: float) -> Crop | None:
    """The mask of columns (h, w') that are upsampled already; `top` and `left` are its place."""
    return crop_of((interpolate(probs, rows, dim=0) > threshold).numpy(), top, left)
