"""Features of the patches of CLIP's image towers.

Letters: B images, D tower width, h x w patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip.tokens import embed_patches


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, C, H, W) at the right and bottom until both sides are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def vit_features(
    visual: VisionTransformer,
    images: Tensor,
    *,
    layer: int,
    facet: str,
) -> Tensor:
    images = pad_to_multiple(images, square_side(visual.patch_size))
    tokens, grid = embed_patches(visual, images, position_resize="grid")
    blocks = visual.transformer.resblocks
    if not -len(blocks) <= layer < len(blocks):
        raise PipelineError(f"layer: {layer} does not exist; this ViT has {len(blocks)} blocks")
    chosen = layer % len(blocks)
    for block in blocks[:chosen]:
        tokens = block(tokens)
    block = blocks[chosen]
    if facet == "token":
        tokens = block(tokens)
    else:
        key, value = key_and_value(block.attn)
        tokens = F.linear(block.ln_1(tokens), *(key if facet == "key" else value))
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def resnet_features(visual: ModifiedResNet, images: Tensor, *, layer: int, facet: str) -> Tensor:
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if not -len(stages) <= layer < len(stages):
        raise PipelineError(f"layer: {layer} does not exist; this ResNet has {len(stages)} stages")
    chosen = layer % len(stages)
    if facet != "token" and chosen != len(stages) - 1:
        raise PipelineError(f"layer: {layer}: a ResNet has {facet}s in its last stage only; use -1")
    features = visual.stem(pad_to_multiple(images, 2 ** (2 + chosen)))
    for stage in stages[: chosen + 1]:
        features = stage(features)
    if facet != "token":
        pool = visual.attnpool
        project = pool.k_proj if facet == "key" else pool.v_proj
        projected = project(features.flatten(2).transpose(1, 2))
        features = projected.transpose(1, 2).unflatten(2, features.shape[-2:])
    return features


def key_and_value(
    attention: nn.MultiheadAttention,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of keys, and of values."""
    _, key_bias, value_bias = attention.in_proj_bias.chunk(3)
    if attention.in_proj_weight is None:  # keys and values of another width than the queries
        key, value = attention.k_proj_weight, attention.v_proj_weight
    else:
        _, key, value = attention.in_proj_weight.chunk(3)
    return (key, key_bias), (value, value_bias)


def square_side(size: int | Sequence[int]) -> int:
    """The side of a square given as int or (height, width)."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise PipelineError(f"encoder.model: input of {tuple(size)} is not square")
    return size[0]
