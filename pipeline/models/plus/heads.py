"""Heads of DenseCLIP+: two maps of a backbone in, features as wide as CLIP's text space out.

None has dropout, an auxiliary loss or a classifier. Convolutions start Kaiming normal (fan-out),
batch norms at 1 and 0. Names of layers are those of the published code, so that its weights fit.

Letters: B batch; C text space; D channels of the last map, h w its cells; E channels of the map at
stride 4, H W its cells.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.layers.interpolate import upsample

DEEPLABV2_DILATIONS = (6, 12, 18, 24)
DEEPLABV3PLUS_DILATIONS = (12, 24, 36)
DEEPLABV3PLUS_LOW = 48
PSPNET_POOLS = (1, 2, 3, 6)
LRASPP_HIDDEN = 128


def conv_block(
    inputs: int, outputs: int, kernel: int = 1, *, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size, without bias; batch norm; ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    bn, activate = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, activate=activate))


def separable_block(inputs: int, outputs: int, *, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel and a 1x1 one over all, each with batch norm and ReLU."""
    depthwise = conv_block(inputs, inputs, 3, dilation=dilation, groups=inputs)
    pointwise = conv_block(inputs, outputs)
    return nn.Sequential(OrderedDict(depthwise_conv=depthwise, pointwise_conv=pointwise))


def pooled_block(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """The means of side x side parts of a map, and a 1x1 convolution with batch norm and ReLU."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(side), conv_block(inputs, outputs))


def initialise(module: nn.Module) -> None:
    """Give one layer its first weights; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DeepLabV2(nn.Module):
    """The sum of four dilated 3x3 convolutions of the last map, each with batch norm and ReLU."""

    def __init__(self, channels: int, low_channels: int, width: int) -> None:
        super().__init__()
        del low_channels
        self.aspp_modules = nn.ModuleList(
            conv_block(channels, width, 3, dilation=dilation) for dilation in DEEPLABV2_DILATIONS
        )
        self.apply(initialise)

    def forward(self, low: Tensor, last: Tensor) -> Tensor:
        """Maps (B, E, H, W) and (B, D, h, w) -> (B, C, h, w)."""
        del low
        return functools.reduce(torch.add, (branch(last) for branch in self.aspp_modules))


class DeepLabV3Plus(nn.Module):
    """The image's mean, a 1x1 and three separable dilated convolutions; refined at stride 4."""

    def __init__(self, channels: int, low_channels: int, width: int) -> None:
        super().__init__()
        self.image_pool = pooled_block(channels, width, 1)
        dilated = (
            separable_block(channels, width, dilation=dilation)
            for dilation in DEEPLABV3PLUS_DILATIONS
        )
        self.aspp_modules = nn.ModuleList([conv_block(channels, width), *dilated])
        branches = len(self.aspp_modules) + 1
        self.bottleneck = conv_block(branches * width, width, 3)
        self.c1_bottleneck = conv_block(low_channels, DEEPLABV3PLUS_LOW)
        self.sep_bottleneck = nn.Sequential(
            separable_block(width + DEEPLABV3PLUS_LOW, width), separable_block(width, width)
        )
        self.apply(initialise)

    def forward(self, low: Tensor, last: Tensor) -> Tensor:
        """Maps (B, E, H, W) and (B, D, h, w) -> (B, C, H, W)."""
        pooled = upsample(self.image_pool(last), last.shape[-2:])
        branches = [branch(last) for branch in self.aspp_modules]
        coarse = self.bottleneck(torch.cat([pooled, *branches], dim=1))
        fine = self.c1_bottleneck(low)
        return self.sep_bottleneck(torch.cat([upsample(coarse, low.shape[-2:]), fine], dim=1))


class PSPNet(nn.Module):
    """The last map beside means of its parts, merged by a 3x3 convolution."""

    def __init__(self, channels: int, low_channels: int, width: int) -> None:
        super().__init__()
        del low_channels
        self.psp_modules = nn.ModuleList(
            pooled_block(channels, width, side) for side in PSPNET_POOLS
        )
        self.bottleneck = conv_block(channels + len(PSPNET_POOLS) * width, width, 3)
        self.apply(initialise)

    def forward(self, low: Tensor, last: Tensor) -> Tensor:
        """Maps (B, E, H, W) and (B, D, h, w) -> (B, C, h, w)."""
        del low
        pooled = [upsample(pool(last), last.shape[-2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([last, *pooled], dim=1))


class LrAspp(nn.Module):
    """The light head of MobileNetV3 (Howard et al., 2019), for small and fast networks.

    128 channels of the last map, each of them weighted by a gate that sees the whole image, go
    linearly to the features at stride 4, together with the map there: one convolution over both is
    the published sum of two, and the wide features need no upsampling.
    """

    def __init__(self, channels: int, low_channels: int, width: int) -> None:
        super().__init__()
        self.project = conv_block(channels, LRASPP_HIDDEN)
        self.gate = nn.Conv2d(channels, LRASPP_HIDDEN, 1, bias=False)
        self.features = nn.Conv2d(LRASPP_HIDDEN + low_channels, width, 1)
        self.apply(initialise)

    def forward(self, low: Tensor, last: Tensor) -> Tensor:
        """Maps (B, E, H, W) and (B, D, h, w) -> (B, C, H, W)."""
        return self.features(self.merge(low, last))

    def merge(self, low: Tensor, last: Tensor) -> Tensor:
        """What the features are a linear map of: (B, 128 + E, H, W)."""
        gate = self.gate(F.adaptive_avg_pool2d(last, 1)).sigmoid()
        gated = upsample(self.project(last) * gate, low.shape[-2:])
        return torch.cat([gated, low], dim=1)


class HeadKind(NamedTuple):
    """One head.

    Attributes:
        build: makes it of D, E and C.
        min_batch: images that a training step needs: 2 where a batch norm sees one value of each.
    """

    build: Callable[[int, int, int], nn.Module]
    min_batch: int


HEADS = {
    "deeplabv2": HeadKind(DeepLabV2, 1),
    "deeplabv3plus": HeadKind(DeepLabV3Plus, 2),
    "pspnet": HeadKind(PSPNet, 2),
    "lraspp": HeadKind(LrAspp, 1),
}
