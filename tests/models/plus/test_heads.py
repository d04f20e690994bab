"""Heads of DenseCLIP+, each beside a plain second implementation on the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.plus.heads import HEADS

SIZES = [(1, 1), (1, 5), (7, 4), (12, 13)]  # of the last map; the fine one has twice the cells
D, E, C = 10, 6, 5

State = dict[str, Tensor]


def build(name: str) -> nn.Module:
    """A small head with batch norms of any values, in evaluation mode."""
    torch.manual_seed(0)
    head = HEADS[name].build(D, E, C)
    for key, value in head.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5 if "var" in key or "weight" in key else -0.3, 1.0)
    return head.eval()


def conv_bn_relu(state: State, name: str, values: Tensor, dilation: int = 1) -> Tensor:
    """Unfolded convolution, batch norm by its formula, ReLU."""
    weight = state[f"{name}.conv.weight"]
    inputs, side = weight.shape[1:3]
    padding = dilation * (side // 2)
    columns = F.unfold(values, side, dilation=dilation, padding=padding)
    columns = columns.unflatten(1, (values.shape[1], side * side))
    if inputs == values.shape[1]:
        mixed = torch.einsum("bikn,oik->bon", columns, weight.flatten(2))
    else:  # of each channel by itself
        mixed = torch.einsum("bikn,ik->bin", columns, weight[:, 0].flatten(1))
    mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    scale = state[f"{name}.bn.weight"] / (variance + 1e-5).sqrt()
    shifted = (mixed - mean[:, None]) * scale[:, None] + state[f"{name}.bn.bias"][:, None]
    return shifted.clamp(min=0).unflatten(2, values.shape[-2:])


def separable(state: State, name: str, values: Tensor, dilation: int = 1) -> Tensor:
    deep = conv_bn_relu(state, f"{name}.depthwise_conv", values, dilation)
    return conv_bn_relu(state, f"{name}.pointwise_conv", deep)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear by matrices, pixel centres aligned (not corners)."""

    def matrix(length: int, new: int) -> Tensor:
        rows = torch.zeros(new, length)
        for target in range(new):
            centre = max((target + 0.5) * length / new - 0.5, 0.0)
            lower = min(int(centre), length - 1)
            upper = min(lower + 1, length - 1)
            rows[target, lower] += 1 - (centre - lower)
            rows[target, upper] += centre - lower
        return rows

    height, width = values.shape[-2:]
    return matrix(height, size[0]) @ values @ matrix(width, size[1]).T


def pooled(values: Tensor, side: int) -> Tensor:
    """Means of side x side parts; the parts overlap where the sides are no multiples."""

    def parts(length: int) -> list[slice]:
        return [slice(i * length // side, -(-(i + 1) * length // side)) for i in range(side)]

    height, width = values.shape[-2:]
    rows = [
        torch.stack([values[..., y, x].mean((-2, -1)) for x in parts(width)], dim=-1)
        for y in parts(height)
    ]
    return torch.stack(rows, dim=-2)


def plain_deeplabv2(state: State, low: Tensor, last: Tensor) -> Tensor:
    del low
    total = torch.zeros(())
    for index, dilation in enumerate((6, 12, 18, 24)):
        total = total + conv_bn_relu(state, f"aspp_modules.{index}", last, dilation)
    return total


def plain_deeplabv3plus(state: State, low: Tensor, last: Tensor) -> Tensor:
    image = conv_bn_relu(state, "image_pool.1", last.mean((-2, -1), keepdim=True))
    parts = [image.expand(-1, -1, *last.shape[-2:])]
    parts.append(conv_bn_relu(state, "aspp_modules.0", last))
    for index, dilation in ((1, 12), (2, 24), (3, 36)):
        parts.append(separable(state, f"aspp_modules.{index}", last, dilation))
    coarse = conv_bn_relu(state, "bottleneck", torch.cat(parts, 1))
    fine = conv_bn_relu(state, "c1_bottleneck", low)
    size = (low.shape[2], low.shape[3])
    both = torch.cat([resized(coarse, size), fine], 1)
    return separable(state, "sep_bottleneck.1", separable(state, "sep_bottleneck.0", both))


def plain_pspnet(state: State, low: Tensor, last: Tensor) -> Tensor:
    del low
    size = (last.shape[2], last.shape[3])
    parts = [last]
    for index, side in enumerate((1, 2, 3, 6)):
        part = conv_bn_relu(state, f"psp_modules.{index}.1", pooled(last, side))
        parts.append(resized(part, size))
    return conv_bn_relu(state, "bottleneck", torch.cat(parts, 1))


def plain_lraspp(state: State, low: Tensor, last: Tensor) -> Tensor:
    size = (low.shape[2], low.shape[3])
    gate = torch.einsum("oi,bi->bo", state["gate.weight"].flatten(1), last.mean((-2, -1)))
    gated = conv_bn_relu(state, "project", last) / (1 + torch.exp(-gate))[..., None, None]
    weights = state["features.weight"].flatten(1)  # published as two layers, and summed
    high = torch.einsum("oi,bihw->bohw", weights[:, :128], resized(gated, size))
    fine = torch.einsum("oi,bihw->bohw", weights[:, 128:], low)
    return high + fine + state["features.bias"][:, None, None]


PLAIN = {
    "deeplabv2": plain_deeplabv2,
    "deeplabv3plus": plain_deeplabv3plus,
    "pspnet": plain_pspnet,
    "lraspp": plain_lraspp,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_is_its_plain_reading(name: str, size: tuple[int, int]) -> None:
    head = build(name)
    generator = torch.Generator().manual_seed(1)
    last = torch.rand(2, D, *size, generator=generator)
    low = torch.rand(2, E, *(2 * side for side in size), generator=generator)
    with torch.no_grad():
        expected = PLAIN[name](head.state_dict(), low, last)
        assert torch.allclose(head(low, last), expected, atol=1e-5)
    assert expected.shape[1] == C


def convolutions(head: nn.Module) -> list[nn.Conv2d]:
    return [module for module in head.modules() if isinstance(module, nn.Conv2d)]


def test_deeplabv2_has_the_published_weights() -> None:
    with torch.device("meta"):
        head = HEADS["deeplabv2"].build(2048, 256, 1024)
    assert sum(conv.weight.numel() for conv in convolutions(head)) == 75_497_472
    assert [conv.bias for conv in convolutions(head)] == [None] * 4
    for conv, dilation in zip(convolutions(head), (6, 12, 18, 24), strict=True):
        assert (conv.kernel_size, conv.dilation, conv.padding) == (
            (3, 3),
            (dilation, dilation),
            (dilation, dilation),
        )


@pytest.mark.parametrize("name", list(HEADS))
def test_first_weights(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name].build(64, 64, 64)
    for conv in convolutions(head):
        fan_out = conv.weight.shape[0] * conv.kernel_size[0] ** 2
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert conv.bias is None or not conv.bias.any()
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
    assert not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in head.modules())
