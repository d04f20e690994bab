"""Image towers that open_clip builds by itself: CLIP's ViT and ResNet, CoCa's ViT, averaged ViTs.

Letters: B images, D width, C joint embedding, h w grid.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from pipeline.models.clip.features import (
    key_and_value,
    pad_to_multiple,
    resnet_features,
    square_side,
    vit_features,
)
from pipeline.models.clip.stitching import stitch
from pipeline.models.clip.tokens import (
    PositionResize,
    embed_patches,
    encode_patches,
    resize_positions,
    vision_tower,
)
from pipeline.models.clip.tower import (
    DenseFeatures,
    DenseOptions,
    Facet,
    as_maps,
    as_rows,
    grid_of,
    whole_patches,
)

PUBLISHED_EPS = 1e-6
RESNET_PATCH = 32


class LastInput(NamedTuple):
    """What enters the last block of CLIP's ViT, class token first; N = 1 + h w.

    Attributes:
        tokens: (B, N, D).
        normed: (B, N, D), the same after the first norm of the block. Queries, keys and values are
            linear in it.
        layers: (B, N, D) by block, what other blocks gave.
        grid: (h, w).
    """

    tokens: Tensor
    normed: Tensor
    layers: dict[int, Tensor]
    grid: tuple[int, int]


class OpenClipVit:
    """What is common to open_clip's ViTs, see `DenseTower`: sizes, any grid, blocks, keys."""

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual: Any = visual
        self.patch_size = square_side(visual.patch_size)
        self.width: int = vision_tower(visual).class_embedding.shape[0]

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """Patch tokens (B, D, h, w) of the last block, before the last layer norm."""
        images = whole_patches(images, self.patch_size)
        tokens, grid = embed_patches(self.visual, images, position_resize="grid")
        last: Tensor = self.visual.transformer(tokens)[:, 1:]
        return grid_of(last.transpose(1, 2), grid)

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Keys or output of a block."""
        return vit_features(self.visual, images, layer=layer, facet=facet)

    def describe(self) -> str:
        """Sizes of encoder and text space."""
        visual = self.visual
        return (
            f"patch {self.patch_size}, width {self.width}, "
            f"{len(visual.transformer.resblocks)} encoder blocks, "
            f"{visual.positional_embedding.shape[0] - 1} positions, "
            f"text space {visual.proj.shape[1]}"
        )


class ClipVit(OpenClipVit):
    """CLIP's ViT with its class token as embedding, see `DenseTower`.

    DenseCLIP takes the value path of the last block. ZUTIS has the projection for its head.
    """

    published = True
    has_keys = True
    stays_in_eval = False

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """Patch tokens (B, D, h, w) after the last layer norm."""
        tokens = encode_patches(self.visual, images, position_resize=position_resize)
        return tokens.permute(0, 3, 1, 2)

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return (maps.permute(0, 2, 3, 1) @ self.visual.proj.float()).permute(0, 3, 1, 2)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features and keys; as in the published code the keys pass the output projection too."""
        inside = self.enter_last(images, options)
        last = self._last
        key, value = key_and_value(last.attn)
        keys = last.attn.out_proj(F.linear(inside.normed, *key))
        values = last.attn.out_proj(F.linear(inside.normed, *value))
        if options.dense_attention == "maskclip":
            values = self.add_residual(inside.tokens, values, options)
        features = self.leave(values, options)[:, 1:].transpose(1, 2).unflatten(2, inside.grid)
        return DenseFeatures(features.float(), keys[:, 1:].float())

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.visual.transformer.resblocks)

    def enter_last(
        self, images: Tensor, options: DenseOptions, *, layers: Collection[int] = ()
    ) -> LastInput:
        """What enters the last block, of images (B, 3, H, W) as `dense` takes them.

        Args:
            images: padded with zeros at the right and bottom to whole patches.
            options: activation, positions and windows.
            layers: blocks before the last one, from 0, whose output is wanted, too; -1 for what
                enters the first.
        """
        images = pad_to_multiple(images, self.patch_size)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        walk = partial(self._walk, options=options, layers=layers)
        if options.windows is None:
            states = walk(images)
        else:
            states = stitch(walk, images, options.windows, patch=self.patch_size)
        tokens, normed, *others = states
        return LastInput(
            tokens, normed, dict(zip(sorted({*layers}), others, strict=True)), (height, width)
        )

    def norm(self, tokens: Tensor, options: DenseOptions) -> Tensor:
        """The first norm of the last block, on tokens (..., D)."""
        return _norm(self._last.ln_1, tokens, options.published_activation)

    def heads(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, D / heads) of the last block, see `norm`."""
        attention = self._last.attn
        projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        parts = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind()
        return queries, keys, values

    def merge(self, attended: Tensor) -> Tensor:
        """Attended values (B, heads, N, D / heads) -> (B, N, D) after the output projection."""
        merged: Tensor = self._last.attn.out_proj(attended.transpose(1, 2).flatten(2))
        return merged

    def add_residual(self, tokens: Tensor, attended: Tensor, options: DenseOptions) -> Tensor:
        """Residual (B, N, D) and MLP of the last block, after its attention."""
        last = self._last
        return _add_mlp(last, tokens + last.ls_1(attended), options.published_activation)

    def leave(self, tokens: Tensor, options: DenseOptions) -> Tensor:
        """Tokens (B, N, D) after the last block -> (B, N, C): last norm and projection."""
        normed = _norm(self.visual.ln_post, tokens, options.published_activation)
        return normed @ self.visual.proj

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Keys or output of a block."""
        return vit_features(self.visual, images, layer=layer, facet=facet)

    @property
    def _last(self) -> Any:
        return self.visual.transformer.resblocks[-1]

    def _walk(
        self, images: Tensor, *, options: DenseOptions, layers: Collection[int]
    ) -> list[Tensor]:
        """Tokens (B, 1 + h w, D) that enter the last block, its norm's, those after `layers`."""
        visual = self.visual
        published = options.published_activation
        patches = visual.conv1(images)
        tokens = torch.cat(
            [visual.class_embedding.expand(len(images), 1, -1), patches.flatten(2).transpose(1, 2)],
            dim=1,
        )
        positions = resize_positions(
            visual.positional_embedding, *patches.shape[-2:], mode=options.position_resize
        )
        tokens = _norm(visual.ln_pre, tokens + positions, published)
        kept = [tokens] if -1 in layers else []
        for number, block in enumerate(visual.transformer.resblocks[:-1]):
            normed = _norm(block.ln_1, tokens, published)
            attended = block.attn(normed, normed, normed, need_weights=False)[0]
            tokens = _add_mlp(block, tokens + block.ls_1(attended), published)
            if number in layers:
                kept.append(tokens)
        return [tokens, self.norm(tokens, options), *kept]


