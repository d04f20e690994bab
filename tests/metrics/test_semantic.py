"""Scores of semantic masks against hand-made numbers and the published implementation's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.metrics.semantic import ConfusionMatrix

REFERENCE = Path(__file__).parents[1] / "reference" / "data"


def test_agrees_with_the_published_scores() -> None:
    tensors = load_file(REFERENCE / "running_score.io.safetensors")
    expected = json.loads((REFERENCE / "running_score.json").read_text())
    matrix = ConfusionMatrix(expected["n_classes"])
    for index, step in enumerate(expected["cumulative_scores_after_each_update"]):
        matrix.update(target=tensors[f"labels.{index}"], prediction=tensors[f"preds.{index}"])
        np.testing.assert_array_equal(matrix.counts, tensors[f"confusion.{index}"])
        scores = matrix.compute()
        published = step["scores"]
        assert scores.pixel_acc == pytest.approx(published["Pixel Acc"], abs=1e-12)
        assert scores.mean_acc == pytest.approx(published["Mean Acc"], abs=1e-12)
        assert scores.freq_weighted_iou == pytest.approx(published["FreqW Acc"], abs=1e-12)
        assert scores.miou == pytest.approx(published["Mean IoU"], abs=1e-12)
        for class_index, iou in step["class_iou"].items():
            found = scores.iou[int(class_index)]
            assert math.isnan(found) if iou is None else found == pytest.approx(iou, abs=1e-12)


def test_hand_made_scores() -> None:
    matrix = ConfusionMatrix(4)
    target = np.array([[0, 0, 0, 1], [1, 1, -1, 255]])
    prediction = np.array([[0, 0, 2, 1], [1, 0, 3, 3]])
    matrix.update(target=target, prediction=prediction)
    scores = matrix.compute()
    # Class 0: 2 of 4, class 1: 2 of 3, class 2: predicted only, class 3: on void only.
    np.testing.assert_allclose(scores.iou, [2 / 4, 2 / 3, 0, np.nan])
    assert scores.miou == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert scores.pixel_acc == pytest.approx(4 / 6)
    assert scores.mean_acc == pytest.approx(2 / 3)
    assert scores.freq_weighted_iou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_one_matrix_over_all_images_is_no_mean_over_images() -> None:
    whole = ConfusionMatrix(2)
    for target, prediction in (([1, 1, 1, 0], [1, 1, 1, 0]), ([1, 0, 0, 0], [0, 0, 0, 0])):
        part = ConfusionMatrix(2)
        part.update(target=np.array(target), prediction=np.array(prediction))
        whole.merge(part)
    assert whole.compute().miou == pytest.approx((3 / 4 + 4 / 5) / 2)


@pytest.mark.parametrize("target", [np.empty((0, 3), int), np.full((2, 2), -1)])
def test_nothing_to_score_is_nan(target: np.ndarray) -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(target=target, prediction=np.zeros_like(target))
    scores = matrix.compute()
    values = [scores.miou, scores.pixel_acc, scores.mean_acc, scores.freq_weighted_iou]
    assert np.isnan([*values, *scores.iou]).all()


def test_what_cannot_be_right_is_refused() -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="differ"):
        matrix.update(target=np.zeros((2, 3), int), prediction=np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        matrix.update(target=np.array([0]), prediction=np.array([2]))
    assert matrix.counts.sum() == 0
