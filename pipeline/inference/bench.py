"""What predicts on a benchmark: a network, with DenseCLIP beside it or not, or DenseCLIP alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self

from PIL import Image

from pipeline.benchmarks import Benchmark
from pipeline.benchmarks.corruptions import CORRUPTIONS, corrupt
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import batches
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.rle import RleObject, encode_crop
from pipeline.inference.protocol import denseclip_protocol, network_protocol
from pipeline.inference.segmenter import Prediction, Segmenter
from pipeline.methods.dense import Labeller
from pipeline.methods.inputs import PredictionSettings
from pipeline.params.benches import CorruptionParams
from pipeline.params.sections import PseudoLabelParams
from pipeline.scoring.predictions import StoredPrediction, write_predictions

SEED_DIGITS = 8  # hexadecimal: 32 bits


class BenchImage(Protocol):
    """An image of a benchmark: an `Example` or a `Query`."""

    @property
    def image_id(self) -> str: ...
    @property
    def image_path(self) -> Path: ...


ImageLoader = Callable[[BenchImage], Image.Image]


@dataclass(frozen=True)
class Query:
    """An image of a benchmark, without its masks.

    Attributes:
        number: its place in the benchmark.
        image_id: its name.
        image_path: its file.
        vocabulary: the names that it asks for, where they are not the benchmark's.
    """

    number: int
    image_id: str
    image_path: Path
    vocabulary: tuple[str, ...] | None


def queries_of(benchmark: Benchmark) -> list[Query]:
    """What a predictor needs to know of a benchmark."""
    return [
        Query(
            number,
            example.image_id,
            example.image_path,
            None if example.vocabulary is None else tuple(example.vocabulary),
        )
        for number, example in enumerate(benchmark)
    ]


class BenchPredictor(Protocol):
    """Predicts label maps, and objects where its settings ask for them."""

    @property
    def protocol(self) -> dict[str, Any]:
        """How it predicts, see `pipeline.inference.protocol`."""

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
    """Function that reads an image of the benchmark, and corrupts it in every order alike.

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

    def load(image: BenchImage) -> Image.Image:
        image_seed = int(digest([seed, image.image_id])[:SEED_DIGITS], 16)
        return corrupt(_load_stored(image), name=name, level=level, seed=image_seed)

    return load


def _load_stored(image: BenchImage) -> Image.Image:
    """The image as it is stored: masks were drawn without regard to EXIF rotation."""
    return load_image(image.image_path, upright=False)


class PredictionMaker:
    """Makes shards of predictions.

    Args:
        open_predictor: loads the predictor, given the runtime, with all names that are asked for.
        categories: of the benchmark, asked for where an image has no names of its own.
        batch_size: images that are predicted together.
        corruption: see `image_loader`, like the next one.
        bench_name: likewise.
        runtime: device, precision, and seed of corruptions.

    Attributes:
        load: reads an image as the predictor sees it.
        predictor: what predicts.
        settings: all that a prediction depends on besides its image; representable in JSON.
    """

    def __init__(
        self,
        open_predictor: Callable[..., BenchPredictor],
        categories: Sequence[str],
        batch_size: int,
        corruption: CorruptionParams | None,
        bench_name: str,
        runtime: Runtime,
    ) -> None:
        self.load = image_loader(corruption, bench_name=bench_name, seed=runtime.seed)
        self.predictor = open_predictor(runtime=runtime)
        self.settings = self.predictor.protocol
        self._categories = categories
        self._batch_size = batch_size

    def make(self, items: Sequence[Query], path: Path, tally: Tally) -> int:
        """Write the predictions of some images; one that cannot be read has none."""
        return write_predictions(
            path, self.predict(items, tally), num_categories=len(self._categories)
        )

    def close(self) -> None:
        """There is nothing to let go of."""

    def predict(
        self, queries: Iterable[Query], tally: Tally
    ) -> Iterator[tuple[int, StoredPrediction]]:
        """Yield predictions with the numbers of their images; a batch shares one vocabulary."""
        loaded = _load_images(queries, self.load, tally)
        for names, group in groupby(loaded, key=lambda pair: pair[0].vocabulary):
            chosen = self.predictor.select(names or self._categories)
            for batch in batches(group, self._batch_size):
                asked, images = zip(*batch, strict=True)
                predictions = chosen.predict([query.image_id for query in asked], images)
                yield from zip((query.number for query in asked), predictions, strict=True)
                tally.advance(len(batch))


def _load_images(
    queries: Iterable[Query], load: ImageLoader, tally: Tally
) -> Iterator[tuple[Query, Image.Image]]:
    """Queries with their images; one that cannot be read is skipped and counted."""
    for query in queries:
        try:
            yield query, load(query)
        except ImageError as error:
            tally.skip(str(query.image_path), str(error))
