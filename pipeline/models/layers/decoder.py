"""Transformer decoder over image tokens, with sine position encoding.

Letters: B batch, L decoder layers, Q queries, N memory tokens, D width, E features of a token
before its last layer, h w token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.layers.blocks import Attention


@dataclass(frozen=True)
class Memory:
    """Image tokens (B, N, D) that queries attend to, with all linear maps of them at once.

    Where the tokens come from a linear layer of E < D features, what is wanted of them takes one
    product with E features instead of two, of which one has D: two linear layers in a row are one.

    Attributes:
        features: (B, N, E), or the tokens themselves.
        layer: E -> D, makes the tokens; None if `features` are they.
        positions: codes of rows (h, D/2) and of columns (w, D/2) of the grid, N = h w, as from
            `sine_codes`; they are added to the keys, never to the values. None: no positions.
    """

    features: Tensor
    layer: nn.Linear | None = None
    positions: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, features: Tensor, layer: nn.Linear, positions: tuple[Tensor, Tensor] | None = None
    ) -> Memory:
        """Tokens that `layer` makes of features (B, N, E), held in the smaller of both forms."""
        if layer.in_features < layer.out_features:
            return cls(features, layer, positions)
        return cls(layer(features), None, positions)

    def values(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The tokens projected by a weight (D, D) and a bias (D,)."""
        if self.layer is not None:
            bias = F.linear(self.layer.bias, weight, bias)
            weight = weight @ self.layer.weight
        return F.linear(self.features, weight, bias)

    def keys(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The tokens with their positions, projected likewise."""
        keys = self.values(weight, bias)
        if self.positions is None:
            return keys
        by_row, by_column = (
            F.linear(codes, part)
            for codes, part in zip(self.positions, weight.chunk(2, dim=1), strict=True)
        )
        return keys + (by_row[:, None] + by_column).flatten(0, 1)

    def dot(self, queries: Tensor) -> Tensor:
        """Products (B, M, N) of the tokens with queries (B, M, D), in float32."""
        if self.layer is None:
            return queries @ self.features.float().transpose(1, 2)
        folded = queries @ self.layer.weight.float()
        offset = queries @ self.layer.bias.float()
        return folded @ self.features.float().transpose(1, 2) + offset[..., None]


class TransformerDecoderLayer(nn.Module):
    """One DETR layer: self-attention, cross-attention, feed-forward, each followed by LayerNorm.

    Args:
        dim: width D of queries and memory.
        num_heads: attention heads, a divisor of `dim`.
        feedforward_dim: hidden width of the feed-forward part.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.multihead_attn = Attention(dim, num_heads)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, target: Tensor, query_pos: Tensor, memory: Memory) -> Tensor:
        """Refine `target` (B, Q, D) by attending to itself and to the memory.

        `query_pos` (B, Q, D) is added to whatever asks, and to the keys of self-attention; values
        carry no position.
        """
        queries = target + query_pos
        attended, _ = self.self_attn(queries, queries, target, need_weights=False)
        target = self.norm1(target + attended)
        query, key, value = self.multihead_attn.projections()
        attended = self.multihead_attn.attend(
            F.linear(target + query_pos, *query), memory.keys(*key), memory.values(*value)
        )
        target = self.norm2(target + attended)
        return self.norm3(target + self.linear2(self.linear1(target).relu()))


class TransformerDecoder(nn.Module):
    """DETR decoder with post-norm layers and one final LayerNorm shared by all layers.

    Args:
        dim: width D of queries and memory.
        num_layers: number of layers L, at least 1.
        num_heads: attention heads, a divisor of `dim`.
        feedforward_dim: hidden width of the feed-forward parts.

    Raises:
        PipelineError: `num_layers` is below 1 or `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, feedforward_dim: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise PipelineError(f"decoder_layers: {num_layers} layers: at least 1 is needed")
        if num_heads < 1 or dim % num_heads:
            raise PipelineError(
                f"num_heads: {num_heads} attention heads do not divide the decoder's width {dim}; "
                "choose a divisor of it"
            )
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim, num_heads, feedforward_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, memory: Memory) -> Tensor:
        """Decode object queries from image tokens.

        Args:
            queries: (B, Q, D) learned query embeddings; the decoded state itself starts at zero.
            memory: N image tokens, with positions or (SelfMask) without.

        Returns:
            (B, L, Q, D) state after every layer, each through the shared final LayerNorm.
        """
        target = torch.zeros_like(queries)
        outputs = []
        for layer in self.layers:
            target = layer(target, queries, memory)
            outputs.append(self.norm(target))
        return torch.stack(outputs, dim=1)


def sine_codes(
    height: int,
    width: int,
    dim: int,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two-dimensional sine code of a token grid, as in DETR, in two parts.

    The first D/2 features of a token code its row and the last D/2 its column; in each half, sine
    and cosine alternate over frequencies 10000^(-2i / (D/2)). Indices, from 1 on, are scaled to
    (0, 2 pi].

    Args:
        height: rows h of the grid.
        width: columns w of the grid.
        dim: features D, a multiple of 4.
        device: where the codes are made.

    Returns:
        Codes of the rows (h, D/2) and of the columns (w, D/2), float32.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine position encoding needs a multiple of 4 features, got {dim}")
    half = dim // 2
    exponent = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    periods = 10000.0**exponent

    def code(length: int) -> Tensor:
        index = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        angles = (index / (length + 1e-6) * (2 * math.pi))[:, None] / periods
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    return code(height), code(width)
