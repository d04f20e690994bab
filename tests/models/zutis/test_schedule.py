"""Parameter groups and learning rates."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import VisionTransformer

from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.schedule import param_groups, poly_lr, set_learning_rates


def network() -> Zutis:
    with torch.device("meta"):
        encoder = VisionTransformer(64, 16, 128, 2, 2, 4.0, output_dim=48)
        return build_zutis(encoder, num_queries=12, decoder_layers=2)


def test_the_defaults_are_the_papers() -> None:
    groups = param_groups(network())
    assert [group["lr"] for group in groups] == [5e-6, 5e-5, 5e-5, 5e-5, 5e-5]
    assert {group["weight_decay"] for group in groups} == {0.05}
    assert poly_lr(5e-5, 5, 10) == pytest.approx(5e-5 * 0.5**0.9)


def test_every_tensor_is_in_one_group() -> None:
    model = network()
    grouped = [id(parameter) for group in param_groups(model) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_groups_follow_curves_of_their_own() -> None:
    optimizer = torch.optim.AdamW(param_groups(network()))
    set_learning_rates(optimizer, 9, 10)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-6, *[5e-5 * 0.1**0.9] * 4])


def test_frozen_group_stays_frozen_and_the_floor_holds_afterwards() -> None:
    assert poly_lr(0.0, 3, 10) == 0.0
    assert poly_lr(5e-5, 12, 10) == 1e-6


@pytest.mark.parametrize(("step", "total"), [(0, 0), (-1, 10)])
def test_impossible_steps_are_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="total_steps >= 1 and step >= 0"):
        poly_lr(5e-5, step, total)
