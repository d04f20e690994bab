"""Mask AP against hand-made numbers; run-length codes against pycocotools."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, dataclass

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.metrics.instance import (
    MaskAP,
    encode_mask,
    mask_area,
    mask_box_xywh,
)

SIZE = (40, 60)


@dataclass
class Item:
    label_id: int
    mask: np.ndarray
    score: float = 1.0


def block(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def score(targets: list[Item], predictions: list[Item], void: np.ndarray | None = None):
    scorer = MaskAP(["cat", "dog"])
    scorer.add("a", size=SIZE, targets=targets, predictions=predictions, void=void)
    return scorer.compute()


def test_codes_survive_json_and_give_area_and_box() -> None:
    mask = block(3, 5, 10, 20)
    mask[4, 6] = False
    rle = json.loads(json.dumps(encode_mask(mask)))
    assert rle["size"] == [40, 60]
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)
    assert mask_area(rle) == 199
    assert mask_box_xywh(rle) == [5.0, 3.0, 20.0, 10.0]
    assert mask_area(encode_mask(np.zeros((2, 3), bool))) == 0


def test_perfect_predictions_score_one(capsys: pytest.CaptureFixture[str]) -> None:
    items = [Item(1, block(0, 0, 9, 9)), Item(1, block(20, 0, 9, 9)), Item(2, block(0, 30, 1, 1))]
    assert astuple(score(items, items)) == pytest.approx([1] * 6)
    assert capsys.readouterr().out == ""


def test_overlap_decides_the_thresholds_that_count() -> None:
    # 8 of 10 rows: IoU 0.8, right at the thresholds 0.50 to 0.80, 7 of 10.
    result = score([Item(1, block(0, 0, 10, 10))], [Item(1, block(0, 0, 8, 10))])
    assert result.ap == pytest.approx(0.7)
    assert (result.ap50, result.ap75) == pytest.approx((1, 1))
    # 6 of 10 rows: IoU 0.6, below 0.75.
    result = score([Item(1, block(0, 0, 10, 10))], [Item(1, block(0, 0, 6, 10))])
    assert (result.ap50, result.ap75) == pytest.approx((1, 0))


def test_a_wrong_category_counts_only_where_categories_do() -> None:
    result = score([Item(1, block(0, 0, 9, 9))], [Item(2, block(0, 0, 9, 9))])
    assert (result.ap, result.ap_agnostic) == pytest.approx((0, 1))


def test_a_better_scored_false_object_halves_precision() -> None:
    target = Item(1, block(0, 0, 9, 9))
    false = Item(1, block(20, 20, 9, 9), score=0.9)
    assert score([target], [Item(1, target.mask, 0.5), false]).ap50 == pytest.approx(0.5)
    assert score([target], [Item(1, target.mask, 0.95), false]).ap50 == pytest.approx(1.0)


def test_a_second_prediction_of_one_object_is_false() -> None:
    first, second = Item(1, block(0, 0, 9, 9)), Item(1, block(20, 20, 9, 9))
    predictions = [
        Item(1, first.mask, 0.9),
        Item(1, first.mask, 0.8),
        Item(1, second.mask, 0.7),
    ]
    # Precision 1 up to recall 0.5 (51 of 101 points), then 2/3.
    assert score([first, second], predictions).ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_missed_objects_and_absent_categories() -> None:
    target = Item(1, block(0, 0, 9, 9))
    assert score([target], []).ap == 0
    # Dogs do not occur: a false dog spoils only the class-agnostic score.
    result = score([target], [Item(1, target.mask, 0.5), Item(2, block(20, 20, 9, 9), 0.9)])
    assert (result.ap50, result.ap50_agnostic) == pytest.approx((1, 0.5))


@pytest.mark.parametrize("predictions", [[], [Item(1, block(0, 0, 3, 3))]])
def test_without_a_true_object_there_is_no_score(predictions: list[Item]) -> None:
    assert all(math.isnan(value) for value in astuple(score([], predictions)))


def test_without_an_image_there_is_no_score() -> None:
    assert math.isnan(MaskAP(["cat"]).compute().ap)


def test_void_is_cut_out_of_both_sides() -> None:
    target = Item(1, block(0, 0, 10, 10))
    wide = Item(1, block(0, 0, 10, 20), 0.5)
    ghost = Item(1, block(0, 10, 10, 10), 0.9)
    assert score([target], [wide]).ap50 == pytest.approx(1)
    assert score([target], [wide]).ap75 == 0
    result = score([target], [wide, ghost], void=block(0, 10, 10, 10))
    assert result.ap == pytest.approx(1)
    everything = np.ones(SIZE, dtype=bool)
    assert math.isnan(score([target], [wide], void=everything).ap)


def test_images_are_scored_apart_by_name() -> None:
    scorer = MaskAP(["cat"])
    item = Item(1, block(0, 0, 9, 9))
    small = Item(1, np.ones((3, 2), dtype=bool))
    scorer.add("found", size=SIZE, targets=[item], predictions=[item])
    scorer.add("missed", size=(3, 2), targets=[small], predictions=[])
    assert scorer.compute(["found"]).ap == pytest.approx(1)
    assert scorer.compute(["missed"]).ap == 0
    # Recall 1/2 at precision 1: 51 of 101 recall points.
    assert scorer.compute().ap == pytest.approx(51 / 101)
    assert math.isnan(scorer.compute([]).ap)
    assert scorer.compute(["found"]).ap == pytest.approx(1)


def test_what_cannot_be_right_is_refused() -> None:
    scorer = MaskAP(["cat"])
    scorer.add("a", size=SIZE, targets=[], predictions=[])
    with pytest.raises(ValueError, match="'a' was added before"):
        scorer.add("a", size=SIZE, targets=[], predictions=[])
    with pytest.raises(ValueError, match="label id 2: expected 1 to 1"):
        scorer.add("b", size=SIZE, targets=[Item(2, block(0, 0, 1, 1))], predictions=[])
    with pytest.raises(ValueError, match="expected"):
        scorer.add("c", size=(4, 4), targets=[Item(1, block(0, 0, 1, 1))], predictions=[])
