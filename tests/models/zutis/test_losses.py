"""Losses, costs, matches and gradients of hand-made proposals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.zutis.losses import (
    MaskReduction,
    mask_loss,
    num_counted,
    num_pairs,
    semantic_loss,
)
from pipeline.models.zutis.matching import mask_costs, match


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_saturated_proposals_keep_loss_and_gradients_finite() -> None:
    logits = torch.full((1, 1, 2, 7, 9), 60.0, requires_grad=True)
    masks = torch.zeros(1, 45, 61, dtype=torch.bool)
    masks[0, :20] = True
    loss = mask_loss(logits.sigmoid(), [masks])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(logits)).all()
    assert 50 < loss.item() < 100


def test_images_without_objects_cost_nothing() -> None:
    probs = torch.rand(2, 2, 3, 4, 4, requires_grad=True)
    empty = [torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)]
    loss = mask_loss(probs, empty)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(gradient(probs), torch.zeros_like(probs))


def test_unmatched_queries_get_no_gradient() -> None:
    torch.manual_seed(0)
    probs = torch.rand(1, 2, 5, 4, 4, requires_grad=True)
    masks = torch.rand(2, 8, 8) > 0.5
    _, queries = match(mask_costs(probs[0].detach(), masks))
    mask_loss(probs, [masks]).backward()
    for layer in range(2):
        touched = gradient(probs)[0, layer].abs().sum((1, 2)).nonzero()[:, 0]
        assert touched.tolist() == sorted(queries[layer].tolist())


def test_batch_size_divides_the_mask_loss() -> None:
    probs = torch.rand(1, 1, 3, 4, 4)
    masks = torch.ones(1, 8, 8, dtype=torch.bool)
    alone = mask_loss(probs, [masks])
    padded = mask_loss(probs.expand(4, -1, -1, -1, -1), [masks] + [masks[:0]] * 3)
    torch.testing.assert_close(padded, alone / 4)


def test_one_pixel_image() -> None:
    loss = mask_loss(torch.full((1, 1, 1, 2, 2), 0.5), [torch.ones(1, 1, 1, dtype=torch.bool)])
    # dice 1 - (2 * 0.5 + 1) / (0.5 + 1 + 1) = 0.2, cross-entropy ln 2
    assert loss.item() == pytest.approx(0.2 + 0.693147, rel=1e-5)


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images but 1 sets of masks"):
        mask_loss(torch.rand(2, 1, 1, 2, 2), [torch.ones(1, 2, 2, dtype=torch.bool)])


def test_diverged_training_is_named() -> None:
    with pytest.raises(PipelineError, match=r"diverged.*learning rates"):
        mask_loss(torch.full((1, 1, 2, 2, 2), torch.nan), [torch.ones(1, 4, 4, dtype=torch.bool)])


def test_void_pixels_do_not_count() -> None:
    torch.manual_seed(0)
    tokens, text = torch.randn(2, 3, 3, 4), torch.randn(5, 4)
    labels = torch.randint(0, 5, (2, 3, 3))
    labels[0, 0] = -1
    loss = semantic_loss(tokens, text, labels, logit_scale=3.0)
    logits = (3 * tokens @ text.T)[labels >= 0]
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[labels >= 0]))


def test_only_void_gives_zero_loss_and_gradient() -> None:
    tokens = torch.randn(1, 2, 2, 4, requires_grad=True)
    loss = semantic_loss(tokens, torch.randn(3, 4), torch.full((1, 4, 4), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(gradient(tokens), torch.zeros_like(tokens))


def test_autocast_does_not_change_the_losses() -> None:
    torch.manual_seed(0)
    probs, masks = torch.rand(1, 2, 3, 6, 6), torch.rand(2, 16, 16) > 0.5
    tokens, text = torch.randn(1, 6, 6, 8), torch.randn(4, 8)
    labels = torch.randint(0, 4, (1, 16, 16))
    expected = mask_loss(probs, [masks]), semantic_loss(tokens, text, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = mask_loss(probs, [masks]), semantic_loss(tokens, text, labels)
    assert result == expected


def test_the_mean_reduction_counts_no_layers_and_no_objects() -> None:
    """Every pair is the same here, so the mean is one pair's loss and the sum as many."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    probs = torch.rand(4, 4)
    [one] = mask_costs(probs.view(1, 1, 4, 4), mask[None]).flatten()
    for layers, objects in ((1, 1), (3, 1), (2, 4)):
        proposals = probs.expand(2, layers, 5, 4, 4)
        masks = [mask.expand(objects, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)]
        mean = mask_loss(proposals, masks, reduction="mean")
        torch.testing.assert_close(mean, one, atol=1e-5, rtol=1e-4)
        total = mask_loss(proposals, masks, reduction="sum")
        torch.testing.assert_close(total, one * layers * objects / 2, atol=1e-4, rtol=1e-4)


def test_the_mean_over_no_pair_is_zero() -> None:
    loss = mask_loss(
        torch.rand(1, 2, 3, 4, 4), [torch.zeros(0, 8, 8, dtype=torch.bool)], reduction="mean"
    )
    assert loss.item() == 0


def test_parts_of_a_batch_add_up_to_its_semantic_loss() -> None:
    """The parts have different numbers of void pixels, so that a mean of means would be wrong."""
    tokens, text = torch.randn(3, 4, 4, 8, requires_grad=True), torch.randn(5, 8)
    labels = torch.randint(0, 5, (3, 9, 9))
    labels[0, :7], labels[1] = -1, -1
    whole = semantic_loss(tokens, text, labels)
    [expected] = torch.autograd.grad(whole, tokens)
    divisor = num_counted(labels)
    assert divisor == 2 * 9 + 81
    parts = [
        semantic_loss(tokens[part], text, labels[part], divisor=divisor)
        for part in (slice(0, 1), slice(1, 2), slice(2, 3))
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, tokens)[0], expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_parts_of_a_batch_add_up_to_its_mask_loss(reduction: MaskReduction) -> None:
    """One image has more objects than there are queries, one none, one an empty mask alone."""
    probs = torch.rand(4, 2, 3, 4, 4, requires_grad=True)
    masks = [torch.rand(count, 8, 8) > 0.5 for count in (5, 0, 1, 2)]
    masks[2][:] = False
    whole = mask_loss(probs, masks, reduction=reduction)
    [expected] = torch.autograd.grad(whole, probs)
    pairs = num_pairs(masks, num_layers=2, num_queries=3)
    assert pairs == 2 * (3 + 2)
    divisor = pairs if reduction == "mean" else torch.tensor(4)
    parts = [
        mask_loss(probs[part], masks[part], reduction=reduction, divisor=divisor)
        for part in (slice(0, 2), slice(2, 4))
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, probs)[0], expected)


def test_random_points_are_those_of_each_images_generator() -> None:
    probs = torch.rand(2, 1, 5, 16, 16)
    masks = [torch.rand(3, 100, 100) > 0.5 for _ in range(2)]

    def loss(seeds: list[int], images: slice = slice(None)) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return mask_loss(probs[images], masks[images], matching="points", generators=generators)

    torch.manual_seed(1)
    first = loss([3, 4])
    torch.manual_seed(2)
    assert torch.equal(loss([3, 4]), first)
    alone = [loss([3], slice(0, 1)), loss([4], slice(1, 2))]
    torch.testing.assert_close(torch.stack(alone).mean(), first)
