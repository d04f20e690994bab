"""Losses, costs and matches against published values and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.losses import mask_costs, mask_loss, match, semantic_loss

DATA = Path(__file__).parents[1] / "reference" / "data"


def read_case(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    io = load_file(DATA / "zutis_criterion.io.safetensors")
    record = json.loads((DATA / "zutis_criterion.json").read_text())["cases"][case]
    return {
        k.removeprefix(f"{case}."): v for k, v in io.items() if k.startswith(f"{case}.")
    }, record


def with_layer_axis(proposals: Tensor) -> Tensor:
    return proposals if proposals.ndim == 5 else proposals[:, None]


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def instance_masks(io: dict[str, Tensor]) -> list[Tensor]:
    return [io[f"instance_masks.{i}"].bool() for i in range(len(io["mask_proposals"]))]


def mask_weights(record: dict[str, Any]) -> dict[str, float]:
    weights = record["weights"]
    return {"dice_weight": weights["weight_dice_loss"], "bce_weight": weights["weight_bce_loss"]}


@pytest.mark.parametrize("case", ["a", "b"])
def test_losses_and_gradients_agree_with_published(case: str) -> None:
    io, record = read_case(case)
    proposals = io["mask_proposals"].clone().requires_grad_()
    tokens = io["patch_tokens"].clone().requires_grad_()
    semantic = io["semantic_masks"].long()
    ce = semantic_loss(tokens, io["text_embeddings"], semantic, ignore_index=255)
    mask = mask_loss(with_layer_axis(proposals), instance_masks(io), **mask_weights(record))
    weights = record["weights"]
    total = weights["weight_ce_loss"] * ce + weights["weight_mask_loss"] * mask
    total.backward()
    assert ce.item() == pytest.approx(record["ce_loss"], rel=1e-5)
    assert mask.item() == pytest.approx(record["mask_loss"], rel=1e-5)
    assert total.item() == pytest.approx(record["loss"], rel=1e-5)
    for name, tensor in (("mask_proposals", proposals), ("patch_tokens", tokens)):
        expected = io[f"grad.{name}"]
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient(tensor), expected, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("case", ["a", "b"])
def test_costs_and_matches_agree_with_published(case: str) -> None:
    io, record = read_case(case)
    proposals, masks = with_layer_axis(io["mask_proposals"]), instance_masks(io)
    for image in {pair["image"] for pair in record["matches"]}:
        costs = mask_costs(proposals[image], masks[image], **mask_weights(record))
        instances, queries = match(costs)
        for pair in (p for p in record["matches"] if p["image"] == image):
            layer = pair["layer"]
            expected = io[f"cost.{image}.{layer}"]
            torch.testing.assert_close(costs[layer], expected, atol=1e-6, rtol=1e-5)
            assert instances[layer].tolist() == pair["instance_indices"]
            assert queries[layer].tolist() == pair["query_indices"]
            chosen = costs[layer][instances[layer], queries[layer]].sum().item()
            assert chosen == pytest.approx(pair["matched_cost_sum"], rel=1e-5)


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
                dice = 1 - (2 * (prob * mask).sum() + 1) / (prob.sum() + mask.sum() + 1)
                expected = 2 * dice + 0.5 * F.binary_cross_entropy(prob, mask)
                torch.testing.assert_close(costs[layer, n, q], expected, atol=1e-4, rtol=1e-5)


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
