"""Predictions on disk: WebDataset shards with one sample an image, in the order of the benchmark.

label.png                label ids (H, W)
baseline.png             label ids of a dense labeller; only where a baseline is asked for
instances.json           COCO results: image_id, category_id (label id), segmentation (RLE), score;
                         only where instances are asked for
baseline_instances.json  those of the dense labeller; only where it has any beside a network's
json                     image_id and the image's number in the benchmark, the sample key as well

An image that cannot be read has no sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.images import decode_label, encode_label
from pipeline.formats.labels import LabelMap
from pipeline.formats.rle import RleObject
from pipeline.formats.shards import StoredSample, open_samples, write_tar

SHARD_SIZE = 100  # what a killed evaluation loses at most
KEY_DIGITS = 8
HEADER_END = b"\n"
LABEL, BASELINE = "label.png", "baseline.png"
INSTANCES, BASELINE_INSTANCES = "instances.json", "baseline_instances.json"


@dataclass(frozen=True)
class Instance:
    """One predicted object.

    Attributes:
        label_id: 1 or more.
        score: in [0, 1], after suppression.
        crop: (y1 - y0 + 1, x1 - x0 + 1) boolean, its mask within the box.
        bbox_xyxy: x0, y0, x1, y1 of the outermost mask pixels, both ends inclusive.
        size: (H, W) of the image.
        embedding: (C,) unit mean of the network's features inside, by which objects of two images
            are compared; None where there is none. It is not stored.
    """

    label_id: int
    score: float
    crop: NDArray[np.bool_]
    bbox_xyxy: tuple[int, int, int, int]
    size: tuple[int, int]
    embedding: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) boolean, not empty; made anew at each call."""
        mask = np.zeros(self.size, dtype=bool)
        x0, y0, x1, y1 = self.bbox_xyxy
        mask[y0 : y1 + 1, x0 : x1 + 1] = self.crop
        return mask


class Segmentation(NamedTuple):
    """What a network says of one image, at the image's size.

    Attributes:
        semantic: (H, W) int16 label ids, 0 is background.
        instances: objects by falling score.
    """

    semantic: LabelMap
    instances: list[Instance]


@dataclass(frozen=True)
class StoredPrediction:
    """The prediction of one image, at its own size.

    Attributes:
        image_id: of its example.
        labels: (H, W) label ids, 0 is background.
        baseline: those of a dense labeller, or None.
        objects: by falling score, or None where there was no need for them.
        baseline_objects: those of the dense labeller, or None.
    """

    image_id: str
    labels: LabelMap
    baseline: LabelMap | None = None
    objects: Sequence[RleObject] | None = None
    baseline_objects: Sequence[RleObject] | None = None


def encode_prediction(prediction: StoredPrediction, num_categories: int) -> bytes:
    """A prediction as bytes, whichever image it is of; the same one gives the same bytes.

    Args:
        prediction: of any image.
        num_categories: K, the largest label id.
    """
    members = {LABEL: encode_label(np.asarray(prediction.labels), num_categories)}
    if prediction.baseline is not None:
        members[BASELINE] = encode_label(np.asarray(prediction.baseline), num_categories)
    if prediction.objects is not None:
        members[INSTANCES] = _encode_objects(prediction.objects)
    if prediction.baseline_objects is not None:
        members[BASELINE_INSTANCES] = _encode_objects(prediction.baseline_objects)
    header = json.dumps({name: len(data) for name, data in members.items()}).encode()
    return b"".join([header, HEADER_END, *members.values()])


def write_encoded(path: Path, predictions: Iterable[tuple[int, str, bytes]]) -> int:
    """Write a shard of predictions as they come.

    Args:
        path: the shard.
        predictions: number in the benchmark, which increases, image id, and the bytes of
            `encode_prediction`.

    Returns:
        How many there were.
    """
    return write_tar(path, (_to_sample(*prediction) for prediction in predictions))


class PredictionStore:
    """Random access to the predictions of a folder; only the samples' places are in memory."""

    def __init__(self, shard_dir: Path) -> None:
        """Check the shards.

        Raises:
            PipelineError: a shard is missing, changed or cut off, or holds no predictions.
        """
        self._dir = shard_dir
        self._samples = open_samples(shard_dir, members=[LABEL, "json"])
        self._places = {key: place for place, key in enumerate(self._samples.keys)}

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of the manifest, see `pipeline.stages.predict_bench`."""
        return self._samples.manifest

    def __len__(self) -> int:
        return len(self._places)

    def get(self, number: int, image_id: str) -> StoredPrediction | None:
        """The prediction of the image with this number in the benchmark, None if it has none.

        Raises:
            PipelineError: it is that of another image.
        """
        place = self._places.get(_key(number))
        if place is None:
            return None
        prediction = prediction_of(self._samples[place])
        if prediction.image_id != image_id:
            raise PipelineError(
                f"{self._dir}: prediction {number} is of image {prediction.image_id}, but the "
                f"benchmark has {image_id} there; run `pipeline predict_bench` again"
            )
        return prediction

    def pair(self, examples: Iterable[Any]) -> Iterator[tuple[Any, StoredPrediction]]:
        """The examples of a benchmark that have a prediction, each with it."""
        for number, example in enumerate(examples):
            prediction = self.get(number, example.image_id)
            if prediction is not None:
                yield example, prediction


def _encode_objects(objects: Iterable[RleObject]) -> bytes:
    results = [
        {"category_id": item.label_id, "segmentation": item.rle, "score": item.score}
        for item in objects
    ]
    return json.dumps(results, separators=(",", ":")).encode()


def _decode_objects(sample: StoredSample, member: str) -> list[RleObject] | None:
    if member not in sample:
        return None
    return [
        RleObject(entry["category_id"], entry["segmentation"], entry["score"])
        for entry in json.loads(sample[member])
    ]


def _key(number: int) -> str:
    return f"{number:0{KEY_DIGITS}d}"


def _to_sample(number: int, image_id: str, encoded: bytes) -> StoredSample:
    header, _, content = encoded.partition(HEADER_END)
    sample: StoredSample = {
        "__key__": _key(number),
        "json": {"image_id": image_id, "number": number},
    }
    start = 0
    for name, length in json.loads(header).items():
        sample[name] = content[start : start + length]
        start += length
    for name in {INSTANCES, BASELINE_INSTANCES} & sample.keys():
        objects = [{"image_id": image_id, **entry} for entry in json.loads(sample[name])]
        sample[name] = json.dumps(objects, separators=(",", ":")).encode()
    return sample


def prediction_of(sample: StoredSample) -> StoredPrediction:
    """The prediction that a sample of a shard holds."""
    return StoredPrediction(
        image_id=json.loads(sample["json"])["image_id"],
        labels=decode_label(sample[LABEL]),
        baseline=decode_label(sample[BASELINE]) if BASELINE in sample else None,
        objects=_decode_objects(sample, INSTANCES),
        baseline_objects=_decode_objects(sample, BASELINE_INSTANCES),
    )
