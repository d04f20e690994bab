"""ZUTIS as its description reads: every product written where the text has it.

Letters: B batch, L decoder layers, Q queries, D width, C text space, N tokens, H W pixels; h w is
the token grid after upsampling. Sequences come first, (N, B, D), as in CLIP and DETR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]

HEAD_WIDTH = 64  # of CLIP
DECODER_HEADS = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def published_forward(weights: Weights, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] -> mask_probs (B, L, Q, h, w), patch_tokens (B, h, w, C).

    Tokens are upsampled before they are projected; the decoder's attention forms its matrices.
    """
    mean, std = torch.tensor((MEAN, STD), device=images.device)[..., None, None]
    images = (images - mean) / std
    tokens, (height, width) = _encode(weights, images)
    batch, _, dim = tokens.shape
    maps = tokens.view(batch, height, width, dim).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, scale_factor=2, mode="bilinear")
    height, width = 2 * height, 2 * width
    tokens = maps.permute(0, 2, 3, 1).reshape(batch, height * width, dim)
    memory = _perceptron(weights, "ffn1", tokens.detach())
    queries = _decode(weights, memory, _positions(height, width, dim).to(memory))
    queries = _perceptron(weights, "ffn2", queries)
    queries = queries / queries.norm(dim=-1, keepdim=True)
    memory_map = memory.view(batch, height, width, dim)
    mask_probs = torch.einsum("blqd,bhwd->blqhw", queries, memory_map).sigmoid()
    token_map = tokens.view(batch, height, width, dim)
    projected = torch.einsum("bhwd,dc->bhwc", token_map, weights["encoder.proj"])
    projected = F.layer_norm(projected, projected.shape[1:])
    return mask_probs, projected / (projected.norm(dim=-1, keepdim=True) + 1e-7)


def _encode(weights: Weights, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """CLIP's patch tokens (B, N, D) after the last norm, and their grid."""
    filters = weights["encoder.conv1.weight"]
    patches = F.conv2d(images, filters, stride=filters.shape[-1])
    height, width = patches.shape[-2:]
    patches = patches.flatten(2).permute(0, 2, 1)
    class_token = weights["encoder.class_embedding"].expand(len(images), 1, -1)
    tokens = torch.cat((class_token, patches), dim=1)
    tokens = tokens + _resized(weights["encoder.positional_embedding"], height, width)
    tokens = _norm(weights, "encoder.ln_pre", tokens).permute(1, 0, 2)
    heads = tokens.shape[-1] // HEAD_WIDTH
    block = 0
    while f"encoder.transformer.resblocks.{block}.ln_1.weight" in weights:
        name = f"encoder.transformer.resblocks.{block}"
        normed = _norm(weights, f"{name}.ln_1", tokens)
        tokens = tokens + _attend(weights, f"{name}.attn", normed, normed, normed, heads=heads)
        hidden = _linear(weights, f"{name}.mlp.c_fc", _norm(weights, f"{name}.ln_2", tokens))
        tokens = tokens + _linear(
            weights, f"{name}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden)
        )
        block += 1
    tokens = tokens.permute(1, 0, 2)[:, 1:]
    return _norm(weights, "encoder.ln_post", tokens), (height, width)


def _resized(positions: Tensor, height: int, width: int) -> Tensor:
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat((positions[:1], grid.permute(0, 2, 3, 1).flatten(0, 2)))


def _decode(weights: Weights, memory: Tensor, positions: Tensor) -> Tensor:
    """DETR's decoder on memory (B, N, D): states (B, L, Q, D) of all layers."""
    memory = memory.permute(1, 0, 2)
    query_embed = weights["query_embed"][:, None].repeat(1, memory.shape[1], 1)
    target = torch.zeros_like(query_embed)
    outputs = []
    layer = 0
    while f"decoder.layers.{layer}.norm1.weight" in weights:
        name = f"decoder.layers.{layer}"
        queries = target + query_embed
        attended = _attend_with_matrix(weights, f"{name}.self_attn", queries, queries, target)
        target = _norm(weights, f"{name}.norm1", target + attended)
        attended = _attend_with_matrix(
            weights, f"{name}.multihead_attn", target + query_embed, memory + positions, memory
        )
        target = _norm(weights, f"{name}.norm2", target + attended)
        hidden = F.relu(_linear(weights, f"{name}.linear1", target))
        target = _norm(
            weights, f"{name}.norm3", target + _linear(weights, f"{name}.linear2", hidden)
        )
        outputs.append(_norm(weights, "decoder.norm", target))
        layer += 1
    return torch.stack(outputs).permute(2, 0, 1, 3)


def _positions(height: int, width: int, dim: int) -> Tensor:
    """DETR's sine code (N, 1, D): features of the row, then of the column."""
    rows = torch.arange(1, height + 1)[:, None].expand(height, width)
    columns = torch.arange(1, width + 1)[None].expand(height, width)
    index = torch.arange(dim // 2)
    periods = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / (dim // 2))
    halves = []
    for coordinate, length in ((rows, height), (columns, width)):
        angles = (coordinate / (length + 1e-6) * 2 * math.pi)[..., None] / periods
        waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
        halves.append(waves.flatten(-2))
    return torch.cat(halves, dim=-1).flatten(0, 1)[:, None]


def _attend(
    weights: Weights, name: str, query: Tensor, key: Tensor, value: Tensor, *, heads: int
) -> Tensor:
    """torch's attention as CLIP calls it."""
    attended, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        query.shape[-1],
        heads,
        weights[f"{name}.in_proj_weight"],
        weights[f"{name}.in_proj_bias"],
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weights[f"{name}.out_proj.weight"],
        out_proj_bias=weights[f"{name}.out_proj.bias"],
        need_weights=False,
    )
    return attended


def _attend_with_matrix(
    weights: Weights, name: str, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """softmax(q k / sqrt(d)) v with the matrix of weights, which DETR's decoder asks for."""
    projections = zip(
        (query, key, value),
        weights[f"{name}.in_proj_weight"].chunk(3),
        weights[f"{name}.in_proj_bias"].chunk(3),
        strict=True,
    )
    query, key, value = (
        F.linear(inputs, weight, bias).unflatten(2, (DECODER_HEADS, -1)).permute(1, 2, 0, 3)
        for inputs, weight, bias in projections
    )
    matrix = (query / math.sqrt(query.shape[-1]) @ key.transpose(2, 3)).softmax(dim=-1)
    attended = (matrix @ value).permute(2, 0, 1, 3).flatten(2)
    return _linear(weights, f"{name}.out_proj", attended)


def _perceptron(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    inputs = F.relu(_linear(weights, f"{name}.layers.0", inputs))
    inputs = F.relu(_linear(weights, f"{name}.layers.1", inputs))
    return _linear(weights, f"{name}.layers.2", inputs)


def _linear(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    return F.linear(inputs, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    return F.layer_norm(
        inputs, inputs.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"]
    )
