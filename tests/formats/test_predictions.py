"""Prediction shards: what goes in comes out, in the same bytes, and only for its own image."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.formats.predictions import PredictionStore, StoredPrediction
from pipeline.formats.rle import RleObject, encode_mask
from pipeline.formats.shards import read_manifest
from tests.formats.shard_folders import read_shards, write_predictions

LABELS = np.array([[0, 1, 2], [2, 2, 0]], np.int16)
OBJECTS = [
    RleObject(2, encode_mask(LABELS == 2), 0.123456789012345),
    RleObject(1, encode_mask(LABELS == 1), 0.1),
]
FULL = StoredPrediction(
    "001.Albatross_0046", LABELS, LABELS[::-1].copy(), OBJECTS, baseline_objects=OBJECTS[1:]
)
BARE = StoredPrediction("b", np.array([[1]], np.int16))


@dataclass
class Named:
    image_id: str


def write(folder: Path, items: Iterable[tuple[int, StoredPrediction]], num: int = 2) -> None:
    write_predictions(folder, items, num_categories=num, settings={"protocol": ["step: 7"]})


def test_predictions_come_back(tmp_path: Path) -> None:
    write(tmp_path / "out", [(0, FULL)])
    found = PredictionStore(tmp_path / "out").get(0, FULL.image_id)
    assert found is not None
    np.testing.assert_array_equal(found.labels, FULL.labels)
    np.testing.assert_array_equal(found.baseline, FULL.baseline)
    assert found.objects == FULL.objects
    assert found.baseline_objects == FULL.baseline_objects
    assert read_manifest(tmp_path / "out")["protocol"] == ["step: 7"]


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "out", [(3, BARE)])
    store = PredictionStore(tmp_path / "out")
    found = store.get(3, "b")
    assert found is not None
    assert found.baseline is None
    assert found.objects is None
    assert found.baseline_objects is None
    assert store.get(2, "b") is None
    assert len(store) == 1


def test_no_object_is_not_the_same_as_no_need_for_them(tmp_path: Path) -> None:
    write(tmp_path / "out", [(0, StoredPrediction("b", BARE.labels, objects=[]))])
    found = PredictionStore(tmp_path / "out").get(0, "b")
    assert found is not None
    assert found.objects == []


def test_examples_are_paired_with_their_own_prediction(tmp_path: Path) -> None:
    write(tmp_path / "out", [(0, FULL), (2, BARE)])
    store = PredictionStore(tmp_path / "out")
    examples = [Named(FULL.image_id), Named("unreadable"), Named("b")]
    pairs = [(example.image_id, found.image_id) for example, found in store.pair(examples)]
    assert pairs == [(FULL.image_id, FULL.image_id), ("b", "b")]
    with pytest.raises(PipelineError, match="prediction 2 is of image b, but the benchmark has c"):
        list(store.pair([examples[0], examples[1], Named("c")]))


def test_objects_are_cocos_results(tmp_path: Path) -> None:
    write(tmp_path / "out", [(0, FULL)])
    sample = next(read_shards(tmp_path / "out"))
    result = {
        "image_id": FULL.image_id,
        "category_id": 2,
        "segmentation": encode_mask(LABELS == 2),
        "score": 0.123456789012345,
    }
    assert json.loads(sample["instances.json"])[0] == result
    assert json.loads(sample["baseline_instances.json"]) == [
        {**result, "category_id": 1, "segmentation": encode_mask(LABELS == 1), "score": 0.1}
    ]


def test_many_categories_fit(tmp_path: Path) -> None:
    labels = np.array([[0, 255, 919]], np.int16)
    write(tmp_path / "out", [(0, StoredPrediction("a", labels))], num=919)
    found = PredictionStore(tmp_path / "out").get(0, "a")
    assert found is not None
    np.testing.assert_array_equal(found.labels, labels)


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, [(0, FULL), (1, FULL), (2, FULL)])
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "out", [(0, FULL)])
    path = tmp_path / "out/00000.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(PipelineError, match=r"00000\.tar"):
        PredictionStore(tmp_path / "out")
