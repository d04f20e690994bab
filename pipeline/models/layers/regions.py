"""What a label map becomes after the best name of every pixel is known: names of whole regions.

Letters: H W pixels, h w token grid, N regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


def components_of_values(
    parts: NDArray[np.integer[Any]], values: NDArray[np.integer[Any]], *, smallest: float
) -> NDArray[np.intp]:
    """Number the components, connected by their sides, of some values of a map.

    Args:
        parts: (H, W).
        values: in the order of the numbers; components of one come in raster order.
        smallest: pixels below which a component has no number.

    Returns:
        (H, W) numbers from 1 without a gap, 0 elsewhere.
    """
    from scipy import ndimage

    numbers = np.zeros(parts.shape, dtype=np.intp)
    count = 0
    for value in values:
        components, _ = ndimage.label(parts == value)
        is_large = np.bincount(components.ravel(), minlength=1) >= smallest
        is_large[0] = False
        numbers += np.where(is_large, count + is_large.cumsum(), 0)[components]
        count += int(is_large.sum())
    return numbers


def regions_of_one_label(labels: LabelMap, smallest: int) -> NDArray[np.intp]:
    """Number the connected regions of equal labels, see `components_of_values`.

    Args:
        labels: (H, W) label ids, 0 is background.
        smallest: pixels below which a region has no number.
    """
    return components_of_values(labels, np.unique(labels[labels > 0]), smallest=smallest)


def boxes_of_regions(numbers: NDArray[np.intp]) -> NDArray[np.float64]:
    """Top, left, bottom and right of N regions (H, W), as shares of the sides: (N, 4)."""
    from scipy import ndimage

    height, width = numbers.shape
    boxes = [
        (rows.start / height, columns.start / width, rows.stop / height, columns.stop / width)
        for rows, columns in ndimage.find_objects(numbers)
    ]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def shares_of_regions(numbers: NDArray[np.intp], grid: tuple[int, int]) -> NDArray[np.float32]:
    """How the pixels of N regions (H, W) lie on a grid of h x w tokens: (N, h, w), sums of 1."""
    rows, columns = (
        np.arange(pixels) * cells // pixels
        for pixels, cells in zip(numbers.shape, grid, strict=True)
    )
    num_tokens = grid[0] * grid[1]
    tokens = rows[:, None] * grid[1] + columns
    counts = np.bincount(
        (numbers * num_tokens + tokens).ravel(), minlength=(1 + numbers.max()) * num_tokens
    ).reshape(-1, *grid)[1:]
    return (counts / counts.sum(axis=(1, 2), keepdims=True)).astype(np.float32)
