"""Objects from a label map: its regions as proposals (ZUTIS paper, 4.3, of MaskCLIP).

Letters: N regions, K label ids, C text space, H W pixels, h w grid of patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pipeline.formats.labels import LabelMap
from pipeline.formats.predictions import Instance

Regions = Literal["classes", "components"]

Box = tuple[slice, slice]
Place = tuple[int, Box, NDArray[np.bool_]]


def objects_of_labels(
    labels: LabelMap,
    confidence: NDArray[np.float32],
    features: Tensor,
    text: Tensor,
    *,
    regions: Regions = "classes",
    temperature: float = 5.0,
) -> list[Instance]:
    """The foreground regions of a label map, scored as ZUTIS scores its proposals.

    A score is the mean confidence inside, times the sigmoid of the scaled cosine between the mean
    of the upsampled unit features inside and the text of the region's label.

    Args:
        labels: (H, W) label ids, 0 is background.
        confidence: (H, W) probability of the label in [0, 1].
        features: (C, h, w) of any length, float32.
        text: (K, C) unit rows by label id, the background's first.
        regions: "classes" takes all pixels of a label for one object, "components" each of its
            parts that are connected by their sides.
        temperature: factor on the cosine inside the sigmoid.

    Returns:
        Objects by falling score, of equals the smaller label id first.
    """
    places = list(_regions(labels, split=regions == "components"))
    if not places:
        return []
    crops = [(box, crop) for _, box, crop in places]
    weights = coverage(crops, labels.shape, features.shape[-2:])
    means = weights.flatten(1) @ F.normalize(features, dim=0).cpu().flatten(1).T
    texts = text.cpu()[[label_id for label_id, _, _ in places]]
    cosines = F.cosine_similarity(means, texts)
    categories = (temperature * cosines).sigmoid().cpu().double().tolist()
    height, width = labels.shape
    found = [
        Instance(
            label_id=label_id,
            score=category * float(confidence[box][crop].mean(dtype=np.float64)),
            crop=crop,
            bbox_xyxy=(box[1].start, box[0].start, box[1].stop - 1, box[0].stop - 1),
            size=(height, width),
        )
        for (label_id, box, crop), category in zip(places, categories, strict=True)
    ]
    return sorted(found, key=lambda instance: -instance.score)


def _regions(labels: LabelMap, *, split: bool) -> Iterator[Place]:
    """Label id, rows and columns of the box, and mask within it, of every region."""
    for index, box in enumerate(ndimage.find_objects(labels)):
        if box is None:
            continue
        crop = labels[box] == index + 1
        if not split:
            yield index + 1, box, crop
            continue
        parts, _ = ndimage.label(crop)
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            part = parts[rows, columns] == number
            yield index + 1, (_shifted(rows, box[0]), _shifted(columns, box[1])), part


def _shifted(inner: slice, outer: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def coverage(
    crops: Sequence[tuple[Box, NDArray[np.bool_]]], size: Sequence[int], grid: Sequence[int]
) -> Tensor:
    """Weights (N, h, w) of the patches in the mean of what is upsampled bilinearly inside.

    The transpose of upsampling, which spares a map (C, H, W).

    Args:
        crops: rows and columns of each region's box, and its mask within.
        size: (H, W).
        grid: (h, w).
    """
    rows, columns = (
        F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear")[0]
        for cells, pixels in zip(grid, size, strict=True)
    )
    return torch.stack(
        [
            rows[:, box[0]] @ torch.from_numpy(crop).float() @ columns[:, box[1]].T / crop.sum()
            for box, crop in crops
        ]
    )
