"""Instance prediction of one image: labels, scores, suppression, run-length codes.

Letters: Q queries, K labels, C text space, H W pixels, h w token grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.formats.rle import encode_crop
from pipeline.models.zutis.postprocess import instance_predictions
from speed.harness import Bench, Pair
from speed.inputs import ellipses, unit_rows

NUM_LABELS = 21
THRESHOLD, TEMPERATURE, MAX_OVERLAP, MIN_SCORE = 0.5, 5.0, 0.3, 0.001
SCORE_TOLERANCE = 1e-5
COPIES = 4  # queries that propose the same object


@dataclass(frozen=True)
class ProposalInputs:
    """Proposals (Q, h, w) in [0, 1], tokens (h, w, C), text (K, C), and the size of the image."""

    mask_probs: Tensor
    patch_tokens: Tensor
    text: Tensor
    size: tuple[int, int]


def published_instances(inputs: ProposalInputs) -> list[dict[str, Any]]:
    """Embeddings inside masks by broadcasting, then full-size masks compared one with another."""
    probs, tokens = inputs.mask_probs, inputs.patch_tokens
    inside = probs > THRESHOLD
    areas = inside.sum(dim=(-2, -1))
    scores = (probs * inside).sum(dim=(-2, -1)) / (areas + 1e-7)
    means = (tokens[None] * inside[..., None]).sum(dim=(1, 2)) / (areas[:, None] + 1e-7)
    means = means / (means.norm(dim=-1, keepdim=True) + 1e-7)
    category_probs = (TEMPERATURE * means @ inputs.text.T).sigmoid()
    labels = category_probs.argmax(dim=1).numpy()
    final_scores = (scores * category_probs.max(dim=1).values).numpy()
    upsampled = F.interpolate(probs[None], size=inputs.size, mode="bilinear")[0]
    masks = (upsampled > THRESHOLD).numpy()
    results = []
    for label in set(labels.tolist()) - {0}:
        members = np.flatnonzero(labels == label)
        for mask, score in _suppress(masks[members], final_scores[members]):
            if mask.sum() > 0:
                results.append(_result(mask, score, label))
    return results


def _suppress(
    masks: NDArray[np.bool_], scores: NDArray[np.float32]
) -> list[tuple[NDArray[np.bool_], float]]:
    """Take the best mask, drop those that overlap it too much, and so on."""
    kept = []
    candidates = list(zip(masks, scores.tolist(), strict=True))
    while candidates:
        candidates.sort(key=lambda candidate: candidate[1])
        best_mask, best_score = candidates.pop()
        kept.append((best_mask, best_score))
        remaining = []
        for mask, score in candidates:
            overlap = np.logical_and(mask, best_mask).sum()
            union = np.logical_or(mask, best_mask).sum()
            weight = 0.0 if overlap / (union + 1e-7) > MAX_OVERLAP else 1.0
            if score * weight > MIN_SCORE:
                remaining.append((mask, score * weight))
        candidates = remaining
    return kept


def _result(mask: NDArray[np.bool_], score: float, label: int) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    return {
        "label": label,
        "score": score,
        "box": (int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())),
        "rle": coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode(),
    }


def our_instances(inputs: ProposalInputs) -> list[dict[str, Any]]:
    """The pipeline's, as a benchmark stores them."""
    found = instance_predictions(
        inputs.mask_probs, inputs.patch_tokens, inputs.text, inputs.size, suppression="hard"
    )
    return [
        {
            "label": instance.label_id,
            "score": instance.score,
            "box": instance.bbox_xyxy,
            "rle": encode_crop(instance.crop, instance.bbox_xyxy, instance.size)["counts"],
        }
        for instance in found
    ]


def proposal_inputs(*, quick: bool) -> ProposalInputs:
    """Objects of all sizes, each proposed by several queries a little apart, on a labelled map."""
    queries, dim, size = (12, 16, (48, 64)) if quick else (100, 512, (480, 640))
    grid = (size[0] // 8, size[1] // 8)
    objects = ellipses(1, queries // COPIES, grid, largest=0.25)
    rng = np.random.default_rng(1)
    logits = np.empty((queries, *grid), np.float32)
    labels = np.zeros(grid, np.int64)
    for number, mask in enumerate(objects):
        labels[mask] = 1 + number % (NUM_LABELS - 1)
        for query in range(number * COPIES, (number + 1) * COPIES):
            shifted = np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1))
            logits[query] = np.where(shifted, 3.0, -3.0) + rng.normal(0, 0.7, grid)
    generator = torch.Generator().manual_seed(1)
    text = unit_rows(generator, NUM_LABELS, dim)
    tokens = text[torch.from_numpy(labels)] + 0.5 * unit_rows(generator, *grid, dim)
    return ProposalInputs(
        mask_probs=torch.from_numpy(logits).sigmoid(),
        patch_tokens=F.normalize(tokens, dim=-1),
        text=text,
        size=size,
    )


def _prepare(_: Path, quick: bool) -> Pair:
    inputs = proposal_inputs(quick=quick)
    return Pair(lambda: published_instances(inputs), lambda: our_instances(inputs), _check)


def _check(published: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        return result["label"], result["box"], result["rle"]

    assert len(published) == len(ours) > 0, f"{len(published)} and {len(ours)} instances"
    for theirs, mine in zip(sorted(published, key=order), sorted(ours, key=order), strict=True):
        assert order(theirs) == order(mine), "other masks"
        difference = abs(theirs["score"] - mine["score"])
        assert difference <= SCORE_TOLERANCE, f"scores differ by {difference:.1e}"
    return f"same {len(ours)} masks, labels and boxes, scores within {SCORE_TOLERANCE:.0e}"


BENCHES = [
    Bench(
        name="instances",
        title="instance prediction with suppression and RLE: 100 queries, 480 x 640",
        target=20.0,
        stretch=45.0,
        prepare=_prepare,
    )
]
