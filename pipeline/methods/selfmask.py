"""What `pipeline selfmask train` reads: how SelfMask is trained from scratch."""

from __future__ import annotations

from typing import Literal

from pipeline.methods.masks import SpectralParams
from pipeline.params.base import Count, EncoderParams, Positive, Probability, Section
from pipeline.training.settings import Range


class SelfMaskNetwork(Section):
    """Geometry of a SelfMask, see `SelfMaskConfig`; by default a ViT-S/16 with 20 queries."""

    dim: Count = 384
    depth: Count = 12
    num_heads: Count = 6
    patch_size: Count = 16
    num_queries: Count = 20
    decoder_layers: Count = 6
    mlp_ratio: Count = 4
    grid: Count = 14


class SelfMaskVotes(SpectralParams):
    """Three sources of features; in the paper they are DINO, MoCo v2 and SwAV."""

    encoder: EncoderParams = EncoderParams(model="dino_vits16", pretrained="")
    more_encoders: list[EncoderParams] = [
        EncoderParams(model="dino_vits8", pretrained=""),
        EncoderParams(),
    ]
    facet: Literal["key", "token"] = "token"
    short_side: Count = 256


class SelfMaskTraining(Section):
    """SelfMask from scratch, by its recipe: `network` learns what features of `votes` agree on.

    `initial` is a file or a name of `pipeline weights list` with the weights of a DINO that the
    network's encoder starts from; random ones if empty. Images, of the short side of the votes, are
    resized by a factor of `scale_range` and cropped to `crop_size`; `flip`, `colour_jitter`,
    `greyscale` and `blur` are probabilities.
    """

    votes: SelfMaskVotes = SelfMaskVotes()
    network: SelfMaskNetwork = SelfMaskNetwork()
    initial: str = ""
    iterations: Count = 20_000
    batch_size: Count = 16
    learning_rate: Positive = 2e-4
    crop_size: Count = 224
    scale_range: Range = [0.9, 1.5]
    flip: Probability = 0.5
    colour_jitter: Probability = 0.8
    greyscale: Probability = 0.2
    blur: Probability = 0.5
