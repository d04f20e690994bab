"""The network of DenseCLIP+ (DenseCLIP paper, section 3.4): any segmenter, classified by text.

Letters: B batch, C text space, K names, H W pixels, h w cells of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError, did_you_mean
from pipeline.models.layers.interpolate import upsample
from pipeline.models.plus.backbones import Backbone, build_backbone
from pipeline.models.plus.heads import HEADS, LrAspp

CLASSIFIER_STD = 0.01  # of its first weights, as in the published code


class PlusNetwork(nn.Module):
    """A backbone and a head whose features lie in CLIP's text space, and how they are classified.

    Training normalises by the statistics of each batch. With the heads `deeplabv3plus` and
    `pspnet`, which pool an image to one cell, a step needs two images at least: of one image, one
    value is left of a channel, and its norm is nothing. The published code fails there, too. With
    every network, images of one cell of the last map need a second image likewise.

    Args:
        backbone: gives the two maps.
        head: name of `HEADS`.
        channels: C.
        background: whether to learn a row for what has no name.
        num_classes: outputs of a learned classifier in place of text; None for text.
        mean: of the channels R, G, B in [0, 1], taken off the input.
        std: their standard deviation, likewise.

    Attributes:
        background: (1, C) row, of unit norm where it is used; None without one.
        classifier: the learned one, with bias; None for text.
        mean, std: (1, 3, 1, 1), not saved.

    Raises:
        PipelineError: an option is unknown, or two of them do not go together.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: str,
        *,
        channels: int,
        background: bool,
        num_classes: int | None = None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        _check(head, channels, background, num_classes, mean, std)
        self.backbone = backbone
        self.head_name = head
        self.head = HEADS[head].build(backbone.channels, backbone.low_channels, channels)
        self.background = nn.Parameter(torch.randn(1, channels)) if background else None
        self.classifier = _classifier(channels, num_classes) if num_classes else None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, not normalised.

        Sides below the stride of the last map are enlarged to it, as some backbones need.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, C, h, w), over the whole image: at the stride of the last map or at 4, by the head.

        Raises:
            PipelineError: fewer images than a training step of the head needs.
        """
        features: Tensor = self.head(*self._maps(images))
        return features

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's maps of images, see `forward`."""
        needed = HEADS[self.head_name].min_batch
        if self.training and len(images) < needed:
            raise PipelineError(
                f"batch_size: {len(images)} image a step is too few for the head "
                f"{self.head_name}, whose batch norms need {needed}"
            )
        images = (images - self.mean) / self.std
        sides = [max(side, self.backbone.strides[-1]) for side in images.shape[-2:]]
        if sides != list(images.shape[-2:]):
            images = upsample(images, sides)
        low, last = self.backbone(images)
        return low, last

    def classify(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """`logits` of the features of images, to rounding.

        Features that are a linear map of something narrower are not made: the map is that of the
        rows, which are few where features are wide.

        Args:
            images: as for `forward`.
            text: as for `logits`, and what it raises.

        Returns:
            What `logits` gives, float32 under autocast too.
        """
        low, last = self._maps(images)
        if not isinstance(self.head, LrAspp):
            return self.logits(self.head(low, last), text)
        merged, linear = self.head.merge(low, last), self.head.features
        with torch.autocast(images.device.type, enabled=False):
            rows, bias = self._rows(text)
            offset = rows @ linear.bias  # type: ignore[operator]  # this convolution has one
            offset = offset if bias is None else offset + bias
            return _linear(merged.float(), rows @ linear.weight.flatten(1), offset)

    def logits(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        """What is more likely of every cell, float32 under autocast too.

        There is no temperature, no bias, and the features keep their length. No gradient reaches
        the text.

        Args:
            features: (B, C, h, w) of `forward`.
            text: (K, C) rows of unit norm; of no use to a learned classifier.

        Returns:
            (B, K, h, w), or (B, 1 + K, h, w) with the background first, or what the learned
            classifier says of its classes.

        Raises:
            PipelineError: there is no text and no learned classifier either.
        """
        with torch.autocast(features.device.type, enabled=False):
            return _linear(features.float(), *self._rows(text))

    def _rows(self, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows (R, C) and bias (R,) of the classifier, float32."""
        if self.classifier is not None:
            return self.classifier.weight.flatten(1), self.classifier.bias
        if text is None:
            raise PipelineError("text: a network without a learned classifier needs its rows")
        rows = text.detach().to(self.mean)
        if self.background is not None:
            rows = torch.cat([F.normalize(self.background.float(), dim=-1), rows])
        return rows, None

    def extra_repr(self) -> str:
        """The architecture in one line, for messages."""
        return f"{self.backbone.name}, {self.head_name}"


def build_plus(
    *,
    backbone: str,
    head: str,
    channels: int,
    background: bool,
    num_classes: int | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    output_stride: int = 8,
) -> PlusNetwork:
    """A network with fresh weights; the arguments are those of `build_backbone`, `PlusNetwork`.

    Raises:
        PipelineError: one of them is unknown, or two do not go together.
    """
    return PlusNetwork(
        build_backbone(backbone, output_stride=output_stride),
        head,
        channels=channels,
        background=background,
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def _linear(maps: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Maps (B, C, h, w) -> (B, R, h, w)."""
    return F.conv2d(maps, rows[:, :, None, None], bias)


def _check(
    head: str,
    channels: int,
    background: bool,
    num_classes: int | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if head not in HEADS:
        hint = did_you_mean(head, list(HEADS))
        raise PipelineError(f"head: {head!r}: {hint}known are {', '.join(HEADS)}")
    if channels < 1 or (num_classes is not None and num_classes < 1):
        raise PipelineError(
            f"channels: {channels}, num_classes: {num_classes}; both are at least 1"
        )
    if background and num_classes is not None:
        raise PipelineError(
            "background: a learned row stands beside text; a learned classifier has the "
            "background among its classes"
        )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise PipelineError(f"mean: {mean}, std: {std}; both are three numbers, std above 0")


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD)
    nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]
    return classifier
