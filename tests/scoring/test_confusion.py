"""Scores of semantic masks against hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.scoring.confusion import ConfusionMatrix, SizeIou, harmonic_mean, shares, worst_pairs


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
    values = [scores.miou, scores.pixel_acc, scores.mean_acc]
    assert np.isnan([*values, *scores.iou]).all()


def test_what_cannot_be_right_is_refused() -> None:
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="differ"):
        matrix.update(target=np.zeros((2, 3), int), prediction=np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        matrix.update(target=np.array([0]), prediction=np.array([2]))
    assert matrix.counts.sum() == 0


def test_sizes_take_their_classes_and_the_background() -> None:
    # Of 100 pixels class 1 has 5 (s), class 2 has 25 (ms), class 3 has 26 (ml), the rest is 0.
    target = np.repeat([0, 1, 2, 3], [44, 5, 25, 26])
    prediction = target.copy()
    prediction[:4] = 1  # background painted over as class 1
    prediction[44] = 3  # one pixel of class 1 taken for class 3
    prediction[-13:] = 2  # half of class 3 taken for class 2
    scorer = SizeIou(4)
    scorer.update(target=target, prediction=prediction)
    scores = scorer.compute()
    # Small: class 1 has 4 of 5 + 4 predicted, background 40 of 44; class 3 is not in the target.
    assert scores["s"] == pytest.approx((4 / 9 + 40 / 44) / 2)
    # Class 2 is right; what was painted over class 3 belongs to another size.
    assert scores["ms"] == pytest.approx((1 + 40 / 44) / 2)
    assert scores["ml"] == pytest.approx((13 / 26 + 40 / 44) / 2)
    assert math.isnan(scores["l"])


def test_a_size_is_a_share_of_the_scored_pixels_and_void_is_none() -> None:
    # Of 20 scored pixels class 1 has 10 (ml), class 2 one (s); of all 100 both would be small.
    target = np.repeat([-1, 0, 1, 2], [80, 9, 10, 1])
    prediction = np.repeat([2, 0, 1, 1], [80, 9, 10, 1])
    scorer, other = SizeIou(3), SizeIou(3)
    other.update(target=target, prediction=prediction)
    scorer.merge(other)
    scores = scorer.compute()
    assert (scores["ml"], scores["s"]) == (1, 0.5)
    assert math.isnan(scores["ms"])
    one_more = np.repeat([-1, 0, 1, 2], [80, 8, 11, 1])
    scorer = SizeIou(3)
    scorer.update(target=one_more, prediction=prediction)
    assert scorer.compute()["l"] == pytest.approx((10 / 11 + 8 / 9) / 2)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(0.0, 0.9) == 0
    assert math.isnan(harmonic_mean(math.nan, 0.5))


def test_a_part_of_the_classes_is_scored_by_its_own_true_pixels() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(
        target=np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]),
        prediction=np.array([0, 0, 1, 1, 2, 2, 2, 2, 0]),
    )
    part = matrix.compute({1, 2})
    # IoU 1/3 and 3/5, recall 1/2 and 3/4; 4 of 6 pixels of these classes.
    assert part.miou == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert part.mean_acc == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert part.pixel_acc == pytest.approx(4 / 6)
    assert matrix.compute({0, 1, 2}).pixel_acc == matrix.compute().pixel_acc == 6 / 9
    assert math.isnan(matrix.compute([]).pixel_acc)


def test_pairs_are_ordered_by_their_share_of_the_true_class() -> None:
    counts = np.array([[90, 10, 0, 0], [1, 1, 0, 0], [30, 0, 30, 0], [0, 0, 0, 0]])
    # Of equal shares, that of more pixels first.
    assert worst_pairs(counts) == [(2, 0, 0.5), (1, 0, 0.5), (0, 1, 0.1)]
    assert worst_pairs(counts, 1) == [(2, 0, 0.5)]
    assert worst_pairs(np.diag([3, 0])) == []
    assert shares(counts)[0].tolist() == [0.9, 0.1, 0, 0]
    assert np.isnan(shares(counts)[3]).all()
