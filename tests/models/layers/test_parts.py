"""Sums by parts, beside the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.models.layers.parts import sum_by_parts


def sums(inputs: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
    squares = (weights * (inputs - shifts) ** 2).sum()
    return torch.stack((squares, inputs.sum(), weights.sum()))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_sums_and_gradient_are_those_of_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights, shifts = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    whole, parts = (inputs.clone().requires_grad_() for _ in range(2))
    expected = sums(whole, weights, shifts)
    found = sum_by_parts(sums, parts, weights, shifts, size=size)
    assert torch.allclose(found, expected)
    (3 * expected[0]).backward()
    (3 * found[0] + 7 * found[1]).backward()  # of the others there is no gradient
    assert whole.grad is not None
    assert parts.grad is not None
    assert torch.allclose(parts.grad, whole.grad)


def test_the_loss_sees_no_more_than_a_part() -> None:
    seen: list[tuple[int, int]] = []

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((len(inputs), len(targets)))
        return inputs.sum(0, keepdim=True)

    sum_by_parts(loss, torch.zeros(5, requires_grad=True), torch.zeros(5), size=2)
    assert seen == [(2, 2), (2, 2), (1, 1)]


def test_inputs_may_want_no_gradient() -> None:
    found = sum_by_parts(lambda inputs: inputs.sum(0, keepdim=True), torch.ones(3))
    assert found.tolist() == [3.0]
    assert not found.requires_grad
