"""What a label map becomes after the best name of every pixel is known: names of whole regions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.formats.labels import LabelMap, label_map
from pipeline.params.base import PredictionSettings

if TYPE_CHECKING:
    from torch import Tensor


def labels_of_regions(numbers: Tensor, first: int, settings: PredictionSettings) -> LabelMap:
    """Label ids (H, W) from the numbers (H, W) of what scored best, of which 0 is label `first`.

    With `region_majority`, a region takes what most of it has.
    """
    labels = label_map(numbers.cpu().numpy(), first)
    return majority_of_regions(labels) if settings.region_majority else labels


def regions_protocol(settings: PredictionSettings) -> dict[str, Any]:
    """What decides the above, in the words of a protocol."""
    # Named where it is on, so that what is known of other predictions reads as before.
    return {"region_majority": True} if settings.region_majority else {}


def majority_of_regions(labels: LabelMap) -> LabelMap:
    """Give each connected region of foreground the category that most of it has.

    A region in which no category has more than half of the pixels stays as it is: it may be several
    objects that touch.

    Args:
        labels: (H, W) label ids, 0 is background; pixels are connected by their sides.

    Returns:
        (H, W) label ids of the same type.
    """
    from scipy import ndimage

    regions, num_regions = ndimage.label(labels > 0)
    num_labels = int(labels.max(initial=0)) + 1
    pairs = regions.ravel() * num_labels + labels.ravel()
    counts = np.bincount(pairs, minlength=(num_regions + 1) * num_labels).reshape(-1, num_labels)
    has_majority = 2 * counts.max(axis=1) > counts.sum(axis=1)
    has_majority[0] = False  # the background
    winners = counts.argmax(axis=1).astype(labels.dtype)
    return np.where(has_majority[regions], winners[regions], labels)
