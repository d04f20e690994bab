"""What predicts on a benchmark: a network, with or without a dense labeller, or that alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL import Image

from pipeline.benchmarks import Benchmark
from pipeline.benchmarks.corruptions import BenchImageReader
from pipeline.engine.batching import batches
from pipeline.engine.cache import BlobCache
from pipeline.engine.dry_run import CacheUse
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.files import digest
from pipeline.formats.images import ImageError
from pipeline.formats.predictions import (
    Instance,
    StoredPrediction,
    encode_prediction,
    write_encoded,
)
from pipeline.formats.rle import RleObject, encode_crop
from pipeline.inference.labeller import Labeller
from pipeline.inference.onnx import OnnxSegmenter
from pipeline.inference.prediction import Prediction
from pipeline.inference.protocol import (
    bench_protocol,
    labeller_protocol,
    network_protocol,
    onnx_protocol,
    protocol_lines,
)
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import PseudoLabelParams
from pipeline.models.layers.regions import regions_protocol
from pipeline.params.base import PredictionSettings
from pipeline.params.benches import BenchParams

# To be raised when predictions change though their settings do not.
PREDICTION_VERSION = 1
CACHE_KIND = "predictions"


@dataclass(frozen=True)
class ImageToPredict:
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


def images_to_predict(benchmark: Benchmark) -> list[ImageToPredict]:
    """What a predictor needs to know of a benchmark."""
    return [
        ImageToPredict(
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

    @property
    def fingerprints(self) -> list[str]:
        """Of what decides its predictions and has only a name in the protocol."""

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
    """The network of `checkpoint_dir`; `baseline` labels the same images, training-free."""

    segmenter: Segmenter
    baseline: Labeller | None
    checkpoint_dir: Path

    @property
    def protocol(self) -> dict[str, Any]:
        baseline = LabellerPredictor(self.baseline).protocol if self.baseline else {}
        return {
            **network_protocol(self.segmenter, self.checkpoint_dir),
            **{f"baseline_{name}": value for name, value in baseline.items()},
        }

    @property
    def fingerprints(self) -> list[str]:
        baseline = [self.baseline.fingerprint] if self.baseline else []
        return [self.segmenter.student.fingerprint, *baseline]

    def select(self, categories: Sequence[str]) -> NetworkPredictor:
        baseline = self.baseline.select(categories) if self.baseline else None
        return NetworkPredictor(self.segmenter.select(categories), baseline, self.checkpoint_dir)

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        with_objects = self.segmenter.settings.instances
        found = self.segmenter.predict(images)
        predictions = _stored(image_ids, found, with_objects=with_objects)
        if self.baseline is None:
            return predictions
        beside = LabellerPredictor(self.baseline).predict(image_ids, images)
        return [
            replace(prediction, baseline=below.labels, baseline_objects=below.objects)
            for prediction, below in zip(predictions, beside, strict=True)
        ]


@dataclass(frozen=True)
class OnnxPredictor:
    """A network in ONNX's format, alone."""

    segmenter: OnnxSegmenter

    @property
    def protocol(self) -> dict[str, Any]:
        return onnx_protocol(self.segmenter)

    @property
    def fingerprints(self) -> list[str]:
        return [self.segmenter.network.sha256]

    def select(self, categories: Sequence[str]) -> OnnxPredictor:
        return OnnxPredictor(self.segmenter.select(categories))

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        found = self.segmenter.predict(images)
        return _stored(image_ids, found, with_objects=self.segmenter.finds_objects)