class ClipResnet:
    """CLIP's ResNet with attention pooling, see `DenseTower`.

    The head is the value path of the pooling, which has no residual.
    """

    published = True
    has_keys = True
    stays_in_eval = True
    patch_size = RESNET_PATCH

    def __init__(self, visual: ModifiedResNet) -> None:
        self.visual: Any = visual
        self.width: int = visual.attnpool.v_proj.in_features

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """Output (B, D, h, w) of the last stage."""
        return self._last_stage(whole_patches(images, RESNET_PATCH))

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return self._values(maps.flatten(2).transpose(1, 2), maps.shape[-2:])

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features and keys; no image is padded beyond one patch, and no option has an effect."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, max(0, RESNET_PATCH - width), 0, max(0, RESNET_PATCH - height)))
        grid = self._last_stage(images)
        tokens = grid.flatten(2).transpose(1, 2)
        features = self._values(tokens, grid.shape[-2:])
        return DenseFeatures(features.float(), self.visual.attnpool.k_proj(tokens).float())

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Output of a stage, or keys of the pooling."""
        return resnet_features(self.visual, images, layer=layer, facet=facet)

    def describe(self) -> str:
        """Sizes of encoder and text space."""
        return (
            f"ModifiedResNet, patch {RESNET_PATCH}, width {self.width}, "
            f"text space {self.visual.attnpool.c_proj.out_features}"
        )

    def _last_stage(self, images: Tensor) -> Tensor:
        grid: Tensor = self.visual.stem(images)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            grid = getattr(self.visual, stage)(grid)
        return grid

    def _values(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        pool = self.visual.attnpool
        values: Tensor = pool.c_proj(pool.v_proj(tokens)).transpose(1, 2)
        return grid_of(values, grid)


class CocaVit(OpenClipVit):
    """open_clip's ViT with attention pooling (CoCa), see `DenseTower`.

    The head is the value path of the pooling, layer norm and projection. A query that sees one
    position alone returns its value, so all queries agree on it.
    """

    published = False
    has_keys = True
    stays_in_eval = True

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        pool = self.visual.attn_pool
        _, value = key_and_value(pool.attn)
        values = pool.attn.out_proj(F.linear(pool.ln_k(as_rows(maps)), *value))
        return as_maps(self.visual.ln_post(values) @ self.visual.proj, maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features, and keys of the pooling."""
        maps = self.feature_map(pad_to_multiple(images, self.patch_size))
        pool = self.visual.attn_pool
        key, _ = key_and_value(pool.attn)
        keys = F.linear(pool.ln_k(maps.flatten(2).transpose(1, 2)), *key)
        return DenseFeatures(self.project(maps).float(), keys.float())


