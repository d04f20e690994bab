"""Label maps in memory, and what training sees of a pseudo-mask and dense labels.

Label id 0 is background, k the k-th category, `IGNORE_INDEX` a pixel that no loss looks at.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -1
BACKGROUND = 0
LABEL_TYPE = np.int16  # scoring and pasting wait for memory: half the bytes of int32
MAX_CATEGORIES = int(np.iinfo(LABEL_TYPE).max)

LabelMap = npt.NDArray[np.int16]

Target = Literal["saliency", "denseclip", "fused"]
Conflict = Literal["category", "ignore"]


def label_map(rows: npt.NDArray[np.integer], first: int) -> LabelMap:
    """Label ids (H, W) from the numbers (H, W) of what scored best, of which 0 is label `first`."""
    return rows.astype(LABEL_TYPE) + LABEL_TYPE(first)


def training_target(
    mask: npt.NDArray[np.bool_],
    label_id: int,
    dense_labels: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.floating],
    *,
    target: Target,
    confidence_threshold: float = 0.5,
    conflict: Conflict = "ignore",
) -> LabelMap:
    """Semantic mask that training sees of one archive image.

    `saliency` (ZUTIS section 3.2): the archive's category inside the pseudo-mask, background
    outside. `denseclip`: the dense labels alone. `fused`: as `saliency`, except where DenseCLIP is
    confident (confidence >= threshold): inside the pseudo-mask a pixel of which it sees another
    category becomes that one, or ignored; outside, a pixel of which it sees the archive's category
    becomes ignored. DenseCLIP's background never overrules the pseudo-mask.

    Args:
        mask: (H, W) pseudo-mask.
        label_id: of the archive's category; 0 for an archive of negatives, which is background
            wherever no other category overrules.
        dense_labels: (H, W) DenseCLIP label ids.
        confidence: (H, W) DenseCLIP confidence in [0, 1].
        target: which of the three.
        confidence_threshold: in [0, 1], used by `fused`.
        conflict: what `fused` puts where DenseCLIP sees another category: "category" that one,
            "ignore" `IGNORE_INDEX`.

    Returns:
        (H, W) int16 label ids.

    Raises:
        ValueError: the three maps differ in shape.
    """
    if not mask.shape == dense_labels.shape == confidence.shape:
        raise ValueError(
            f"mask {mask.shape}, dense labels {dense_labels.shape} and confidence "
            f"{confidence.shape} must have one shape"
        )
    if target == "denseclip":
        return dense_labels.astype(LABEL_TYPE)
    semantic = saliency_target(mask, label_id).astype(LABEL_TYPE)
    if target == "saliency":
        return semantic
    confident = confidence >= confidence_threshold
    other = mask & confident & (dense_labels != label_id) & (dense_labels != BACKGROUND)
    semantic[other] = dense_labels[other] if conflict == "category" else IGNORE_INDEX
    if label_id != BACKGROUND:
        semantic[~mask & confident & (dense_labels == label_id)] = IGNORE_INDEX
    return semantic


def saliency_target(mask: npt.NDArray[np.bool_], label_id: int) -> npt.NDArray[np.unsignedinteger]:
    """`training_target` of `saliency`, which looks at no dense labels.

    Returns:
        (H, W) label ids, of the smallest type that has `label_id`.
    """
    return np.multiply(mask, label_id, dtype=np.min_scalar_type(label_id))


def encode_confidence(confidence: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Confidence (H, W) in [0, 1] -> uint8 (H, W), round(255 p)."""
    return np.rint(np.clip(confidence, 0.0, 1.0) * 255.0).astype(np.uint8)


def decode_confidence(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Inverse of `encode_confidence`, to within half a level: float32 in [0, 1]."""
    return levels.astype(np.float32) / np.float32(255.0)
