"""What is said of one image."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.formats.labels import LabelMap
from pipeline.formats.predictions import Instance


@dataclass(frozen=True)
class Prediction:
    """The segmentation of one image, at its own size.

    Attributes:
        semantic: (H, W) int16 label ids, 0 is background.
        instances: objects by falling score.
        categories: names in the order of the label ids from 1.
    """

    semantic: LabelMap
    instances: list[Instance]
    categories: list[str] = field(repr=False)
