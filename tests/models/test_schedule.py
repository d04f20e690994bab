"""Parameter groups and learning rates against published values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip.transformer import VisionTransformer

from pipeline.models.build import build_zutis
from pipeline.models.schedule import param_groups, poly_lr, set_learning_rates
from pipeline.models.zutis import Zutis

DATA = Path(__file__).parents[1] / "reference" / "data"
RECORD = json.loads((DATA / "poly_lr.json").read_text())


def network() -> Zutis:
    with torch.device("meta"):
        encoder = VisionTransformer(64, 16, 128, 2, 2, 4.0, output_dim=48)
        return build_zutis(encoder, num_queries=12, decoder_layers=2)


@pytest.mark.parametrize("base", sorted(RECORD["single_group_schedules"]))
def test_curve_agrees_with_published(base: str) -> None:
    expected = RECORD["single_group_schedules"][base]
    total = RECORD["max_iters"]
    curve = [poly_lr(float(base), step, total) for step in range(total + 1)]
    assert curve == pytest.approx(expected, rel=1e-9)


def test_groups_agree_with_published() -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model))
    assert len(optimizer.param_groups) == len(RECORD["param_groups"])
    for group, expected in zip(optimizer.param_groups, RECORD["param_groups"], strict=True):
        assert {names[id(p)] for p in group["params"]} == set(expected["names"])
        for key in ("lr", "weight_decay", "eps"):
            assert group[key] == pytest.approx(expected[key])
        assert list(group["betas"]) == expected["betas"]


def test_every_group_follows_its_curve() -> None:
    optimizer = torch.optim.AdamW(param_groups(network()))
    for step, expected in enumerate(RECORD["lr_per_step_per_group"]):
        set_learning_rates(optimizer, step, RECORD["max_iters"])
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx(expected, rel=1e-9)


def test_frozen_group_stays_frozen_and_the_floor_holds_afterwards() -> None:
    assert poly_lr(0.0, 3, 10) == 0.0
    assert poly_lr(5e-5, 12, 10) == 1e-6


@pytest.mark.parametrize(("step", "total"), [(0, 0), (-1, 10)])
def test_impossible_steps_are_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="total_steps >= 1 and step >= 0"):
        poly_lr(5e-5, step, total)
