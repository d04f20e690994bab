"""What can be exported: predictions of photos, predictions of a benchmark, the archives' masks.

A source lists its images first, and reads each when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.benchmarks.coco import field_of
from pipeline.benchmarks.example import Benchmark, Example
from pipeline.errors import PipelineError, listing
from pipeline.exporters.items import ExportedObject
from pipeline.files import native_path, read_json, utf8_text
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import ImageError, decode_label, read_file
from pipeline.formats.labels import LabelMap
from pipeline.formats.objects import decode_objects
from pipeline.formats.predictions import PredictionStore
from pipeline.formats.rle import Rle, RleObject, decode_mask, encode_mask, encode_segmentation
from pipeline.formats.shards import SampleStore, open_samples

PREDICTIONS = "predictions.json"  # as `pipeline.stages.predict` names it
FACTS = ("category", "rank", "similarity")


@dataclass(frozen=True)
class Found:
    """An image with its results, as they are stored.

    Attributes:
        data: its file.
        upright: whether the masks are those of the upright image; else of the pixels as stored.
        objects: in any order.
        labels: (H, W) label ids, or None.
        sha256: of the image's own file, where `data` is not that.
        facts: see `ExportedImage`.
        truth: the true objects, or None where they are not known.
    """

    data: bytes
    objects: Sequence[ExportedObject]
    labels: LabelMap | None
    upright: bool = True
    sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    truth: Sequence[ExportedObject] | None = None

    @property
    def content_hash(self) -> str:
        """SHA-256 of the image's own file."""
        return self.sha256 or hashlib.sha256(self.data).hexdigest()


class Entry(NamedTuple):
    """An image of a source.

    Attributes:
        source: where it came from: a path, or an item of an index dataset.
        stem: name that it would have if it were the only one.
        read: raises ImageError where it, or its result, cannot be read.
    """

    source: str
    stem: str
    read: Callable[[], Found]


