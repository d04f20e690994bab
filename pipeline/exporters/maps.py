"""An exported image as maps: one value a pixel, where objects may overlap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.exporters.items import ExportedImage


def label_map(image: ExportedImage) -> NDArray[np.uint16]:
    """Label ids (H, W): the semantic map; without one, that of the objects, the first on top."""
    if image.semantic is not None:
        return image.semantic
    labels = np.zeros((image.height, image.width), dtype=np.uint16)
    for item in reversed(image.objects):
        labels[item.mask] = item.category
    return labels


def object_map(image: ExportedImage) -> NDArray[np.uint16]:
    """Places from 1 of the objects (H, W), the first on top; 0 is none."""
    numbers = np.zeros((image.height, image.width), dtype=np.uint16)
    for place in range(len(image.objects), 0, -1):
        numbers[image.objects[place - 1].mask] = place
    return numbers
