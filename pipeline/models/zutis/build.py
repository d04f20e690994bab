"""Assemble ZUTIS and save its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.models.clip import dense_tower
from pipeline.models.clip.tokens import PositionResize
from pipeline.models.layers.blocks import with_lean_parts
from pipeline.models.layers.decoder import TransformerDecoder
from pipeline.models.layers.perceptron import Perceptron
from pipeline.models.zutis.network import IMAGENET_MEAN, IMAGENET_STD, TokenNorm, Zutis

FFN_HIDDEN = 256


def build_zutis(
    encoder: nn.Module,
    *,
    num_queries: int = 100,
    decoder_layers: int = 6,
    num_heads: int = 8,
    feedforward_dim: int = 2048,
    stop_gradient: bool = True,
    query_norm: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    position_resize: PositionResize = "scale",
    token_norm: TokenNorm = "map",
) -> Zutis:
    """Put a freshly initialised ZUTIS around the image tower of a CLIP.

    Args:
        encoder: image tower; trained further, not copied.
        num_queries: learned queries Q.
        decoder_layers: decoder layers L.
        num_heads: attention heads of the decoder, a divisor of the width of the tower's map.
        feedforward_dim: hidden width of the decoder's feed-forward parts.
        stop_gradient: see `Zutis`.
        query_norm: see `Zutis`; so are `mean`, `std`, `position_resize` and `token_norm`.

    Raises:
        PipelineError: `encoder` has no map, the numbers do not fit together, or an option is
            unknown; the message says which.
    """
    if num_queries < 1 or feedforward_dim < 1:
        raise PipelineError(
            f"num_queries: {num_queries}, feedforward_dim: {feedforward_dim}; both are at least 1"
        )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise PipelineError(f"mean: {mean}, std: {std}; both are three numbers, std above 0")
    _check_choice("position_resize", position_resize, get_args(PositionResize))
    _check_choice("token_norm", token_norm, get_args(TokenNorm))
    width = dense_tower(encoder).width
    return Zutis(
        with_lean_parts(encoder),
        TransformerDecoder(width, decoder_layers, num_heads, feedforward_dim),
        Perceptron(width, FFN_HIDDEN, FFN_HIDDEN, width),
        Perceptron(width, FFN_HIDDEN, FFN_HIDDEN, width),
        torch.randn(num_queries, width),
        stop_gradient=stop_gradient,
        query_norm=query_norm,
        mean=mean,
        std=std,
        position_resize=position_resize,
        token_norm=token_norm,
    )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PipelineError(f"{name}: {value!r}; known are {', '.join(known)}")