class Source(Protocol):
    """Results to export."""

    @property
    def categories(self) -> Sequence[str]:
        """Names in the order of the label ids from 1."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the results are and what made them, for the manifest."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...


class PhotoPredictions:
    """What `pipeline predict` has written; see `Source`.

    Where it found no object in any image, the categories of the label maps are the objects.
    """

    def __init__(self, folder: Path) -> None:
        """Read `predictions.json`.

        Raises:
            PipelineError: it is missing, or not what `pipeline predict` writes.
        """
        self._folder = folder
        path = folder / PREDICTIONS
        if not path.is_file():
            raise PipelineError(f"{path}: no such file; expected the --out of `pipeline predict`")
        content = read_json(path)
        try:
            self.categories = _names_by_id(content["categories"])
            self._images = [(image["id"], str(image["file_name"])) for image in content["images"]]
            self._labels = {
                image["id"]: _below(image["labels"])
                for image in content["images"]
                if "labels" in image
            }
            self._objects = _objects_by_image(content, self.categories)
            info = dict(content.get("info", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PipelineError(
                f"{path}: not what `pipeline predict` writes ({type(error).__name__}: {error})"
            ) from None
        self._has_objects = bool(content["annotations"])
        self.origin = {
            "kind": "predictions of photos",
            "path": _noted(folder),
            **_objects_note(self._has_objects),
            **info,
        }

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Entry]:
        for number, file_name in self._images:
            path = PurePosixPath(self._labels.get(number, file_name))
            yield Entry(file_name, path.stem, partial(self._read, number, file_name))

    def _read(self, number: int, file_name: str) -> Found:
        data = _read_image(native_path(file_name))
        labels = None
        if number in self._labels:
            try:
                content = read_file(self._folder / native_path(self._labels[number]))
                labels = decode_label(content)
                _check_id(int(labels.max(initial=0)), self.categories, "label id", least=0)
            except ValueError as error:  # as an ImageError is
                raise ImageError(f"its label map {self._labels[number]}: {error}") from None
        found = map(_decoded, self._objects[number]) if self._has_objects else _regions(labels)
        return Found(data, list(found), labels)


class BenchPredictions:
    """What `pipeline predict_bench` has written; see `Source`."""

    def __init__(self, shard_dir: Path, benchmark: Benchmark, *, name: str, truth: bool) -> None:
        """Open the shards.

        Args:
            shard_dir: the predictions.
            benchmark: what they are of.
            name: of the benchmark.
            truth: whether it has true objects.

        Raises:
            PipelineError: a shard is missing or damaged, or of other categories.
        """
        self._store = PredictionStore(shard_dir)
        self._benchmark = benchmark
        self._truth = truth
        settings = self._store.manifest.get("predict_bench", {})
        if settings.get("categories") != list(benchmark.categories):
            raise PipelineError(
                f"{shard_dir}: not predictions of the categories of benches.{name}: "
                f"{listing(benchmark.categories)}; run `pipeline predict_bench --bench {name}`"
            )
        asked = [name for example in benchmark for name in example.vocabulary or ()]
        self.categories = list(dict.fromkeys([*benchmark.categories, *asked]))
        self.origin = {
            "kind": "predictions of a benchmark",
            "benchmark": name,
            "path": _noted(shard_dir),
            "protocol": settings.get("protocol", []),
        }

    def __len__(self) -> int:
        return len(self._benchmark)

    def __iter__(self) -> Iterator[Entry]:
        for number, example in enumerate(self._benchmark):
            source = example.image_path.as_posix()
            yield Entry(source, example.image_id, partial(self._read, number, example))

    def _read(self, number: int, example: Example) -> Found:
        prediction = self._store.get(number, example.image_id)
        if prediction is None:
            raise ImageError("no prediction of it")
        label_ids = self._label_ids(example)
        objects = (
            _regions(prediction.labels)
            if prediction.objects is None
            else map(_decoded, prediction.objects)
        )
        targets = example.instances() if self._truth else None
        return Found(
            _read_image(example.image_path),
            [_renamed(item, label_ids) for item in objects],
            label_ids[prediction.labels],
            upright=False,
            facts={"image_id": example.image_id},
            truth=None
            if targets is None
            else [
                _renamed(ExportedObject(target.mask, target.label_id), label_ids)
                for target in targets
                if target.mask.any() and not target.crowd
            ],
        )

    def _label_ids(self, example: Example) -> LabelMap:
        """The label id (1 + K + 1,) of each that the image was asked for; the last is void."""
        asked = example.vocabulary or self._benchmark.categories
        places = {name: place for place, name in enumerate(self.categories, start=1)}
        return np.array([0, *(places[name] for name in asked), -1], dtype=np.int16)


class ArchiveMasks:
    """The archives' images, with pseudo-masks and perhaps dense labels; see `Source`.

    An image in several archives comes once, with the objects of each, under its key, which is the
    same in every run. Negatives have no object.
    """

    def __init__(
        self, masks_dir: Path, categories: Sequence[str], *, labels_dir: Path | None = None
    ) -> None:
        """Open the shards.

        Args:
            masks_dir: shards of masks.
            categories: those of the params, which the masks must be of.
            labels_dir: shards of dense labels, the label maps; without, masks are all there is.

        Raises:
            PipelineError: a shard is missing or damaged, or of other categories.
        """
        self.categories = list(categories)
        self._samples = open_samples(masks_dir, members=["jpg", "json", "mask.png"])
        self._labels = None if labels_dir is None else LabelStore(labels_dir)
        if self._labels:
            self._labels.check(categories, self._samples.keys)
        self._places = _places_by_image(self._samples, self.categories, masks_dir)
        self.origin = {
            "kind": "pseudo-labels of the archives",
            "path": _noted(masks_dir),
            **_settings(self._samples),
            **({} if labels_dir is None else {"labels": _noted(labels_dir)}),
        }

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Entry]:
        for places in self._places.values():
            described = self._samples.json(places[0])
            name = described["path"]
            if described.get("member") is not None:
                name = f"{name}:{described['member']}"
            yield Entry(name, described["key"], partial(self._read, places))

    def _read(self, places: Sequence[int]) -> Found:
        objects: list[ExportedObject] = []
        archives = []
        for place in places:
            described = self._samples.json(place)
            archives.append({name: described[name] for name in FACTS})
            if described["label_id"]:
                numbers = decode_objects(self._samples.member(place, "mask.png"))
                objects += [
                    ExportedObject(numbers == number, described["label_id"])
                    for number in range(1, int(numbers.max(initial=0)) + 1)
                ]
        archives.sort(key=lambda row: -(row["similarity"] or 0))
        labels = self._labels.get(self._samples.keys[places[0]])[0] if self._labels else None
        return Found(
            self._samples.member(places[0], "jpg"),
            objects,
            labels,
            sha256=self._samples.json(places[0])["sha256"],
            facts=archives[0] | ({"archives": archives} if len(archives) > 1 else {}),
        )


def _names_by_id(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of a COCO file whose ids count from 1."""
    names = {int(category["id"]): str(category["name"]) for category in categories}
    if sorted(names) != list(range(1, len(categories) + 1)):
        raise ValueError("ids of the categories are not 1, 2, ...")
    return [names[number] for number in sorted(names)]


