"""Scores of tiny benchmarks, worked out by hand."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.benchmarks import InstanceTarget
from pipeline.errors import PipelineError
from pipeline.formats.predictions import PredictionStore, StoredPrediction
from pipeline.formats.rle import RleObject, encode_mask
from pipeline.scoring.board import ScoreBoard
from pipeline.scoring.task import ScoringTask
from tests.formats.shard_folders import write_predictions

TWO = ScoringTask(["cat", "dog"])


@dataclass
class TinyExample:
    """One labelled image in memory; see `Example`."""

    image_id: str
    labels: np.ndarray
    objects: list[InstanceTarget] = field(default_factory=list)
    image_path: Path = Path("tiny.jpg")
    vocabulary: None = None

    def semantic(self) -> np.ndarray:
        return self.labels

    def instances(self) -> list[InstanceTarget]:
        return self.objects

    def void(self) -> np.ndarray:
        return self.labels == -1


Pair = tuple[TinyExample, StoredPrediction]


def pair(target: object, prediction: object, baseline: object = None, image_id: str = "a") -> Pair:
    """Label maps only, given as rows of label ids."""
    truth, labels = (np.array(rows, np.int16) for rows in (target, prediction))
    below = None if baseline is None else np.array(baseline, np.int16)
    return TinyExample(image_id, truth), StoredPrediction(image_id, labels, below)


def score(
    pairs: Iterable[Pair],
    task: ScoringTask = TWO,
    metrics: tuple[str, ...] = ("semantic",),
    groups: dict[str, set[str]] | None = None,
) -> dict:
    board = ScoreBoard(task, metrics=metrics, groups=groups or {})
    for example, prediction in pairs:
        board.add(example, prediction)
    return board.compute()


def block(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((20, 20), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def thing(mask: np.ndarray, label_id: int = 1, score: float = 1.0) -> RleObject:
    return RleObject(label_id, encode_mask(mask), score)


def object_pair(
    targets: list[InstanceTarget],
    predictions: list[RleObject],
    void: np.ndarray | None = None,
    image_id: str = "a",
) -> Pair:
    """Objects in an image of 20 x 20."""
    labels = np.zeros((20, 20), np.int16)
    if void is not None:
        labels[void] = -1
    prediction = StoredPrediction(image_id, np.zeros((20, 20), np.int16), objects=predictions)
    return TinyExample(image_id, labels, targets), prediction


def test_background_and_void() -> None:
    metrics = score([pair([[0, 0, 1, 1, 2, -1]], [[0, 1, 1, 1, 0, 2]], [[0, 0, 0, 0, 2, 2]])])
    # IoU 1/3, 2/3, 0; void is left out. Baseline: 2/4, 0, 1.
    assert metrics["miou"] == pytest.approx(100 / 3, abs=0.01)
    assert metrics["pixel_acc"] == 60
    assert metrics["mean_acc"] == 50
    assert metrics["baseline_miou"] == 50
    assert metrics["n_images"] == 1
    assert "iou" not in metrics
    assert "groups" not in metrics


def test_without_background_its_pixels_are_void() -> None:
    task = ScoringTask(["cat", "dog"], background=False)
    metrics = score([pair([[0, 0, 1, 1, 2, -1]], [[1, 2, 1, 2, 2, 2]])], task)
    # Cat 1 of 2, dog 1 of 2.
    assert (metrics["miou"], metrics["pixel_acc"], metrics["mean_acc"]) == (50, 66.67, 75)


def test_one_category_has_an_iou_of_its_own() -> None:
    metrics = score([pair([[0, 1, 1, 1]], [[1, 1, 1, 0]], [[1, 1, 1, 1]])], ScoringTask(["bird"]))
    assert (metrics["iou"], metrics["baseline_iou"]) == (50, 75)


@pytest.mark.parametrize("background", [True, False])
def test_seen_and_unseen(background: bool) -> None:
    task = ScoringTask(["cat", "dog", "cow"], background=background, unseen=frozenset({2}))
    metrics = score([pair([[0, 0, 1, 1, 2, 2, 2, 2]], [[0, 0, 1, 2, 2, 2, 2, 1]])], task)
    # Cat 1 of 3, dog 3 of 5, background right; cows do not occur.
    seen = (1 + 1 / 3) / 2 if background else 1 / 3
    assert metrics["miou_seen"] == pytest.approx(100 * seen, abs=0.01)
    assert metrics["miou_unseen"] == 60
    harmonic = 2 * seen * 0.6 / (seen + 0.6)
    assert metrics["hiou"] == pytest.approx(100 * harmonic, abs=0.01)


@pytest.mark.parametrize("background", [True, False])
def test_accuracy_of_seen_and_unseen(background: bool) -> None:
    task = ScoringTask(["cat", "dog", "cow"], background=background, unseen=frozenset({2, 3}))
    labels = [[0, 0, 0, 0, 1, 2, 2, 2, -1]], [[0, 0, 0, 1, 2, 2, 2, 3, 1]]
    metrics = score([pair(*labels)], task)
    # Background 3 of 4, cat 0 of 1, dog 2 of 3; cows do not occur, though one is predicted.
    assert metrics["pixel_acc_seen"] == (60 if background else 0)
    assert metrics["mean_acc_seen"] == (37.5 if background else 0)
    assert (metrics["pixel_acc_unseen"], metrics["mean_acc_unseen"]) == (66.67, 66.67)
    whole = score([pair(*labels)], ScoringTask(task.categories, background=background))
    assert not [name for name in whole if name.endswith("seen")]
    assert {name: metrics[name] for name in whole} == whole


def test_sizes_stand_beside_the_whole() -> None:
    target = np.repeat([[0, 1, 2]], [70, 5, 25], axis=1)
    metrics = score([pair(target, target)], metrics=("semantic", "size"))
    assert (metrics["miou_s"], metrics["miou_ms"], metrics["miou"]) == (100, 100, 100)
    assert math.isnan(metrics["miou_ml"])
    assert math.isnan(metrics["miou_l"])


def test_groups_sum_their_own_images() -> None:
    pairs = [
        pair([[0, 1]], [[0, 1]], image_id="a"),
        pair([[0, 1]], [[0, 0]], image_id="b"),
        pair([[0, 1]], [[1, 1]], image_id="c"),
    ]
    metrics = score(pairs, groups={"good": {"a"}, "bad": {"b", "c"}, "none": set()})
    # All: background 2 of 4, cat 2 of 4; b and c: 1 of 3 each.
    assert metrics["miou"] == 50
    assert metrics["groups"]["good"] == {"miou": 100, "n_images": 1}
    assert metrics["groups"]["bad"] == {"miou": 33.33, "n_images": 2}
    assert math.isnan(metrics["groups"]["none"]["miou"])
    assert metrics["groups"]["none"]["n_images"] == 0


def test_only_images_with_objects_are_ranked() -> None:
    board = ScoreBoard(TWO, metrics=["semantic"], groups={})
    board.add(*pair([[0, 0]], [[0, 0]], image_id="empty"))
    board.add(*pair([[0, 1]], [[0, 0]], image_id="shown"))
    assert board.image_miou == {"shown": 0.25}
    np.testing.assert_allclose(board.per_class()["iou"], [3 / 4, 0, np.nan])


def test_objects_with_and_without_categories() -> None:
    targets = [InstanceTarget(1, block(0, 0, 4, 4)), InstanceTarget(2, block(10, 10, 4, 4))]
    predictions = [thing(block(0, 0, 4, 4)), thing(block(10, 10, 4, 4), 1, 0.5)]
    metrics = score([object_pair(targets, predictions)], metrics=("instance",))
    assert (metrics["ap"], metrics["ap50"], metrics["ap_s"], metrics["ar1"]) == (50, 50, 50, 50)
    assert (metrics["ap_agnostic"], metrics["ar1_agnostic"]) == (100, 50)
    assert metrics["ar100_agnostic"] == 100
    assert math.isnan(metrics["ap_l"])


def test_objects_of_seen_and_unseen_categories() -> None:
    task = ScoringTask(["cat", "dog"], unseen=frozenset({2}))
    targets = [InstanceTarget(1, block(0, 0, 4, 4)), InstanceTarget(2, block(10, 10, 4, 5))]
    # Dog: 4 x 4 of 4 x 5, IoU 0.8: right at 7 of 10 thresholds.
    predictions = [thing(block(0, 0, 4, 4)), thing(block(10, 10, 4, 4), 2)]
    metrics = score([object_pair(targets, predictions)], task, ("instance",))
    assert (metrics["ap_seen"], metrics["ap_unseen"]) == (100, 70)
    assert (metrics["ap50_unseen"], metrics["ap75_unseen"]) == (100, 100)
    assert metrics["ap"] == 85


def test_objects_of_a_baseline_stand_beside_those_of_the_network() -> None:
    task = ScoringTask(["cat", "dog"], unseen=frozenset({2}))
    targets = [InstanceTarget(1, block(0, 0, 4, 4)), InstanceTarget(2, block(10, 10, 4, 5))]
    void = block(0, 16, 20, 4)
    example, found = object_pair(targets, [thing(block(0, 0, 4, 4))], void=void)
    # The dog: 4 x 4 of 4 x 5, IoU 0.8, named so once and once a cat with a better score; void
    # alone; void at the edge.
    below = [
        thing(block(10, 10, 4, 4), 1, 0.9),
        thing(block(10, 10, 4, 4), 2, 0.8),
        thing(block(0, 0, 4, 4), 1, 0.5),
        thing(block(2, 17, 2, 2), 1, 1.0),
    ]
    both = replace(found, baseline_objects=below)
    metrics = score([(example, both)], task, ("instance",))
    assert (metrics["ap"], metrics["ap_seen"], metrics["ap_unseen"]) == (50, 100, 0)
    assert (metrics["baseline_ap_seen"], metrics["baseline_ap_unseen"]) == (50, 70)
    assert (metrics["baseline_ap"], metrics["baseline_ap75"]) == (60, 75)
    # Agnostic: right, wrong, right up to IoU 0.8; at more, wrong, wrong, right.
    upto, beyond = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    expected = 100 * (0.7 * upto + 0.3 * beyond)
    assert metrics["baseline_ap_agnostic"] == pytest.approx(expected, abs=0.01)
    alone = score([(example, found)], task, ("instance",))
    rest = {name: value for name, value in metrics.items() if not name.startswith("baseline")}
    np.testing.assert_equal(alone, rest)
    nothing = score([(example, replace(found, baseline_objects=[]))], task, ("instance",))
    assert nothing["baseline_ap"] == nothing["baseline_ap_agnostic"] == 0


def test_a_crowd_is_neither_missed_nor_wrong() -> None:
    cat = InstanceTarget(1, block(0, 0, 4, 4))
    crowd = InstanceTarget(1, block(10, 0, 10, 20), crowd=True)
    predictions = [thing(block(0, 0, 4, 4), 1, 0.5), thing(block(12, 2, 4, 4), 1, 0.9)]
    assert score([object_pair([cat, crowd], predictions)], metrics=("instance",))["ap"] == 100
    assert score([object_pair([cat], predictions)], metrics=("instance",))["ap"] == 50


def test_void_is_cut_out_of_true_and_predicted_objects() -> None:
    right = block(0, 10, 20, 10)
    targets = [InstanceTarget(1, block(0, 0, 10, 10)), InstanceTarget(1, block(0, 12, 4, 4))]
    # 10 x 10 and 10 x 10 void pixels; an object in void alone; the second target is void.
    predictions = [thing(block(0, 0, 10, 20), 1, 0.5), thing(block(2, 11, 5, 5), 1, 0.9)]
    metrics = score([object_pair(targets, predictions, void=right)], metrics=("instance",))
    assert (metrics["ap"], metrics["ap_agnostic"]) == (100, 100)
    everything = block(0, 0, 20, 20)
    metrics = score([object_pair(targets, predictions, void=everything)], metrics=("instance",))
    assert math.isnan(metrics["ap"])


def test_an_image_without_annotations_counts() -> None:
    cat = InstanceTarget(1, block(0, 0, 4, 4))
    found = object_pair([cat], [thing(block(0, 0, 4, 4), 1, 0.5)])
    false = object_pair([], [thing(block(0, 0, 4, 4), 1, 0.9)], image_id="b")
    nothing = object_pair([], [], image_id="c")
    metrics = score([found, nothing], metrics=("instance", "semantic"))
    assert (metrics["ap"], metrics["n_images"], metrics["miou"]) == (100, 2, 100)
    assert score([found, false], metrics=("instance",))["ap"] == 50


@pytest.mark.parametrize("metric", ["semantic", "instance", "size"])
def test_masks_of_another_size_are_refused(metric: str) -> None:
    example, _ = object_pair([InstanceTarget(1, block(0, 0, 4, 4))], [])
    prediction = StoredPrediction("a", np.zeros((20, 21), np.int16), objects=[])
    with pytest.raises(PipelineError, match=r"tiny\.jpg: 21x20 pixels, but its masks have 20x20"):
        score([(example, prediction)], metrics=(metric,))


def random_pair(seed: int, side: int) -> Pair:
    generator = np.random.default_rng(seed)
    target, labels, baseline = generator.integers(0, 3, (3, side, side), dtype=np.int16)
    target[:, 0] = -1
    objects = [InstanceTarget(label_id, target == label_id) for label_id in (1, 2)]
    predictions = [
        thing(labels == label_id, label_id, float(generator.random())) for label_id in (1, 2)
    ]
    name = f"im{seed}"
    return (
        TinyExample(name, target, objects),
        StoredPrediction(name, labels, baseline, predictions),
    )


def test_scores_from_disk_are_those_from_memory(tmp_path: Path) -> None:
    pairs = [random_pair(seed, 12) for seed in range(6)]
    metrics, groups = ("semantic", "instance", "size"), {"few": {"im1", "im4"}}
    in_memory = score(pairs, metrics=metrics, groups=groups)
    numbered = enumerate(prediction for _, prediction in pairs)
    write_predictions(tmp_path / "out", numbered)
    store = PredictionStore(tmp_path / "out")
    streamed = score(store.pair([example for example, _ in pairs]), metrics=metrics, groups=groups)
    np.testing.assert_equal(streamed, in_memory)
    assert len(in_memory) > 20


def test_memory_does_not_grow_by_the_images_masks() -> None:
    side = 150

    def peak(count: int) -> int:
        tracemalloc.start()
        score((random_pair(seed, side) for seed in range(count)), metrics=("semantic", "instance"))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # what is allocated once and kept
    few, many = peak(4), peak(16)
    # A single label map of the 12 more images takes 90,000 bytes.
    assert many - few < side * side * 4
