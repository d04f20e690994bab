"""Transformer decoder over image tokens, with sine position encoding.

Letters: B batch, L decoder layers, Q queries, N memory tokens, D width, h w token grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.blocks import Attention


class TransformerDecoderLayer(nn.Module):
    """One DETR layer: self-attention, cross-attention, feed-forward, each followed by LayerNorm.

    Args:
        dim: Width D of queries and memory.
        num_heads: Attention heads, a divisor of `dim`.
        feedforward_dim: Hidden width of the feed-forward part.
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

    def forward(self, target: Tensor, query_pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Refine `target` (B, Q, D) by attending to `keys` and `values` (B, N, D).

        `query_pos` (B, Q, D) is added to whatever asks, and to the keys of self-attention; values
        carry no position.
        """
        queries = target + query_pos
        attended, _ = self.self_attn(queries, queries, target, need_weights=False)
        target = self.norm1(target + attended)
        attended, _ = self.multihead_attn(target + query_pos, keys, values, need_weights=False)
        target = self.norm2(target + attended)
        return self.norm3(target + self.linear2(self.linear1(target).relu()))


class TransformerDecoder(nn.Module):
    """DETR decoder with post-norm layers and one final LayerNorm shared by all layers.

    Args:
        dim: Width D of queries and memory.
        num_layers: Number of layers L, at least 1.
        num_heads: Attention heads, a divisor of `dim`.
        feedforward_dim: Hidden width of the feed-forward parts.

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

    def forward(self, queries: Tensor, memory: Tensor, memory_pos: Tensor | None = None) -> Tensor:
        """Decode object queries from image tokens.

        Args:
            queries: (B, Q, D) learned query embeddings; the decoded state itself starts at zero.
            memory: (B, N, D) image tokens.
            memory_pos: (N, D) or (1, N, D) position encoding added to the keys, never to the
                values; None for memory without positions (SelfMask).

        Returns:
            (B, L, Q, D) state after every layer, each through the shared final LayerNorm.
        """
        keys = memory if memory_pos is None else memory + memory_pos
        target = torch.zeros_like(queries)
        outputs = []
        for layer in self.layers:
            target = layer(target, queries, keys, memory)
            outputs.append(self.norm(target))
        return torch.stack(outputs, dim=1)


def sine_position_encoding(
    height: int,
    width: int,
    dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Two-dimensional sine code of a token grid, as in DETR.

    The first D/2 features code the row and the last D/2 the column; in each half, sine and cosine
    alternate over frequencies 10000^(-2i / (D/2)). Indices, from 1 on, are scaled to (0, 2 pi].

    Args:
        height: Rows h of the grid.
        width: Columns w of the grid.
        dim: Features D, a multiple of 4.
        device: Where the encoding is made.
        dtype: Its type.

    Returns:
        (h * w, D) encoding in raster order.

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

    rows = code(height)[:, None].expand(height, width, half)
    columns = code(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1).to(dtype)
