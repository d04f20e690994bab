"""Label maps and instances against published predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.postprocess import (
    Instance,
    instance_predictions,
    semantic_logits,
    semantic_prediction,
)

DATA = Path(__file__).parents[1] / "reference" / "data"
IO = load_file(DATA / "zutis_predict.io.safetensors")
RECORD = json.loads((DATA / "zutis_predict.json").read_text())
SIZE = tuple(RECORD["settings"]["target_size"])


def test_semantic_prediction_agrees_with_published() -> None:
    tokens, text = IO["patch_tokens"], IO["text_embeddings"]
    logits = semantic_logits(tokens, text)
    torch.testing.assert_close(logits, IO["semantic_logits_lowres"], atol=1e-6, rtol=1e-5)
    prediction = semantic_prediction(tokens, text)
    assert torch.equal(prediction, IO["semantic_argmax_lowres"].long())
    assert torch.equal(semantic_prediction(tokens, text, SIZE), IO["semantic_argmax"].long())


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


@pytest.mark.parametrize("case", sorted(RECORD["instance"]))
def test_instances_agree_with_published(case: str) -> None:
    kind, resolution = case.split(".")
    special = kind == "hard_t2_thr06"
    expected = [
        (e["category_id"], e["score"], e["bbox"], IO[f"masks.{case}"][e["mask_index"]].bool())
        for e in RECORD["instance"][case]
    ]
    predicted: list[Instance] = []
    for proposals, tokens in zip(IO["mask_proposals"], IO["patch_tokens"], strict=True):
        predicted += instance_predictions(
            proposals[-1],
            tokens,
            IO["text_embeddings"],
            SIZE if resolution == "full" else None,
            threshold=0.6 if special else 0.5,
            temperature=2.0 if special else 5.0,
            suppression="hard" if special else kind.lower(),  # type: ignore[arg-type]
        )
    assert len(predicted) == len(expected)
    predicted.sort(key=lambda i: (i.label_id, i.score))
    expected.sort(key=lambda e: e[:2])
    for instance, (label_id, score, bbox, mask) in zip(predicted, expected, strict=True):
        assert instance.label_id == label_id
        assert instance.score == pytest.approx(score, rel=1e-5)
        assert list(instance.bbox_xyxy) == bbox
        assert instance.mask.dtype == np.bool_
        np.testing.assert_array_equal(instance.mask, mask.numpy())


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
