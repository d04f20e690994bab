from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig
from pipeline.models.masks.selfmask_training import SAVE_EVERY, fit_selfmask

CONFIG = SelfMaskConfig(
    dim=8, depth=1, num_heads=2, patch_size=4, num_queries=2, decoder_layers=1, mlp_ratio=1, grid=2
)
ITERATIONS = SAVE_EVERY + 6


def network() -> SelfMask:
    torch.manual_seed(0)
    return SelfMask(CONFIG)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[:, :4, 4 * int(torch.randint(3, (1,), generator=generator)) :] = True
    return masks[:, None].expand(-1, 3, -1, -1).float(), masks


def fit(model: SelfMask, state: Path, *, last: int = ITERATIONS) -> list[int]:
    """Train, or stop at a step as a killed run does; the steps that were made."""
    made = []

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, ITERATIONS):
            if step == last:
                raise KeyboardInterrupt
            made.append(step)
            yield batch(step)

    fit_selfmask(model, batches, state, iterations=ITERATIONS, learning_rate=1e-2, title="training")
    return made


def test_a_run_that_was_cut_off_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = network()
    assert fit(whole, tmp_path / "whole") == list(range(ITERATIONS))
    with pytest.raises(KeyboardInterrupt):
        fit(network(), tmp_path / "state", last=SAVE_EVERY + 3)
    continued = network()
    assert fit(continued, tmp_path / "state") == list(range(SAVE_EVERY, ITERATIONS))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(continued.state_dict()[name], value, rtol=0, atol=0)
    assert not continued.training
    assert fit(continued, tmp_path / "state") == []


def test_it_learns(tmp_path: Path) -> None:
    model = network()
    fit(model, tmp_path / "state")
    images, masks = batch(ITERATIONS)
    found = model.saliency(images) > 0.5
    assert (found & masks).sum() / (found | masks).sum() > 0.8
