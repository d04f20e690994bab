"""Parts of CLIP's and DETR's blocks as in torch and open_clip, with less copying in training.

Letters: B batch, N tokens that ask, M tokens that are asked, D width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUICK_GELU_FACTOR = 1.702


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` over (B, N, D): same weights, names and values.

    In training, queries, keys and values stay views of one projection; torch's own module copies
    them to sequence-first order and back. In evaluation torch's module has a path of its own. A
    graph is made of the path of training, which takes any number of tokens.
    """

    def __init__(self, dim: int, num_heads: int, *, device: str | None = None) -> None:
        super().__init__(dim, num_heads, batch_first=True, device=device)

    @classmethod
    def sharing(cls, attention: nn.MultiheadAttention) -> Self:
        """The same attention, with the parameters of a module that it takes the place of."""
        # On the meta device nothing is initialised, which would draw random numbers.
        shared = cls(attention.embed_dim, attention.num_heads, device="meta")
        shared.in_proj_weight = attention.in_proj_weight
        shared.in_proj_bias = attention.in_proj_bias
        shared.out_proj = attention.out_proj
        return shared.train(attention.training)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from (B, N, D) to (B, M, D): the result (B, N, D), and weights if asked for.

        Args:
            query: what asks.
            key: what is asked.
            value: what answers.
            **options: as for torch's module, which takes over if more is wanted than the result.
        """
        needs_weights = options.pop("need_weights", True)
        takes_own_path = self.training or torch.onnx.is_in_onnx_export()
        if not takes_own_path or needs_weights or any(v is not None for v in options.values()):
            return super().forward(query, key, value, need_weights=needs_weights, **options)
        inputs = (query, key, value)
        projected = [
            F.linear(tokens, weight, bias)
            for tokens, (weight, bias) in zip(inputs, self.projections(), strict=True)
        ]
        return self.attend(*projected), None

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Weight (D, D) and bias (D,) of queries, of keys and of values."""
        return list(zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What (B, N, D) sees of (B, M, D), all of them projected already: (B, N, D)."""
        heads = [
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query, key, value)
        ]
        attended = F.scaled_dot_product_attention(*heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP, by torch's SiLU."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map values of any shape."""
        return _ScaledSilu.apply(inputs)


class _ScaledSilu(torch.autograd.Function):
    """silu(a x) / a, whose derivative is silu's at a x: backward need not scale anything."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        scaled = QUICK_GELU_FACTOR * inputs
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(QUICK_GELU_FACTOR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(upstream, scaled)


def with_lean_parts(network: nn.Module) -> nn.Module:
    """Replace attention and GELU in a CLIP tower, in place; weights and their names stay."""
    for name, child in network.named_children():
        if (
            type(child) is nn.MultiheadAttention
            and child.batch_first
            and child.in_proj_weight is not None
        ):
            setattr(network, name, Attention.sharing(child))
        elif isinstance(child, QuickGELU):
            setattr(network, name, QuickGelu())
        else:
            with_lean_parts(child)
    return network
