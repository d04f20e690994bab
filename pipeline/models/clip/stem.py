"""A convolutional stem in place of the patch embedding of a ViT.

From "Early Convolutions Help Transformers See Better" (Xiao et al., 2021): strided 3 x 3
convolutions halve the image until a position stands for a patch, so that a small network knows
shapes which a linear map of patches would take very long to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Norm = Callable[[int], nn.Module]


def _no_norm(_: int) -> nn.Module:
    return nn.Identity()


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), 3 x 3, on (B, C, H, W)."""

    def __init__(self, width: int, norm: Norm = _no_norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.first_norm = norm(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.second_norm = norm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Same size."""
        inner = torch.relu(self.first_norm(self.first(maps)))
        return torch.relu(maps + self.second_norm(self.second(inner)))


class Halving(nn.Module):
    """relu(conv(x)), 3 x 3, stride 2: (B, C, H, W) -> (B, D, H / 2, W / 2)."""

    def __init__(self, channels: int, width: int, norm: Norm = _no_norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm = norm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Half the size."""
        return torch.relu(self.norm(self.conv(maps)))


class ConvStem(nn.Module):
    """Images (B, 3, H, W) -> (B, D, h, w), one position a patch; see the module.

    Attributes:
        patch_size: height and width of a patch, 2 to the number of stages.
    """

    def __init__(
        self, out_width: int, *, width: int, blocks: Sequence[int], norm: Norm = _no_norm
    ) -> None:
        """Stages of 1, 2, 4, ... times `width` channels.

        Args:
            out_width: D.
            width: channels of the first stage.
            blocks: number of residual blocks of each stage.
            norm: what follows every convolution, by its channels. What is stored has none: see
                `folded`.
        """
        super().__init__()
        self.patch_size = (2 ** len(blocks),) * 2
        self._sizes = (out_width, width, tuple(blocks))
        layers: list[nn.Module] = []
        channels = 3
        for stage, count in enumerate(blocks):
            layers.append(Halving(channels, width * 2**stage, norm))
            channels = width * 2**stage
            layers += [ResidualBlock(channels, norm) for _ in range(count)]
        self.stages = nn.Sequential(*layers)
        self.projection = nn.Conv2d(channels, out_width, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """What exceeds a multiple of the patch at the right and bottom is ignored."""
        (height, width), (patch, _) = images.shape[-2:], self.patch_size
        images = images[..., : height - height % patch, : width - width % patch]
        images = images.contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.projection(self.stages(images))
        return maps

    def normalised(self) -> ConvStem:
        """A new one of these sizes with batch norms, to be trained from random weights."""
        out_width, width, blocks = self._sizes
        return ConvStem(out_width, width=width, blocks=blocks, norm=nn.BatchNorm2d)

    @torch.no_grad()
    def folded(self) -> ConvStem:
        """The same function in evaluation mode without batch norms: they are in its weights."""
        out_width, width, blocks = self._sizes
        stem = ConvStem(out_width, width=width, blocks=blocks)
        for mine, its in zip(self.stages, stem.stages, strict=True):
            for conv, norm in CONVOLUTIONS[type(mine)]:
                folded = _fold(getattr(mine, conv), getattr(mine, norm))
                getattr(its, conv).load_state_dict(folded)
        stem.projection.load_state_dict(self.projection.state_dict())
        return stem


CONVOLUTIONS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    Halving: (("conv", "norm"),),
    ResidualBlock: (("first", "first_norm"), ("second", "second_norm")),
}


def _fold(conv: nn.Conv2d, norm: nn.Module) -> dict[str, Tensor]:
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return conv.state_dict()
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return {"weight": weight, "bias": bias}
