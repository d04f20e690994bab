"""Leaner blocks against those that they take the place of."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from pipeline.models.layers.blocks import Attention, QuickGelu, with_lean_parts


def tower() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=16, patch_size=8, width=64, layers=2, heads=2, mlp_ratio=2.0, act_layer=QuickGELU
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_lean_tower_computes_the_same(training: bool) -> None:
    plain = tower().train(training)
    lean = with_lean_parts(copy.deepcopy(plain))
    assert lean.state_dict().keys() == plain.state_dict().keys()
    kinds = {type(module) for module in lean.modules()}
    assert {Attention, QuickGelu} <= kinds
    assert not {nn.MultiheadAttention, QuickGELU} & kinds
    images = torch.randn(3, 3, 16, 16)
    gradients = []
    for network in (plain, lean):
        output = network(images)
        gradients.append(torch.autograd.grad(output.square().sum(), list(network.parameters())))
    torch.testing.assert_close(lean(images), plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_replacing_draws_no_random_number() -> None:
    network = tower()
    state = torch.get_rng_state()
    with_lean_parts(network)
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_across_sequences_and_with_a_mask() -> None:
    torch.manual_seed(0)
    lean = Attention(16, 4).train()
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(lean.state_dict())
    asked, asking = torch.randn(2, 7, 16), torch.randn(2, 3, 16)
    expected = plain(asking, asked, asked + 1)[0]
    torch.testing.assert_close(lean(asking, asked, asked + 1, need_weights=False)[0], expected)
    mask = torch.triu(torch.full((7, 7), -torch.inf), 1)
    options = {"need_weights": False, "attn_mask": mask}
    expected = plain(asked, asked, asked, **options)[0]
    torch.testing.assert_close(lean(asked, asked, asked, **options)[0], expected)
    weights = lean(asking, asked, asked, need_weights=True)[1]
    assert weights is not None
    assert weights.shape == (2, 3, 7)