class AveragedVit(OpenClipVit):
    """open_clip's ViT whose patch tokens are averaged (CLIPA), see `DenseTower`.

    The head is the projection, and the mean of what it says is what it says about the mean. Where
    the last layer norm follows the average (`final_ln_after_pool`) it is applied to each position
    instead, which is not the same.
    """

    published = False
    has_keys = False
    stays_in_eval = True

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return as_maps(self.visual.ln_post(as_rows(maps)) @ self.visual.proj, maps)

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """Features, no keys."""
        maps = self.feature_map(pad_to_multiple(images, self.patch_size))
        return DenseFeatures(self.project(maps).float(), None)


def is_clip_vit(visual: nn.Module) -> bool:
    """Whether a network is for `ClipVit`."""
    return _is_vit(visual) and visual.attn_pool is None and visual.pool_type == "tok"


def is_clip_resnet(visual: nn.Module) -> bool:
    """Whether a network is for `ClipResnet`."""
    return isinstance(visual, ModifiedResNet)


def is_coca_vit(visual: nn.Module) -> bool:
    """Whether a network is for `CocaVit`; not so the two poolings in a row that are untested."""
    pooled = _is_vit(visual) and visual.attn_pool is not None
    return pooled and visual.attn_pool_contrastive is None


def is_averaged_vit(visual: nn.Module) -> bool:
    """Whether a network is for `AveragedVit`."""
    return _is_vit(visual) and visual.attn_pool is None and visual.pool_type == "avg"


def _is_vit(visual: nn.Module) -> bool:
    return isinstance(visual, VisionTransformer) and isinstance(
        visual.transformer.resblocks[0], ResidualAttentionBlock
    )


def _norm(norm: nn.Module, tokens: Tensor, published: bool) -> Tensor:
    if published and isinstance(norm, nn.LayerNorm):
        return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, PUBLISHED_EPS)
    return norm(tokens)  # type: ignore[no-any-return]


def _add_mlp(block: Any, tokens: Tensor, published: bool) -> Tensor:
    mlp = block.mlp
    hidden = mlp.c_fc(_norm(block.ln_2, tokens, published))
    hidden = F.gelu(hidden) if published else mlp.gelu(hidden)
    return tokens + block.ls_2(mlp.c_proj(hidden))
