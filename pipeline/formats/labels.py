"""Label maps in memory, and what training sees of a pseudo-mask and dense labels.

Label id 0 is background, k the k-th category. Two marks are no label ids: `IGNORE_INDEX` is void, a
pixel that no loss looks at; `UNLABELLED` is a pixel without truth, which a teacher may label. Files
of labels hold no `UNLABELLED`: it is made when truth is read for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -1
UNLABELLED = -2
BACKGROUND = 0
LABEL_TYPE = np.int16  # scoring and pasting wait for memory: half the bytes of int32
MAX_CATEGORIES = int(np.iinfo(LABEL_TYPE).max)

LabelMap = npt.NDArray[np.int16]

Target = Literal["saliency", "denseclip", "fused"]
Conflict = Literal["category", "ignore"]


def label_map(rows: npt.NDArray[np.integer], first: int) -> LabelMap:
    """Label ids (H, W) from the numbers (H, W) of what scored best, of which 0 is label `first`."""
    return rows.astype(LABEL_TYPE) + LABEL_TYPE(first)


def agreement(mask: npt.NDArray[np.bool_], labels: LabelMap, label_id: int) -> float | None:
    """Share of a mask (H, W) that labels (H, W) give a label id; None for an empty mask.

    Raises:
        ValueError: the two differ in shape.
    """
    if mask.shape != labels.shape:
        raise ValueError(f"mask {mask.shape} and labels {labels.shape} differ")
    area = np.count_nonzero(mask)
    return np.count_nonzero(labels[mask] == label_id) / area if area else None


class Predicted:
    """Which categories any of some label maps shows.

    Args:
        categories: names by label id from 1.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        self._categories = categories
        self._found: set[int] = set()

    def add(self, labels: npt.NDArray[np.integer]) -> None:
        """Look at the label ids (H, W) of one image."""
        self._found.update(np.unique(labels).tolist())

    def never(self) -> list[str]:
        """Names of the categories without a pixel."""
        named = enumerate(self._categories, start=1)
        return [name for label_id, name in named if label_id not in self._found]


def encode_confidence(confidence: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Confidence (H, W) in [0, 1] -> uint8 (H, W), round(255 p)."""
    return np.rint(np.clip(confidence, 0.0, 1.0) * 255.0).astype(np.uint8)


def decode_confidence(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Inverse of `encode_confidence`, to within half a level: float32 in [0, 1]."""
    return levels.astype(np.float32) / np.float32(255.0)
