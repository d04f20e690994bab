"""Costs of pairs of proposals and instances, and the matching."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.zutis.matching import MatchingSamples, mask_costs, match


def pair_cost(prob: Tensor, mask: Tensor) -> Tensor:
    """Two dice and half a cross-entropy of one proposal (H, W) and one mask (H, W)."""
    dice = 1 - (2 * (prob * mask).sum() + 1) / (prob.sum() + mask.sum() + 1)
    return 2 * dice + 0.5 * F.binary_cross_entropy(prob, mask)


def test_costs_equal_one_pair_at_a_time() -> None:
    """Saturated probabilities included: their logs stop at -100."""
    probs = torch.rand(2, 3, 4, 5)
    probs[0, 0], probs[1, 2] = 0.0, 1.0
    masks = torch.rand(2, 8, 10) > 0.5
    costs = mask_costs(probs, masks, dice_weight=2.0, bce_weight=0.5)
    upsampled = F.interpolate(probs, size=(8, 10), mode="bilinear").clamp(0, 1)
    for layer in range(2):
        for n, mask in enumerate(masks.float()):
            for q, prob in enumerate(upsampled[layer]):
                expected = pair_cost(prob, mask)
                torch.testing.assert_close(costs[layer, n, q], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("smallest", [1e-30, 1e-41, 1e-44, 0.0])
def test_tiny_probabilities_cost_their_logarithm(smallest: float) -> None:
    probs = torch.rand(1, 4, 6, 6)
    probs[0, :2] = smallest
    masks = torch.ones(1, 6, 6, dtype=torch.bool)
    expected = torch.stack([pair_cost(prob, masks[0].float()) for prob in probs[0]])
    costs = mask_costs(probs, masks, dice_weight=2.0, bce_weight=0.5)
    torch.testing.assert_close(costs[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_large_images_are_cut_where_it_does_not_show() -> None:
    """Many strips, some without any object, the last one shorter."""
    probs = torch.rand(1, 64, 9, 40)
    masks = torch.zeros(2, 331, 300, dtype=torch.bool)
    masks[0, :20, :20] = masks[1, 300:, 100:] = True
    costs = mask_costs(probs, masks, dice_weight=2.0, bce_weight=0.5)
    upsampled = F.interpolate(probs, size=(331, 300), mode="bilinear")[0]
    expected = torch.stack(
        [torch.stack([pair_cost(prob, mask) for prob in upsampled]) for mask in masks.float()]
    )
    torch.testing.assert_close(costs[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", ["points", "tokens"])
def test_fewer_samples_match_clear_objects_alike(samples: MatchingSamples) -> None:
    masks = torch.zeros(3, 128, 96, dtype=torch.bool)
    masks[0, :40, :40] = masks[1, 60:, 50:] = masks[2, 90:, :30] = True
    shares = F.adaptive_avg_pool2d(masks.float(), (16, 12))
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 5, 16, 12, generator=generator) * 0.3
    probs[0, [4, 0, 2]] += 0.6 * shares
    probs[1, [1, 3, 0]] += 0.6 * shares
    costs = mask_costs(probs, masks, samples=samples)
    instances, queries = match(costs)
    assert instances.tolist() == [[0, 1, 2]] * 2
    assert queries.tolist() == [[4, 0, 2], [1, 3, 0]]
    torch.testing.assert_close(costs, mask_costs(probs, masks), atol=0.15, rtol=0)


@pytest.mark.parametrize("samples", ["pixels", "points", "tokens"])
def test_one_pixel_and_no_instance(samples: MatchingSamples) -> None:
    one = mask_costs(
        torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 1, dtype=torch.bool), samples=samples
    )
    assert torch.isfinite(one).all()
    none = mask_costs(
        torch.rand(2, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.bool), samples=samples
    )
    assert none.shape == (2, 0, 3)
    assert match(none)[0].shape == (2, 0)
