"""Stored predictions beside their truth: measured for sorting, drawn when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.app.paged_shards import PagedShards
from pipeline.app.pictures import QUALITY
from pipeline.benchmarks import Benchmark, Example
from pipeline.benchmarks.corruptions import BenchImageReader
from pipeline.errors import PipelineError
from pipeline.formats.images import encode_jpeg
from pipeline.formats.labels import BACKGROUND, LabelMap
from pipeline.formats.predictions import StoredPrediction, prediction_of
from pipeline.pictures.benchmark import drawn_objects
from pipeline.pictures.overlays import (
    colour_map,
    displayed,
    overlay_errors,
    overlay_instances,
    overlay_semantic,
)
from pipeline.pictures.report import fit_image
from pipeline.scoring.task import ScoringTask, Truth

PICTURES = ("objects", "semantic", "truth", "errors", "image")


class PredictionRow(NamedTuple):
    """What is known of every prediction.

    Attributes:
        number: of its sample in the shards.
        image_id: of its example.
        iou: label id -> IoU in [0, 1] of each that occurs in truth or prediction, the background's
            included where it is scored.
        certainty: mean score of its objects, in [0, 1]; 0 without any, NaN where no objects are
            predicted at all.
        num_objects: number of these.
    """

    number: int
    image_id: str
    iou: Mapping[int, float]
    certainty: float
    num_objects: int

    @property
    def miou(self) -> float:
        """Mean of `iou`; NaN where nothing could be scored."""
        return float(np.mean(list(self.iou.values()))) if self.iou else math.nan


class Predictions:
    """The predictions of one benchmark by number.

    Args:
        folder: prediction shards.
        benchmark: what they are of.
        task: the label ids that count.
        load: reads an image as the network saw it.

    Attributes:
        categories: names by label id from 1.

    Raises:
        PipelineError: predictions of other categories.
    """

    def __init__(
        self, folder: Path, benchmark: Benchmark, task: ScoringTask, load: BenchImageReader
    ) -> None:
        self._shards = PagedShards(folder)
        self._benchmark = benchmark
        self._task = task
        self._load = load
        self.categories = list(benchmark.categories)
        described = self._shards.manifest.get("predict_bench")
        if not isinstance(described, dict) or described.get("categories") != self.categories:
            raise PipelineError(
                f"{folder}: not predictions of these categories; run `pipeline predict_bench` again"
            )

    def __len__(self) -> int:
        return len(self._shards)

    def rows(self) -> Iterator[PredictionRow]:
        """What is known of every prediction, in order; reads it and its truth."""
        for number in range(len(self)):
            prediction, example = self._pair(number)
            objects = prediction.objects
            scores = [item.score for item in objects or ()]
            certainty = sum(scores) / len(scores) if scores else 0.0
            yield PredictionRow(
                number,
                prediction.image_id,
                image_iou(self._target(prediction, example), prediction.labels),
                math.nan if objects is None else certainty,
                len(scores),
            )

    def facts(self, number: int) -> dict[str, Any]:
        """Name of the image and its objects, the best first."""
        prediction, example = self._pair(number)
        names = self._names(example)
        return {
            "image_id": prediction.image_id,
            "objects": [
                {"name": names[item.label_id - 1], "score": item.score}
                for item in prediction.objects or ()
            ],
            "has_objects": prediction.objects is not None,
        }

    def draw(self, number: int, what: str, *, threshold: float, side: int) -> bytes:
        """A picture as a file: one of `PICTURES`.

        Args:
            number: of the prediction.
            what: `objects` shows those of this score or more.
            threshold: in [0, 1].
            side: longest side in pixels.

        Raises:
            ImageError: the image cannot be read.
        """
        prediction, example = self._pair(number)
        picture = self._picture(what, prediction, example, threshold)
        return encode_jpeg(fit_image(picture, side), quality=QUALITY)

    def _picture(
        self, what: str, prediction: StoredPrediction, example: Example, threshold: float
    ) -> Image.Image:
        pixels, names = np.asarray(self._load(example)), self._names(example)
        palette = colour_map(len(names) + 1)
        if what == "objects":
            kept = [item for item in prediction.objects or () if item.score >= threshold]
            return overlay_instances(pixels, drawn_objects(kept), names=names)
        if what == "semantic":
            return overlay_semantic(pixels, prediction.labels, palette, names=names)
        if what == "truth":
            return overlay_semantic(pixels, example.semantic(), palette, names=names)
        if what == "errors":
            return overlay_errors(pixels, prediction.labels, self._target(prediction, example))
        return displayed(pixels)

    def _pair(self, number: int) -> tuple[StoredPrediction, Example]:
        """A prediction and its example.

        Raises:
            PipelineError: it is that of another image.
        """
        prediction = prediction_of(self._shards.sample(number))
        example = self._examples.get(prediction.image_id)
        if example is None:
            raise PipelineError(
                f"the benchmark has no image {prediction.image_id}; run `pipeline predict_bench` "
                "again"
            )
        return prediction, example

    @cached_property
    def _examples(self) -> dict[str, Example]:
        return {example.image_id: example for example in self._benchmark}

    def _names(self, example: Example) -> Sequence[str]:
        return example.vocabulary or self.categories

    def _target(self, prediction: StoredPrediction, example: Example) -> LabelMap:
        height, width = prediction.labels.shape
        return Truth(example, self._task, size=(height, width)).semantic


def image_iou(target: NDArray[np.integer], prediction: NDArray[np.integer]) -> dict[int, float]:
    """IoU in [0, 1] of each label id that occurs in target or prediction; void is left out.

    Args:
        target: (H, W) label ids; negative ones are void.
        prediction: (H, W) label ids.
    """
    scored = target >= BACKGROUND
    truth, found = target[scored], prediction[scored]
    return {
        int(label_id): float(
            np.count_nonzero((truth == label_id) & (found == label_id))
            / np.count_nonzero((truth == label_id) | (found == label_id))
        )
        for label_id in np.union1d(truth, found)
    }
