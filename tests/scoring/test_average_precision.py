"""Mask AP against hand-made numbers, and against COCOeval run on all images at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.formats.rle import RleObject, coco_annotation, encode_mask
from pipeline.scoring.average_precision import (
    MAX_PREDICTIONS,
    MaskAP,
    PrecisionRecall,
    match_objects,
)

SIZE = (40, 60)
Image = tuple[list[RleObject], list[RleObject]]


def block(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def thing(mask: np.ndarray, label_id: int = 1, score: float = 1.0, crowd: bool = False):
    return RleObject(label_id, encode_mask(mask), score, crowd)


FIRST, SECOND = block(0, 0, 9, 9), block(20, 20, 9, 9)


def score(*images: Image, by_category: bool = True, num_categories: int = 2) -> PrecisionRecall:
    scorer = MaskAP(num_categories)
    for targets, predictions in images:
        scorer.add(match_objects(targets, predictions, by_category=by_category))
    return scorer.compute()


def test_perfect_predictions_score_one(capsys: pytest.CaptureFixture[str]) -> None:
    items = [thing(FIRST), thing(SECOND), thing(block(0, 30, 1, 1), 2)]
    result = score((items, items))
    assert [result.ap(), result.ap(iou=0.5), result.ap(iou=0.75)] == pytest.approx([1, 1, 1])
    assert result.ap(area="small") == pytest.approx(1)
    assert math.isnan(result.ap(area="large"))
    # One prediction of a category finds one of two objects, and the only one.
    assert result.ar(1) == pytest.approx((1 / 2 + 1) / 2)
    assert result.ar(10) == result.ar(100) == pytest.approx(1)
    assert capsys.readouterr().out == ""


def test_overlap_decides_the_thresholds_that_count() -> None:
    # 8 of 10 rows: IoU 0.8, right at the thresholds 0.50 to 0.80, 7 of 10.
    result = score(([thing(block(0, 0, 10, 10))], [thing(block(0, 0, 8, 10))]))
    assert [result.ap(), result.ar()] == pytest.approx([0.7, 0.7])
    assert [result.ap(iou=0.5), result.ap(iou=0.75)] == pytest.approx([1, 1])
    # 6 of 10 rows: IoU 0.6, below 0.75.
    result = score(([thing(block(0, 0, 10, 10))], [thing(block(0, 0, 6, 10))]))
    assert [result.ap(iou=0.5), result.ap(iou=0.75)] == pytest.approx([1, 0])


def test_a_wrong_category_counts_only_where_categories_do() -> None:
    image = [thing(FIRST)], [thing(FIRST, 2)]
    assert score(image).ap() == 0
    assert score(image, by_category=False, num_categories=1).ap() == pytest.approx(1)


def test_a_better_scored_false_object_halves_precision() -> None:
    false = thing(SECOND, score=0.9)
    assert score(([thing(FIRST)], [thing(FIRST, score=0.5), false])).ap() == pytest.approx(0.5)
    assert score(([thing(FIRST)], [thing(FIRST, score=0.95), false])).ap() == pytest.approx(1)


def test_a_second_prediction_of_one_object_is_false() -> None:
    predictions = [thing(FIRST, score=0.9), thing(FIRST, score=0.8), thing(SECOND, score=0.7)]
    # Precision 1 up to recall 0.5 (51 of 101 points), then 2/3.
    result = score(([thing(FIRST), thing(SECOND)], predictions))
    assert result.ap(iou=0.5) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_crowd_is_not_missed_and_spoils_nothing() -> None:
    crowd = thing(block(0, 30, 40, 30), crowd=True)
    inside = [thing(block(row, 32, 9, 9), score=0.9) for row in (0, 10, 20)]
    assert math.isnan(score(([crowd], inside)).ap())
    assert score(([thing(FIRST), crowd], [thing(FIRST, score=0.5)])).ap() == pytest.approx(1)
    found = [thing(FIRST, score=0.5), *inside]
    assert score(([thing(FIRST), crowd], found)).ap() == pytest.approx(1)
    assert score(([thing(FIRST)], found)).ap() == pytest.approx(1 / 4)


def test_missed_objects_and_absent_categories() -> None:
    assert score(([thing(FIRST)], [])).ap() == 0
    # Dogs do not occur: a false dog spoils only the class-agnostic score.
    image = [thing(FIRST)], [thing(FIRST, score=0.5), thing(SECOND, 2, score=0.9)]
    assert score(image).ap() == pytest.approx(1)
    assert score(image, by_category=False, num_categories=1).ap() == pytest.approx(0.5)


def test_categories_can_be_averaged_apart() -> None:
    result = score(([thing(FIRST), thing(SECOND, 2)], [thing(FIRST)]))
    assert result.ap() == pytest.approx(0.5)
    assert result.ap(label_ids={1}) == pytest.approx(1)
    assert result.ap(label_ids={2}) == 0
    assert math.isnan(result.ap(label_ids=[]))
    np.testing.assert_allclose(result.category_ap(), [1, 0])


@pytest.mark.parametrize("predictions", [[], [thing(FIRST)]])
def test_without_a_true_object_there_is_no_score(predictions: list[RleObject]) -> None:
    result = score(([], predictions))
    assert math.isnan(result.ap())
    assert math.isnan(result.ar())


def test_without_an_image_there_is_no_score() -> None:
    assert math.isnan(score().ap())


def test_an_area_that_is_stated_decides_the_size() -> None:
    target = RleObject(1, encode_mask(FIRST), area=40.0 * 40.0)
    result = score(([target], [thing(FIRST)]))
    assert math.isnan(result.ap(area="small"))
    assert result.ap(area="medium") == pytest.approx(1)


def test_an_object_without_a_pixel_cannot_be_found() -> None:
    empty = thing(np.zeros(SIZE, dtype=bool), score=0.5)
    assert score(([thing(FIRST), empty], [thing(FIRST), empty])).ap() == pytest.approx(51 / 101)


def test_images_may_differ_in_size() -> None:
    small = RleObject(1, encode_mask(np.ones((3, 2), dtype=bool)))
    # Recall 1/2 at precision 1: 51 of 101 recall points.
    result = score(([thing(FIRST)], [thing(FIRST)]), ([small], []))
    assert result.ap() == pytest.approx(51 / 101)
    with pytest.raises(ValueError, match=r"different sizes: \(3, 2\), \(40, 60\)"):
        match_objects([small], [thing(FIRST)])


def test_an_unknown_label_id_is_refused() -> None:
    with pytest.raises(ValueError, match="label id 3: expected 1 to 2"):
        score(([thing(FIRST, 3)], []))


def random_images(rng: np.random.Generator, count: int) -> list[Image]:
    """Objects of all area ranges, noisy copies of them and false ones; scores with many ties."""
    images: list[Image] = []
    for _ in range(count):
        size = (int(rng.integers(20, 300)), int(rng.integers(20, 300)))

        def item(mask: np.ndarray, crowd: bool = False) -> RleObject:
            label_id = int(rng.integers(1, 5))
            return RleObject(label_id, encode_mask(mask), float(rng.integers(0, 5)) / 4, crowd)

        def box(size: tuple[int, int] = size) -> np.ndarray:
            mask = np.zeros(size, dtype=bool)
            top, left = (int(rng.integers(0, side)) for side in size)
            height, width = (int(rng.integers(1, side + 1)) for side in size)
            mask[top : top + height, left : left + width] = True
            return mask

        masks = [box() for _ in range(rng.integers(0, 6))]
        targets = [item(mask, crowd=bool(rng.random() < 0.2)) for mask in masks]
        shifted = [np.roll(mask, rng.integers(-2, 3, 2), (0, 1)) for mask in masks]
        predictions = [item(mask) for mask in shifted if rng.random() < 0.8]
        # Some copies keep the category of their target.
        predictions += [RleObject(t.label_id, t.rle, 0.5) for t in targets if rng.random() < 0.3]
        predictions += [item(box()) for _ in range(rng.integers(0, 20))]
        images.append((targets, predictions))
    images[0] = (images[0][0], [])
    images[1] = ([], images[1][1])
    images[2] = ([], [])
    return images


def size_of(image: Image) -> tuple[int, ...]:
    return next((tuple(item.rle["size"]) for part in image for item in part), (1, 1))


def evaluate_at_once(images: list[Image], *, by_category: bool) -> COCOeval:
    sides = []
    for part in (0, 1):
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": number, "height": size_of(image)[0], "width": size_of(image)[1]}
                for number, image in enumerate(images, start=1)
            ],
            "annotations": [],
            "categories": [{"id": label_id} for label_id in range(1, 5)],
        }
        for image_id, image in enumerate(images, start=1):
            for item in image[part]:
                coco.dataset["annotations"].append(
                    coco_annotation(
                        item.rle,
                        annotation_id=len(coco.dataset["annotations"]) + 1,
                        image_id=image_id,
                        category_id=item.label_id,
                        score=item.score,
                        crowd=item.crowd,
                    )
                )
        coco.createIndex()
        sides.append(coco)
    evaluation = COCOeval(*sides, "segm")
    evaluation.params.useCats = int(by_category)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by_category", [True, False])
def test_image_by_image_equals_cocoeval_at_once(seed: int, by_category: bool) -> None:
    images = random_images(np.random.default_rng(seed), 25)
    expected = evaluate_at_once(images, by_category=by_category)
    result = score(*images, by_category=by_category, num_categories=4 if by_category else 1)
    ours = [result.ap(), result.ap(iou=0.5), result.ap(iou=0.75)]
    ours += [result.ap(area=area) for area in ("small", "medium", "large")]
    ours += [result.ar(bound) for bound in MAX_PREDICTIONS]
    assert ours[0] > 0.01
    assert not np.isnan(ours).any()
    np.testing.assert_allclose(ours, expected.stats[:9], rtol=0, atol=1e-9)
    # (T, R, K, A, M) and (T, K, A, M), -1 where there is nothing to find.
    precision = expected.eval["precision"][..., -1].mean(axis=1).transpose(1, 2, 0)
    recall = expected.eval["recall"][:, :, 0].transpose(1, 2, 0)
    precision[precision < 0], recall[recall < 0] = np.nan, np.nan
    np.testing.assert_allclose(result.precision, precision, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.recall, recall, rtol=0, atol=1e-9)


def test_of_a_category_a_hundred_predictions_count() -> None:
    rng = np.random.default_rng(0)
    many = [thing(block(int(row), 0, 9, 9), score=float(rng.random())) for row in range(25)] * 5
    images = [([thing(FIRST), thing(SECOND)], [*many, thing(SECOND, score=-1.0)])] * 2
    expected = evaluate_at_once(images, by_category=True)
    result = score(*images, num_categories=4)
    assert result.ap() == pytest.approx(expected.stats[0], abs=1e-9)
    assert result.ar(100) == pytest.approx(expected.stats[8], abs=1e-9)
    assert result.ar(100) == pytest.approx(0.5)


def test_memory_grows_by_a_few_bytes_a_prediction_and_by_no_mask() -> None:
    scorer = MaskAP(1)
    matches = match_objects([thing(FIRST)], [thing(FIRST), thing(SECOND, score=0.5)])
    assert matches.records.nbytes <= 2 * 32
    for _ in range(1000):
        scorer.add(matches)
    assert scorer.compute().ap() == pytest.approx(1, abs=0.01)
