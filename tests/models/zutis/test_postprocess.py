"""Label maps and instances of hand-made proposals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models.zutis.postprocess import (
    instance_predictions,
    semantic_logits,
    semantic_prediction,
)


def test_many_categories_agree_with_the_argmax_of_all_logits() -> None:
    """More categories than fit in one chunk; of equal ones the first wins."""
    torch.manual_seed(0)
    tokens = torch.randint(-9, 10, (2, 6, 10, 8)).float()
    text = torch.randint(-9, 10, (130, 8)).float()
    expected = semantic_logits(tokens, text, (3, 5)).argmax(1)
    assert expected.max() > 64
    assert torch.equal(semantic_prediction(tokens, text, (3, 5)), expected)
    repeated = torch.cat((text, text))
    assert torch.equal(semantic_prediction(tokens, repeated, (3, 5)), expected)


def test_no_category_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        semantic_prediction(torch.randn(1, 2, 2, 4), torch.randn(0, 4))


def bars(*columns: tuple[int, int], values: tuple[float, ...]) -> torch.Tensor:
    """Proposals (Q, 4, 10): full-height bars over columns [first, last)."""
    proposals = torch.zeros(len(columns), 4, 10)
    for proposal, (first, last), value in zip(proposals, columns, values, strict=True):
        proposal[:, first:last] = value
    return proposals


def tokens_of(label_id: int) -> torch.Tensor:
    return torch.eye(3)[label_id].expand(4, 10, 3)


def test_suppression_kinds() -> None:
    """Second bar overlaps the first by IoU 1/2, the third by none."""
    proposals = bars((0, 6), (2, 8), (8, 10), values=(0.9, 0.8, 0.7))
    category_score = 1 / (1 + np.exp(-5.0))
    factors = {
        "none": (0.9, 0.8, 0.7),
        "hard": (0.9, 0.7),
        "linear": (0.9, 0.7, 0.4),
        "gaussian": (0.9, 0.7, 0.8 * np.exp(-0.5)),
    }
    for kind, expected in factors.items():
        instances = instance_predictions(
            proposals,
            tokens_of(1),
            torch.eye(3),
            suppression=kind,  # type: ignore[arg-type]
        )
        scores = [instance.score / category_score for instance in instances]
        assert scores == pytest.approx(expected, rel=1e-5), kind


def test_overlap_is_counted_over_the_whole_of_large_masks() -> None:
    """The masks share their upper part only."""
    proposals = bars((0, 6), (0, 6), values=(0.9, 0.8))
    proposals[0, 3], proposals[1, 3] = 0.0, proposals[1, 3].flip(0)
    options: dict[str, Any] = {"temperature": 0.0, "suppression": "linear"}
    best, other = instance_predictions(
        proposals, tokens_of(1), torch.eye(3), (400, 1000), **options
    )
    assert best.mask.shape == (400, 1000)
    iou = (best.mask & other.mask).sum() / (best.mask | other.mask).sum()
    assert 0.5 < iou < 0.9
    assert other.score == pytest.approx(0.5 * 0.8 * (1 - iou), rel=1e-5)


def test_labels_do_not_suppress_each_other() -> None:
    proposals = bars((0, 6), (1, 6), values=(0.9, 0.8))
    tokens = torch.zeros(4, 10, 3)
    tokens[..., 1] = 1.0
    tokens[:, 0] = torch.tensor([0.0, 0.0, 8.0])
    instances = instance_predictions(proposals, tokens, torch.eye(3))
    assert [i.label_id for i in instances] == [2, 1]


def test_background_is_dropped() -> None:
    proposals = bars((0, 6), values=(0.9,))
    assert instance_predictions(proposals, tokens_of(0), torch.eye(3)) == []


def test_nothing_above_the_threshold() -> None:
    proposals = torch.full((4, 4, 10), 0.5)
    assert instance_predictions(proposals, tokens_of(1), torch.eye(3), (8, 20)) == []


def test_mask_that_vanishes_in_upsampling_is_dropped() -> None:
    proposals = torch.zeros(1, 4, 10)
    proposals[0, 1, 1] = 0.51
    assert len(instance_predictions(proposals, tokens_of(1), torch.eye(3))) == 1
    assert instance_predictions(proposals, tokens_of(1), torch.eye(3), (8, 20)) == []


def test_box_is_inclusive_and_score_falls() -> None:
    proposals = bars((2, 5), (7, 8), values=(0.6, 0.9))
    instances = instance_predictions(proposals, tokens_of(2), torch.eye(3))
    assert [i.bbox_xyxy for i in instances] == [(7, 0, 7, 3), (2, 0, 4, 3)]
    assert instances[0].score > instances[1].score


def test_one_pixel() -> None:
    [instance] = instance_predictions(
        torch.ones(1, 1, 1), torch.eye(3)[1].view(1, 1, 3), torch.eye(3), (1, 1)
    )
    assert instance.bbox_xyxy == (0, 0, 0, 0)
    assert instance.mask.tolist() == [[True]]


def test_unknown_suppression_is_refused() -> None:
    with pytest.raises(ValueError, match="'soft' is none of"):
        instance_predictions(
            torch.ones(1, 1, 1),
            torch.ones(1, 1, 3),
            torch.eye(3),
            suppression="soft",  # type: ignore[arg-type]
        )


def test_scores_at_pixel_resolution_are_those_of_the_final_masks() -> None:
    generator = torch.Generator().manual_seed(1)
    proposals = torch.rand(20, 4, 5, generator=generator)
    tokens = torch.nn.functional.normalize(torch.randn(4, 5, 3, generator=generator), dim=-1)
    size = (13, 31)
    options: dict[str, Any] = {"temperature": 5.0, "suppression": "none"}
    pixel = instance_predictions(
        proposals, tokens, torch.eye(3), size, score_resolution="pixel", **options
    )
    probs = torch.nn.functional.interpolate(proposals[None], size=size, mode="bilinear")[0]
    maps = torch.nn.functional.interpolate(
        tokens.permute(2, 0, 1)[None], size=size, mode="bilinear"
    )[0]
    expected = []
    for prob in probs:
        inside = prob > 0.5
        mean = torch.nn.functional.normalize(maps[:, inside].mean(dim=1), dim=0)
        score = prob[inside].mean() * (5 * mean.max()).sigmoid()
        if (label_id := int(mean.argmax())) != 0:
            expected.append((score.item(), label_id, inside.numpy()))
    expected.sort(key=lambda entry: -entry[0])
    assert len(pixel) == len(expected) > 5
    for instance, (score, label_id, mask) in zip(pixel, expected, strict=True):
        assert instance.score == pytest.approx(score, rel=1e-4)
        assert instance.label_id == label_id
        np.testing.assert_array_equal(instance.mask, mask)
    token = instance_predictions(proposals, tokens, torch.eye(3), size, **options)
    assert [i.score for i in token] != pytest.approx([i.score for i in pixel], rel=1e-3)


def test_without_a_size_both_resolutions_are_the_token_grid() -> None:
    proposals = bars((0, 6), (5, 9), values=(0.9, 0.6))
    token, pixel = (
        instance_predictions(
            proposals,
            tokens_of(1),
            torch.eye(3),
            score_resolution=resolution,  # type: ignore[arg-type]
        )
        for resolution in ("token", "pixel")
    )
    assert [i.score for i in token] == [i.score for i in pixel]


@pytest.mark.parametrize("size", [(31, 77), (8, 20), (3, 4), (1, 1), (60, 3)])
def test_masks_are_those_of_whole_upsampled_proposals(size: tuple[int, int]) -> None:
    """Objects at every border, of every size, at sizes that grow, shrink, or both."""
    generator = torch.Generator().manual_seed(0)
    proposals = torch.rand(40, 4, 10, generator=generator) ** 3
    found = instance_predictions(
        proposals, tokens_of(1), torch.eye(3), size, suppression="none", temperature=0.0
    )
    whole = F.interpolate(proposals[None], size=size, mode="bilinear")[0] > 0.5
    expected = {mask.tobytes() for mask in whole.numpy() if mask.any()}
    assert {instance.mask.tobytes() for instance in found} == expected
    for instance in found:
        rows, columns = np.nonzero(instance.mask)
        assert instance.bbox_xyxy == (columns.min(), rows.min(), columns.max(), rows.max())
        assert instance.size == instance.mask.shape == size


def test_others_may_name_what_is_not_background() -> None:
    """They see boxes and cosines of proposals that reach a token and look like a category."""
    proposals = bars((2, 5), (0, 10), (6, 10), (3, 3), values=(0.9, 0.8, 0.7, 0.6))
    proposals[0, :1] = proposals[0, 3:] = 0.0
    tokens = torch.zeros(4, 10, 4)
    tokens[..., 0] = 0.5
    tokens[:, :5, 1] = 1.0
    tokens[:, 6:, 0] = 1.0
    asked = []

    def name_regions(boxes: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
        asked.append((boxes, cosines))
        return torch.full((len(boxes),), 3)

    options: dict[str, Any] = {"temperature": 0.0, "suppression": "none"}
    plain = instance_predictions(proposals, tokens, torch.eye(4), **options)
    named = instance_predictions(
        proposals, tokens, torch.eye(4), **options, name_regions=name_regions
    )
    assert {i.label_id for i in plain} == {1}
    assert [i.label_id for i in named] == [3]
    [(boxes, cosines)] = asked
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0.2, 0.75, 0.5]]))
    torch.testing.assert_close(cosines, F.normalize(torch.tensor([[0.5, 1.0, 0, 0]]))[:, 1:])
    warm = {**options, "temperature": 5.0}
    [found] = instance_predictions(
        proposals, tokens, torch.eye(4), **warm, name_regions=name_regions
    )
    assert found.score == pytest.approx(0.9 * 0.5, rel=1e-5)  # the cosine of that name is 0
