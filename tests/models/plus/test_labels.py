"""Labels of a step and the schedule, by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.formats.labels import IGNORE_INDEX, UNLABELLED
from pipeline.models.plus.labels import doubtful_void, fill_unlabelled, own_labels
from pipeline.models.plus.schedule import poly_lr


def test_truth_and_void_stay_and_the_rest_is_filled() -> None:
    truth = torch.tensor([[[0, 3, IGNORE_INDEX], [UNLABELLED, UNLABELLED, 1]]], dtype=torch.int16)
    pseudo = torch.tensor([[[5, 5, 5], [4, IGNORE_INDEX, 5]]])
    expected = [[[0, 3, IGNORE_INDEX], [4, IGNORE_INDEX, 1]]]
    assert fill_unlabelled(truth, pseudo).tolist() == expected
    assert fill_unlabelled(truth, pseudo).dtype == torch.int64


def test_only_candidates_win_and_no_gradient_flows() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0], [9.0, 3.0, 2.0, 8.0]]).T[None, :, None]
    logits.requires_grad_()
    labels = own_labels(logits, [1, 2], (1, 2))
    assert labels.tolist() == [[[2, 1]]]
    assert not labels.requires_grad
    # At a quarter of the way row 1 has 1.5, at three quarters 2.5.
    assert own_labels(logits, [1, 2], (2, 4)).tolist() == [[[2, 2, 1, 1]] * 2]


def test_doubt_is_void_below_the_threshold_alone() -> None:
    confidence = torch.tensor([[[0.2, 0.5, 0.9]]])
    labels = doubtful_void(torch.tensor([[[1, 2, 3]]]), confidence, 0.5)
    assert labels.tolist() == [[[IGNORE_INDEX, 2, 3]]]


@pytest.mark.parametrize(
    ("step", "total", "rate"),
    [
        (0, 20_000, 0.01),
        (10_000, 20_000, 0.0099 * 0.5**0.9 + 1e-4),
        (19_999, 20_000, 0.0099 * 0.00005**0.9 + 1e-4),
        (0, 1, 0.01),
    ],
)
def test_the_rate_falls_to_its_floor(step: int, total: int, rate: float) -> None:
    assert poly_lr(0.01, step, total) == pytest.approx(rate, rel=1e-12)


def test_a_step_that_is_none_of_the_updates_is_refused() -> None:
    for step in (-1, 5):
        with pytest.raises(ValueError, match="of 5"):
            poly_lr(0.01, step, 5)
