"""Image towers that open_clip takes from timm: ViTs by their pooling, and networks of convolutions.

What a pooling does to one position is what it does to a map of that position alone: an attention
returns its value, an average the position itself. So the towers' own modules are run on single
positions. Letters: B images, N positions, D width, C joint embedding, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.layers import AttentionPoolLatent, SelectAdaptivePool2d
from timm.layers.format import Format
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip.features import pad_to_multiple
from pipeline.models.clip.tokens import PositionResize
from pipeline.models.clip.tower import (
    DenseFeatures,
    DenseOptions,
    Facet,
    as_maps,
    as_rows,
    whole_patches,
)

# Attention on the GPU takes fewer than 65,536 sequences times heads.
ROWS_AT_ONCE = 1024
FIXED_SIZE = ("relative_position", "rel_pos", "pos_embed")
AVERAGE = ("avg", "fast", "fastavg")

# Gradients of depthwise convolutions take a third of the time in this layout on a CPU. Not for all:
# torch 2.14 crashes in those of FastViT.
CHANNELS_LAST = (EfficientNet,)


class TimmVit:
    """What is common to timm's ViTs, see `DenseTower`: any grid, blocks, keys.

    Position embeddings are resized by timm (bicubic, antialiased), rotary ones follow the grid;
    prefix tokens (class, registers) take part in the blocks and are not part of the map. The map is
    what the tower pools, after its last norm if that comes before the pooling.
    """

    published = False
    has_keys = True
    stays_in_eval = True

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self._trunk = visual.trunk
        self.patch_size: int = self._trunk.patch_embed.feat_ratio()
        self.width: int = self._trunk.embed_dim
        _take_any_size(self._trunk)

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """Patch tokens (B, D, h, w)."""
        images = whole_patches(images, self.patch_size)
        return self._as_map(self._tokens(images), images)

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Keys or output of a block."""
        images = pad_to_multiple(images, self.patch_size)
        block = self._block(layer)
        with _listening(block if facet == "token" else block.attn) as heard:
            self._tokens(images)
        ((given, returned),) = heard
        if facet == "token":
            return self._as_map(returned, images)
        project = _keys if facet == "key" else _values
        return self._as_map(project(block.attn, given), images)

    def describe(self) -> str:
        """Kind and sizes of the encoder."""
        trunk = self._trunk
        return (
            f"timm's {type(trunk).__name__} of pooling '{trunk.global_pool}', "
            f"patch {self.patch_size}, width {self.width}, {len(trunk.blocks)} encoder blocks"
        )

    def _tokens(self, images: Tensor) -> Tensor:
        """All tokens (B, prefix + h w, D) after the last norm."""
        trunk = self._trunk
        if getattr(trunk, "rope", None) is not None:
            grid = [side // self.patch_size for side in images.shape[-2:]]
            trunk.rope.update_feat_shape(grid)
        tokens: Tensor = trunk.forward_features(images)
        return tokens

    def _as_map(self, tokens: Tensor, images: Tensor) -> Tensor:
        grid = [side // self.patch_size for side in images.shape[-2:]]
        patches = tokens[:, self._trunk.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, grid)

    def _block(self, layer: int) -> Any:
        count = len(self._trunk.blocks)
        if not -count <= layer < count:
            raise PipelineError(f"layer: {layer} does not exist; this ViT has {count} blocks")
        return self._trunk.blocks[layer]

    def _after_pooling(self, rows: Tensor) -> Tensor:
        """What follows the pooling, on rows (N, D): (N, C)."""
        trunk = self._trunk
        embedded: Tensor = self.visual.head(trunk.head(trunk.fc_norm(rows)))
        return embedded


class TokenVit(TimmVit):
    """timm's ViT with its class token as embedding (EVA, MobileCLIP-B), see `DenseTower`.

    DenseCLIP takes the value path of the last block with its residual and MLP, and keys that pass
    the output projection, as in CLIP's ViT. ZUTIS has for its head what follows the pooling.
    """

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return as_maps(self._after_pooling(as_rows(maps)), maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features of the value path of the last block, and its keys."""
        images = pad_to_multiple(images, self.patch_size)
        last = self._block(-1)
        with _listening(last) as block, _listening(last.attn) as attention:
            self._tokens(images)
        ((given, _),), ((attended, _),) = block, attention
        maps = self._as_map(given, images)
        values = self._trunk.norm(_one_by_one(last, as_rows(maps))[:, 0])
        keys = last.attn.proj(_keys(last.attn, attended))[:, self._trunk.num_prefix_tokens :]
        features = as_maps(self._after_pooling(values), maps)
        return DenseFeatures(features.float(), keys.float())


class AttentionVit(TimmVit):
    """timm's ViT with attention pooling (SigLIP, SigLIP 2, PE), see `DenseTower`.

    The head is the value path of the pooling with its output projection, residual and MLP.
    """

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        pooled = _one_by_one(self._trunk.attn_pool, as_rows(maps))
        return as_maps(self._after_pooling(pooled), maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features, and keys of the pooling."""
        maps = self.feature_map(pad_to_multiple(images, self.patch_size))
        keys, _ = self._trunk.attn_pool.kv(maps.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        return DenseFeatures(self.project(maps).float(), keys.float())


class AverageVit(TimmVit):
    """timm's ViT whose patch tokens are averaged (ViTamin), see `DenseTower`.

    The head is what follows the pooling. The mean of what it says is what it says about the mean,
    unless a norm (`fc_norm`, as timm puts it there by default) or an MLP follows the pooling: these
    are applied to each position instead, which is not the same.
    """

    has_keys = False

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return as_maps(self._after_pooling(as_rows(maps)), maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features, no keys."""
        maps = self.feature_map(pad_to_multiple(images, self.patch_size))
        return DenseFeatures(self.project(maps).float(), None)


def use_fast_layout(visual: nn.Module) -> None:
    """Lay the weights of a network of `CHANNELS_LAST` out so; leave others alone."""
    if isinstance(getattr(visual, "trunk", None), CHANNELS_LAST):
        visual.to(memory_format=torch.channels_last)


class TimmConvolutions:
    """timm's networks of convolutions with average pooling, see `DenseTower`.

    EfficientNet, ResNet, FastViT (MobileCLIP) and ConvNeXt are some. The head is what follows the
    pooling, and the mean of what it says is what it says about the mean, unless a norm (ConvNeXt)
    or an activation (MobileNetV3, the MLP of convnext_large_d) follows the pooling: these are
    applied to each position instead, which is not the same.
    """

    published = False
    has_keys = False
    stays_in_eval = True

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self._trunk = visual.trunk
        self.patch_size: int = self._trunk.feature_info[-1]["reduction"]
        self.width: int = self._trunk.num_features

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """The last map (B, D, h, w)."""
        maps: Tensor = self._trunk.forward_features(whole_patches(images, self.patch_size))
        return maps

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        pooled = self._trunk.forward_head(as_rows(maps)[:, :, None, None])
        return as_maps(self.visual.head(pooled), maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features, no keys."""
        maps = self.feature_map(pad_to_multiple(images, self.patch_size))
        return DenseFeatures(self.project(maps).float(), None)

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Output of a stage, whatever the facet: there are no keys.

        The last stage comes before a last convolution and activation, if the network has them.
        """
        count = len(self._trunk.feature_info)
        if not -count <= layer < count:
            raise PipelineError(
                f"layer: {layer} does not exist; {self.describe()} has {count} stages"
            )
        (maps,) = self._trunk.forward_intermediates(
            pad_to_multiple(images, self.patch_size), [layer % count], intermediates_only=True
        )
        features: Tensor = maps
        return features

    def describe(self) -> str:
        """Kind and sizes of the encoder."""
        return f"timm's {type(self._trunk).__name__}, patch {self.patch_size}, width {self.width}"


def is_token_vit(visual: Any) -> bool:
    """Whether a network is for `TokenVit`."""
    return _is_vit(visual) and visual.trunk.attn_pool is None and _pooling(visual) == "token"


def is_attention_vit(visual: Any) -> bool:
    """Whether a network is for `AttentionVit`: its pooling has no positions of its own."""
    pool = visual.trunk.attn_pool if _is_vit(visual) else None
    return isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None


def is_average_vit(visual: Any) -> bool:
    """Whether a network is for `AverageVit`."""
    return _is_vit(visual) and visual.trunk.attn_pool is None and _pooling(visual) == "avg"


def is_convolutions(visual: nn.Module) -> bool:
    """Whether a network is for `TimmConvolutions`: averages a map, and takes any size."""
    if not isinstance(visual, TimmModel) or isinstance(visual.trunk, VisionTransformer | Eva):
        return False
    trunk: Any = visual.trunk
    poolings = [part for part in trunk.modules() if isinstance(part, SelectAdaptivePool2d)]
    return (
        len(poolings) == 1
        and poolings[0].pool_type in AVERAGE
        and getattr(trunk, "output_fmt", "NCHW") == "NCHW"
        and isinstance(getattr(trunk, "feature_info", None), list)
        and not any(part in name for name in trunk.state_dict() for part in FIXED_SIZE)
    )


def _is_vit(visual: nn.Module) -> bool:
    return isinstance(visual, TimmModel) and type(visual.trunk) in (VisionTransformer, Eva)


def _pooling(visual: Any) -> str:
    return str(visual.trunk.global_pool)


def _take_any_size(trunk: Any) -> None:
    """What timm's `dynamic_img_size` does, which open_clip does not pass on."""
    trunk.dynamic_img_size = True
    trunk.patch_embed.strict_img_size = False
    trunk.patch_embed.flatten = False
    trunk.patch_embed.output_fmt = Format.NHWC


@contextmanager
def _listening(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a module is given first and what it returns, at each call."""
    heard: list[tuple[Tensor, Tensor]] = []

    def hear(_: nn.Module, given: tuple[Tensor, ...], returned: Tensor) -> None:
        heard.append((given[0], returned))

    handle = module.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()


def _one_by_one(module: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A module of sequences (N, 1, D), applied to each of N rows (N, D) as a sequence of one."""
    return torch.cat([module(part[:, None]) for part in rows.split(ROWS_AT_ONCE)])


def _keys(attention: Any, tokens: Tensor) -> Tensor:
    """Keys (B, N, D) of timm's attention, before their norm and rotation, heads side by side."""
    if attention.qkv is None:
        keys: Tensor = attention.k_proj(tokens)
        return keys
    bias = attention.qkv.bias  # EVA, which has others, has none for keys
    return F.linear(
        tokens, attention.qkv.weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1]
    )


def _values(attention: Any, tokens: Tensor) -> Tensor:
    """Values (B, N, D) of timm's attention, heads side by side."""
    if attention.qkv is None:
        values: Tensor = attention.v_proj(tokens)
        return values
    bias = attention.qkv.bias
    own = attention.v_bias if bias is None else bias.chunk(3)[2]  # EVA's
    return F.linear(tokens, attention.qkv.weight.chunk(3)[2], own)