def _check_id(label_id: object, categories: Sequence[str], what: str, *, least: int = 1) -> None:
    """Refuse an id that no category has, for a file may have been edited."""
    if type(label_id) is not int or not least <= label_id <= len(categories):
        raise ValueError(f"{what} {label_id!r}: expected {least} to {len(categories)}")


def _objects_by_image(
    content: Mapping[str, Any], categories: Sequence[str]
) -> dict[int, list[RleObject]]:
    """The objects of a COCO file by the image's id, checked, for a file may have been edited.

    Raises:
        ValueError: one is not what it should be; annotation and field are named.
    """
    images = {image["id"]: image for image in content["images"]}
    objects: dict[int, list[RleObject]] = {image_id: [] for image_id in images}
    for place, entry in enumerate(content["annotations"]):
        try:
            image_id = entry["image_id"]
            if image_id not in images:
                raise ValueError(f"image_id {image_id!r} is not among the images")
            _check_id(entry["category_id"], categories, "category_id")
            objects[image_id].append(_object(entry, images[image_id]))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"annotations[{place}]: {reason}") from None
    return objects


def _object(entry: Mapping[str, Any], image: Mapping[str, Any]) -> RleObject:
    """The object of an annotation; its mask may be polygons, or have no pixel.

    Raises:
        KeyError, ValueError: score or mask is missing, or not what it should be.
    """
    score = field_of(entry, "score", int, float)
    if not 0 <= score <= 1:
        raise ValueError(f"score {score}: expected a number from 0 to 1")
    size = field_of(image, "height", int), field_of(image, "width", int)
    counts = encode_segmentation(entry["segmentation"], size)
    if counts is None:
        return RleObject(entry["category_id"], encode_mask(np.zeros(size, dtype=bool)), score)
    mask: Rle = {"size": list(size), "counts": counts.decode("ascii")}
    return RleObject(entry["category_id"], mask, score)


def _below(name: str) -> str:
    """A file name that leads out of no folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"labels {name} is not below the folder")
    return name


def _read_image(path: Path) -> bytes:
    if not path.exists():
        raise ImageError("file is missing")
    return read_file(path)


def _decoded(item: RleObject) -> ExportedObject:
    rle: Rle = item.rle
    return ExportedObject(decode_mask(rle), item.label_id, item.score)


def _regions(labels: LabelMap | None) -> list[ExportedObject]:
    """The categories of a label map as objects, where nothing tells objects apart."""
    if labels is None:
        return []
    return [
        ExportedObject(labels == label_id, int(label_id))
        for label_id in np.unique(labels[labels > 0])
    ]


def _noted(path: Path) -> str:
    """A path as the manifest has it."""
    return utf8_text(path.as_posix(), path)


def _objects_note(has_objects: bool) -> dict[str, str]:
    return {} if has_objects else {"objects": "categories of the label maps"}


def _renamed(item: ExportedObject, label_ids: LabelMap) -> ExportedObject:
    return ExportedObject(item.mask, int(label_ids[item.category]), item.score)


def _places_by_image(
    samples: SampleStore, categories: Sequence[str], masks_dir: Path
) -> dict[str, list[int]]:
    """The samples of each image, by the image's key.

    Raises:
        PipelineError: one is of another category than its label id in the params says.
    """
    places: dict[str, list[int]] = {}
    for place, key in enumerate(samples.keys):
        described = samples.json(place)
        label_id, name = described["label_id"], described["category"]
        if label_id and categories[label_id - 1 : label_id] != [name]:
            raise PipelineError(
                f"{masks_dir}: sample {key} is of {name!r} as label id {label_id}, which is not "
                "so in the categories of the params; run `pipeline retrieve` and `mask` again"
            )
        places.setdefault(described["key"], []).append(place)
    return places


def _settings(samples: SampleStore) -> dict[str, Any]:
    """What the manifest of shards says besides the shards."""
    return {
        name: value for name, value in samples.manifest.items() if name not in ("shards", "samples")
    }