@dataclass(frozen=True)
class LabellerPredictor:
    """A dense labeller alone."""

    labeller: Labeller

    @property
    def protocol(self) -> dict[str, Any]:
        settings = self.labeller.settings
        objects = {"temperature": settings.temperature, "objects": settings.labeller_objects}
        found = objects if self.labeller.finds_objects else {}
        return {**labeller_protocol(self.labeller), **found, **regions_protocol(settings)}

    @property
    def fingerprints(self) -> list[str]:
        return [self.labeller.fingerprint]

    def select(self, categories: Sequence[str]) -> LabellerPredictor:
        return LabellerPredictor(self.labeller.select(categories))

    def predict(
        self, image_ids: Sequence[str], images: Sequence[Image.Image]
    ) -> list[StoredPrediction]:
        with_objects = self.labeller.finds_objects
        found = [self.labeller.predict(image) for image in images]
        return [
            StoredPrediction(image_id, labels, objects=_encoded(objects) if with_objects else None)
            for image_id, (labels, objects) in zip(image_ids, found, strict=True)
        ]


def _stored(
    image_ids: Sequence[str], predictions: Sequence[Prediction], *, with_objects: bool
) -> list[StoredPrediction]:
    return [
        StoredPrediction(
            image_id,
            labels=prediction.semantic,
            objects=_encoded(prediction.instances) if with_objects else None,
        )
        for image_id, prediction in zip(image_ids, predictions, strict=True)
    ]


def _encoded(objects: Iterable[Instance]) -> list[RleObject]:
    return [
        RleObject(item.label_id, encode_crop(item.crop, item.bbox_xyxy, item.size), item.score)
        for item in objects
    ]


@dataclass(frozen=True)
class BenchRun:
    """What is predicted on a benchmark, and how; picklable.

    Attributes:
        bench_name: of the benchmark.
        bench: its entry of params.yaml.
        categories: its categories, asked for where an image has no names of its own.
        names: all names that any image asks for.
        metrics: what is scored, which decides what is predicted.
        checkpoint_dir: folder of a checkpoint, or None for the dense labeller alone.
        onnx_path: a network in ONNX's format in place of both.
        settings: how predictions are made.
        has_baseline: whether the dense labeller labels the images beside a network.
        baseline: section `pseudo_label`, the dense labeller.
        background: names of label id 0 for it; a checkpoint brings its own.
        texts: what stands for a category in its prompts, see `Names`.
        batch_size: images that are predicted together.
        warnings: what is odd about the benchmark.
    """

    bench_name: str
    bench: BenchParams
    categories: Sequence[str]
    names: Sequence[str]
    metrics: Sequence[str]
    checkpoint_dir: Path | None
    settings: PredictionSettings
    has_baseline: bool
    baseline: PseudoLabelParams
    background: Sequence[str]
    batch_size: int
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    onnx_path: Path | None = None


def load_predictor(run: BenchRun, runtime: Runtime) -> BenchPredictor:
    """Load a checkpoint, or a dense labeller where there is none, or a network in ONNX's format.

    Raises:
        PipelineError: see `Segmenter.load`, `Labeller.load` and `OnnxSegmenter.load`.
    """
    if run.onnx_path is not None:
        return OnnxPredictor(
            OnnxSegmenter.load(run.onnx_path, categories=run.names, settings=run.settings)
        )
    load_labeller = partial(
        Labeller.load,
        run.baseline,
        categories=run.names,
        background=run.background,
        texts=run.texts,
        settings=run.settings,
        runtime=runtime,
    )
    if run.checkpoint_dir is None:
        return LabellerPredictor(load_labeller())
    segmenter = Segmenter.load(
        run.checkpoint_dir, categories=run.names, settings=run.settings, runtime=runtime
    )
    baseline = load_labeller() if run.has_baseline else None
    return NetworkPredictor(segmenter, baseline, run.checkpoint_dir)


