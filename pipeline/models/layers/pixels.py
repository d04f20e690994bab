"""From a network's scores to the label of every pixel, as the settings have it.

Letters: B images, K label ids, H W pixels, h w grid of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.layers.interpolate import joint_foreground_labels, upsample, upsampled_labels
from pipeline.models.layers.pamr import refined
from pipeline.params.base import PredictionSettings


def labels_of_pixels(
    scores: Tensor,
    images: Tensor,
    size: Sequence[int],
    *,
    scale: float,
    settings: PredictionSettings,
    has_background: bool,
    through: Sequence[Sequence[int]] = (),
) -> Tensor:
    """The best label of every pixel, (B, H, W) int64, of equals the first.

    Args:
        scores: (B, K, h, w) float32.
        images: (B, 3, H', W') of which they are, for `pamr`.
        size: (H, W).
        scale: factor of the scores in their softmax.
        settings: of which `pamr` and `joint_foreground` count.
        has_background: whether label 0 is the background; without one, none is told apart.
        through: sizes (H, W) of resizings before that to `size`; refined scores skip them.
    """
    sizes = [*through, size]
    probability_scale: float | None = scale
    if settings.pamr is not None:
        scores = (scale * upsample(scores, images.shape[-2:])).softmax(dim=1)
        scores = refined(scores, images, settings.pamr)
        sizes, probability_scale = [size], None
    if settings.joint_foreground and has_background:
        return joint_foreground_labels(scores, *sizes, scale=probability_scale)
    return upsampled_labels(scores, *sizes)


def check_joint_foreground(text: Tensor, scale: float) -> None:
    """Refuse a joint foreground that leaves no background.

    The odds of K categories against the background sum to K exp(-scale |b - m|) at least, for unit
    patch embeddings, the background's text b and the mean m of the categories'.

    Args:
        text: (1 + K, C) unit rows, the background's first.
        scale: factor of the cosines in their softmax.

    Raises:
        PipelineError: the sum exceeds 1 whatever an image shows.
    """
    count = len(text) - 1
    if count and scale * float((text[0] - text[1:].mean(dim=0)).norm()) < math.log(count):
        raise PipelineError(
            f"evaluate.joint_foreground: with {count} categories and cosines times {scale:g} "
            "(train.logit_scale) no pixel could be background; train with 20, with which it was "
            "measured, or set it to false"
        )
