"""What segments photos for a user: a checkpoint, or a dense labeller alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.inference.prediction import Prediction

if TYPE_CHECKING:  # a network may run where torch is not
    from pipeline.inference.labeller import Labeller


class PhotoSegmenter(Protocol):
    """A `Segmenter`, or what does the same."""

    @property
    def categories(self) -> list[str]:
        """Names in the order of the label ids from 1."""

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """Segment some RGB images."""

    def confidence(self, image: Image.Image, name: str) -> NDArray[np.float32]:
        """Probability (H, W) of one of the names at each pixel."""


@dataclass(frozen=True)
class LabellerOfPhotos:
    """A dense labeller as a `PhotoSegmenter`."""

    labeller: Labeller

    @property
    def categories(self) -> list[str]:
        return list(self.labeller.names.categories)

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        found = map(self.labeller.predict, images)
        return [Prediction(semantic, objects, self.categories) for semantic, objects in found]

    def confidence(self, image: Image.Image, name: str) -> NDArray[np.float32]:
        return self.labeller.confidence(image, name)
