"""A training state brings back weights, moments and random generators, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.weights.training_state import read_state, restore, save_state


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network with a buffer and an unused parameter, and its optimizer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    groups = [{"params": [parameter], "lr": 0.1} for parameter in model.parameters()]
    return model, torch.optim.AdamW(groups, fused=True)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """Train on random numbers; returns the next random number."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return torch.rand(1)


def test_training_goes_on_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "a/last.safetensors"
    model, optimizer = training()
    advance(model, optimizer, 3)
    rows = [[2, 0.1], [3, 1e-17]]
    save_state(path, model, optimizer, step=3, extra=rows)
    expected = advance(model, optimizer, 4)

    torch.manual_seed(99)
    other, other_optimizer = training()
    state = read_state(path)
    assert state is not None
    assert (state.step, state.extra) == (3, rows)
    restore(state, other, other_optimizer)
    assert torch.equal(advance(other, other_optimizer, 4), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert read_state(tmp_path / "last.safetensors") is None


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    model, optimizer = training()
    advance(model, optimizer, 1)
    save_state(path, model, optimizer, step=1, extra=[])
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(PipelineError, match=r"last\.safetensors: damaged \("):
            read_state(path)


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_state(path, *training(), step=1, extra=[])
    state = read_state(path)
    assert state is not None
    other = nn.Linear(3, 4)
    with pytest.raises(PipelineError, match="training state: not the weights of"):
        restore(state, other, torch.optim.AdamW(other.parameters()))
