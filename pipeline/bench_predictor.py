"""What predicts on a benchmark: a network, with DenseCLIP beside it or not, or DenseCLIP alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from PIL import Image

from pipeline.data.benchmarks import Benchmark, Example
from pipeline.data.corruptions import CORRUPTIONS, corrupt
from pipeline.data.images import ImageError, load_image
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.labeller import Labeller
from pipeline.metrics.rle import RleObject, encode_crop
from pipeline.params import CorruptionParams, PseudoLabelParams
from pipeline.predictor import Prediction, PredictionSettings, Segmenter
from pipeline.protocol import denseclip_protocol, network_protocol
from pipeline.runtime import Runtime, StageRun
from pipeline.scoring.predictions import StoredPrediction

SEED_DIGITS = 8  # hexadecimal: 32 bits

Item = TypeVar("Item")
ImageLoader = Callable[[Example], Image.Image]


class BenchPredictor(Protocol):
    """Predicts label maps, and objects where its settings ask for them."""

    @property
    def protocol(self) -> dict[str, Any]:
        """How it predicts, see `pipeline.protocol`."""

    def select(self, categories: Sequence[str]) -> Self:
        """The same for some of its categories; their label ids are their places from 1.

        Raises:
            ValueError: a name that it was not loaded with.
        """

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        """Predictions of some RGB images."""


@dataclass(frozen=True)
class NetworkPredictor:
    """A ZUTIS network of `checkpoint_dir`; `baseline` is DenseCLIP on the same images."""

    segmenter: Segmenter
    baseline: Labeller | None
    checkpoint_dir: Path

    @property
    def protocol(self) -> dict[str, Any]:
        baseline = denseclip_protocol(self.baseline) if self.baseline else {}
        return {
            **network_protocol(self.segmenter, self.checkpoint_dir),
            **{f"baseline_{name}": value for name, value in baseline.items()},
        }

    def select(self, categories: Sequence[str]) -> NetworkPredictor:
        baseline = self.baseline.select(categories) if self.baseline else None
        return NetworkPredictor(self.segmenter.select(categories), baseline, self.checkpoint_dir)

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        return [
            StoredPrediction(
                image_id,
                labels=prediction.semantic,
                baseline=self.baseline.labels(image) if self.baseline else None,
                objects=self._objects(prediction),
            )
            for image_id, image, prediction in zip(
                image_ids, images, self.segmenter.predict(images), strict=True
            )
        ]

    def _objects(self, prediction: Prediction) -> list[RleObject] | None:
        if not self.segmenter.settings.instances:
            return None
        return [
            RleObject(
                found.label_id, encode_crop(found.crop, found.bbox_xyxy, found.size), found.score
            )
            for found in prediction.instances
        ]


@dataclass(frozen=True)
class DenseClipPredictor:
    """DenseCLIP alone; it finds no objects."""

    labeller: Labeller

    @property
    def protocol(self) -> dict[str, Any]:
        return {"model": "denseclip", **denseclip_protocol(self.labeller)}

    def select(self, categories: Sequence[str]) -> DenseClipPredictor:
        return DenseClipPredictor(self.labeller.select(categories))

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        return [
            StoredPrediction(image_id, labels=self.labeller.labels(image))
            for image_id, image in zip(image_ids, images, strict=True)
        ]


def load_predictor(
    checkpoint_dir: Path | None,
    names: Sequence[str],
    *,
    settings: PredictionSettings,
    has_baseline: bool,
    baseline: PseudoLabelParams,
    background: Sequence[str],
    runtime: Runtime,
) -> BenchPredictor:
    """Load a checkpoint, or DenseCLIP where there is none.

    Args:
        checkpoint_dir: folder of a checkpoint, or None.
        names: all names that any image asks for.
        settings: how predictions are made.
        has_baseline: whether DenseCLIP labels the images as well.
        baseline: section `pseudo_label`, the settings of DenseCLIP.
        background: names of label id 0 for DenseCLIP.
        runtime: device and precision.

    Raises:
        PipelineError: see `Segmenter.load` and `Labeller.load`.
    """
    load_labeller = partial(
        Labeller.load,
        baseline,
        categories=names,
        background=background,
        settings=settings,
        runtime=runtime,
    )
    if checkpoint_dir is None:
        return DenseClipPredictor(load_labeller())
    segmenter = Segmenter.load(checkpoint_dir, categories=names, settings=settings, runtime=runtime)
    return NetworkPredictor(segmenter, load_labeller() if has_baseline else None, checkpoint_dir)


def image_loader(corruption: CorruptionParams | None, *, bench_name: str, seed: int) -> ImageLoader:
    """Function that reads the image of an example, and corrupts it in every order alike.

    Raises:
        PipelineError: an unknown corruption.
    """
    if corruption is None:
        return _load_stored
    name, level = corruption.name, corruption.level
    if name not in CORRUPTIONS:
        raise PipelineError(
            f"benches.{bench_name}.corruption.name: {name!r} is not known; choose one of "
            f"{', '.join(CORRUPTIONS)}"
        )

    def load(example: Example) -> Image.Image:
        image_seed = int(digest([seed, example.image_id])[:SEED_DIGITS], 16)
        return corrupt(_load_stored(example), name=name, level=level, seed=image_seed)

    return load


def _load_stored(example: Example) -> Image.Image:
    """The image as it is stored: masks were drawn without regard to EXIF rotation."""
    return load_image(example.image_path, upright=False)


def predict_bench(
    benchmark: Benchmark,
    predictor: BenchPredictor,
    load: ImageLoader,
    *,
    batch_size: int,
    stage: StageRun,
) -> Iterator[tuple[int, StoredPrediction]]:
    """Yield predictions with their number in the benchmark; a batch shares one vocabulary.

    Args:
        benchmark: its examples.
        predictor: loaded with all names that they ask for.
        load: see `image_loader`.
        batch_size: images that are predicted together.
        stage: counts them, and those that cannot be read and are left out.

    Raises:
        PipelineError: no image can be read.
    """
    loaded = _load_examples(benchmark, load, stage)
    for names, group in groupby(loaded, key=lambda item: item[1].vocabulary):
        chosen = predictor.select(names or benchmark.categories)
        for batch in batches(group, batch_size):
            numbers, examples, images = zip(*batch, strict=True)
            predictions = chosen.predict([example.image_id for example in examples], images)
            yield from zip(numbers, predictions, strict=True)
            stage.advance(len(batch))
    if not stage.items:
        first = stage.skipped[0]
        raise PipelineError(
            f"none of the {len(benchmark)} images can be read; the first one, {first['item']}: "
            f"{first['reason']}"
        )


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` consecutive items; the last one may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def _load_examples(
    benchmark: Benchmark, load: ImageLoader, stage: StageRun
) -> Iterator[tuple[int, Example, Image.Image]]:
    """Examples with number and image; one that cannot be read is skipped and counted."""
    for number, example in enumerate(benchmark):
        try:
            yield number, example, load(example)
        except ImageError as error:
            stage.skip(str(example.image_path), str(error))
