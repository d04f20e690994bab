"""What training sees: label ids of a pseudo-mask, of dense labels, or of both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, Conflict, LabelMap, Target


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
