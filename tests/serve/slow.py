"""A segmenter that takes its time, so that requests are in flight for as long as a test needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.formats.predictions import Instance
from pipeline.inference.segmenter import Prediction


@dataclass
class SlowSegmenter:
    """Finds one object, the whole image; remembers how many images came together.

    Attributes:
        seconds: of a batch, whatever its size.
        batches: sizes of those so far.
    """

    seconds: float
    categories: list[str]
    batches: list[int]

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        time.sleep(self.seconds)
        self.batches.append(len(images))
        return [self._found(image.width, image.height) for image in images]

    def _found(self, width: int, height: int) -> Prediction:
        if (width, height) == (13, 13):
            raise RuntimeError("a bug that this size shows")
        size = (height, width)
        box = (0, 0, width - 1, height - 1)
        instance = Instance(1, 0.5, np.ones(size, bool), box, size)
        return Prediction(np.ones(size, np.int16), [instance], self.categories)

    def confidence(self, image: Image.Image, name: str) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class SlowSource:
    """Where it comes from; it has a closed list of names."""

    seconds: float = 0.0
    names: Sequence[str] = ("thing",)

    def load(self, threads: int) -> SlowSegmenter:
        del threads
        return SlowSegmenter(self.seconds, list(self.names), [])

    def with_names(self, segmenter: object, names: Sequence[str]) -> SlowSegmenter:
        del segmenter, names
        raise PipelineError("categories: only its own")
