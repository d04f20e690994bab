"""Sums over a batch, taken a few entries at a time with their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sum_by_parts(
    loss: Callable[..., Tensor], inputs: Tensor, *targets: Tensor, size: int = 1
) -> Tensor:
    """`loss(inputs, *targets)`, sums over their first axis, in the memory of `size` entries.

    Args:
        loss: gives (n,) sums, of which only the first has a gradient.
        inputs: what the gradient is of.
        targets: as long as the inputs.
        size: entries of a part.

    Returns:
        (n,) sums over all parts.
    """
    return _SumByParts.apply(loss, size, inputs, *targets)


class _SumByParts(torch.autograd.Function):
    """Takes the gradient of each part at once, so that no map of full size outlives its part."""

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[..., Tensor], size: int, inputs: Tensor, *targets: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(inputs)
        parts = (tensor.split(size) for tensor in (gradient, inputs.detach(), *targets))
        values = []
        for part_gradient, leaf, *part_targets in zip(*parts, strict=True):
            with torch.enable_grad():
                sums = loss(leaf.requires_grad_(), *part_targets)
                part_gradient.copy_(torch.autograd.grad(sums[0], leaf)[0])
            values.append(sums.detach())
        ctx.save_for_backward(gradient)
        return functools.reduce(torch.add, values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        others = len(ctx.needs_input_grad) - 3
        return None, None, gradient * upstream[0], *[None] * others