class PredictionMaker:
    """Makes shards of predictions: from the cache by the image's hash, or new.

    Args:
        run: what is predicted.
        runtime: device, precision, cache folder, and seed of corruptions.
        predictor: one that is loaded already.

    Attributes:
        settings: categories, metrics, protocol, and warnings if there are any; representable in
            JSON.
    """

    def __init__(
        self, run: BenchRun, runtime: Runtime, *, predictor: BenchPredictor | None = None
    ) -> None:
        self._run = run
        self._reader = _image_reader(run, runtime)
        self._predictor = predictor or load_predictor(run, runtime)
        protocol = self._predictor.protocol
        described = bench_protocol(
            run.bench,
            categories=run.categories,
            names=run.names,
            metrics=run.metrics,
            settings=run.settings,
            runtime=runtime,
        )
        self.settings: dict[str, Any] = {
            "categories": list(run.categories),
            "metrics": list(run.metrics),
            "protocol": protocol_lines(protocol | described | protocol),
        }
        if run.warnings:
            self.settings["warnings"] = list(run.warnings)
        decides = {
            **known_settings(run, runtime),
            "predictor": protocol,
            "fingerprints": self._predictor.fingerprints,
        }
        self._cache = BlobCache(runtime.cache_dir / CACHE_KIND, decides)

    def make(self, items: Sequence[ImageToPredict], path: Path, tally: Tally) -> int:
        """Write the predictions of some images; one that cannot be read has none."""
        return write_encoded(path, self._encoded(items, tally))

    def close(self) -> None:
        """Let go of the cache."""
        self._cache.close()

    def _encoded(
        self, entries: Iterable[ImageToPredict], tally: Tally
    ) -> Iterator[tuple[int, str, bytes]]:
        """Number, image id and prediction of each image; a batch shares one vocabulary."""
        for names, group in groupby(entries, key=lambda entry: entry.vocabulary):
            chosen = self._predictor.select(names or self._run.categories)
            for batch in batches(group, self._run.batch_size):
                yield from self._batch(batch, chosen, tally)

    def _batch(
        self, entries: Sequence[ImageToPredict], predictor: BenchPredictor, tally: Tally
    ) -> Iterator[tuple[int, str, bytes]]:
        known: dict[int, bytes] = {}
        keys: dict[int, str] = {}
        unknown: list[tuple[ImageToPredict, Image.Image]] = []
        for entry in entries:
            try:
                data = self._reader.read(entry)
                key = self._key(entry, data)
                if (blob := self._cache.get(key)) is not None:
                    known[entry.number] = blob
                else:
                    unknown.append((entry, self._reader.decode(entry, data)))
                    keys[entry.number] = key
            except ImageError as error:
                tally.skip(str(entry.image_path), str(error))
        tally.count_in_run("cached", len(known))
        if unknown:
            asked, images = zip(*unknown, strict=True)
            predictions = predictor.predict([entry.image_id for entry in asked], images)
            for entry, prediction in zip(asked, predictions, strict=True):
                known[entry.number] = encode_prediction(prediction, len(self._run.categories))
                self._cache.put(keys[entry.number], known[entry.number])
        self._cache.settle()
        for entry in entries:
            if entry.number in known:
                yield entry.number, entry.image_id, known[entry.number]
                tally.advance()

    def _key(self, entry: ImageToPredict, data: bytes) -> str:
        return _prediction_key(self._reader, entry, data)


def cached_predictions(run: BenchRun, runtime: Runtime) -> CacheUse:
    """Where predictions of a run lie in the cache, as far as no network decides it."""
    reader = _image_reader(run, runtime)

    def key(entry: ImageToPredict) -> str | None:
        try:
            return _prediction_key(reader, entry, reader.read(entry))
        except ImageError:
            return None

    return CacheUse(CACHE_KIND, known_settings(run, runtime), key)


def known_settings(run: BenchRun, runtime: Runtime) -> dict[str, Any]:
    """What predictions depend on besides predictor and image."""
    return {
        "version": PREDICTION_VERSION,
        "settings": run.settings.model_dump(mode="json"),
        "categories": list(run.categories),
        "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
    }


def _image_reader(run: BenchRun, runtime: Runtime) -> BenchImageReader:
    return BenchImageReader(
        run.bench.corruption,
        channels=run.bench.corruption_channels,
        bench_name=run.bench_name,
        seed=runtime.seed,
    )


def _prediction_key(reader: BenchImageReader, entry: ImageToPredict, data: bytes) -> str:
    """What a prediction depends on besides the settings."""
    return digest([sha256(data).hexdigest(), entry.vocabulary, reader.tag(entry)])
