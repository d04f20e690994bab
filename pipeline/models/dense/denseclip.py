"""DenseCLIP, later named MaskCLIP (Zhou, Loy, Dai: "Extract Free Dense Labels from CLIP", 2022).

CLIP's image encoder labels every patch without training: its last attention is replaced by the
value path, and the patch features are compared with text embeddings. Not to be confused with the
supervised DenseCLIP of Rao et al.

Letters: B images, H W pixels, h w patch grid, D tower width, C joint embedding, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.clip import (
    ClipEncoder,
    ModifiedResNet,
    VisionTransformer,
    label_embeddings,
    load_clip,
    pad_to_multiple,
    require_plain_vit,
)
from pipeline.models.clip.tokens import PositionResize, resize_positions
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.vocabulary.prompts import templates

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import DenseClipParams
    from pipeline.vocabulary.categories import Names

DenseAttention = Literal["maskclip", "value_only"]
KeyAffinity = Literal["published", "cosine"]

PUBLISHED_EPS = 1e-6
LOGIT_SCALE = 100.0
REMOVED_LOGIT = -100.0
RESNET_MIN_SIDE = 32
UPSAMPLED_ELEMENTS = 2**26


class DenseClip(nn.Module):
    """Training-free dense labels for images: normalisation, value path, cosines, refinements."""

    mean: Tensor
    std: Tensor
    text: Tensor

    def __init__(self, encoder: ClipEncoder, text: Tensor, params: DenseClipParams) -> None:
        """Put an encoder and label embeddings together.

        Args:
            encoder: its image tower is used.
            text: (K, C) unit rows by label id.
            params: normalisation, refinements and what differs between paper and code.
        """
        super().__init__()
        self.visual = encoder.visual
        self.patch_size = encoder.patch_size
        self.params = params
        self._encoder = encoder
        imagenet = params.normalisation == "imagenet"
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) if imagenet else encoder.mean
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) if imagenet else encoder.std
        self.register_buffer("mean", mean.to(encoder.mean.device), persistent=False)
        self.register_buffer("std", std.to(encoder.mean.device), persistent=False)
        self.register_buffer("text", text.to(encoder.mean.device), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that labels depend on besides image and names."""
        return {**self.params.recipe(), "weights": self._encoder.fingerprint()}

    def select(self, label_ids: Sequence[int]) -> DenseClip:
        """The same for some label ids, in this order."""
        return DenseClip(self._encoder, self.text[list(label_ids)], self.params).eval()

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w), see `forward`."""
        scores: Tensor = self(images)
        return scores

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w), float32.

        Scores are cosines; after key smoothing, smoothed probabilities.
        """
        scale = self.params.logit_scale
        features, keys = dense_features(
            self.visual,
            (images - self.mean) / self.std,
            published_activation=self.params.published_activation,
            dense_attention=self.params.dense_attention,
            position_resize=self.params.position_resize,
        )
        # Cosines are multiplied by 100 before their softmax: float32 even where CLIP ran in less.
        with torch.autocast(features.device.type, enabled=False):
            scores = dense_logits(features, self.text)
            if self.params.prompt_denoising is not None:
                scores = prompt_denoising(scores, self.params.prompt_denoising, scale=scale)
            if self.params.key_smoothing is not None:
                affinity = self.params.key_affinity
                scores = key_smoothing(
                    scores, keys, self.params.key_smoothing, affinity=affinity, scale=scale
                )
        return scores

    @torch.no_grad()
    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> label ids (B, H, W) int64, confidence (B, H, W)."""
        height, width = images.shape[-2:]
        scale = self.params.logit_scale if self.params.key_smoothing is None else None
        return label_and_confidence(self(images), (height, width), scale=scale)


def load_denseclip(params: DenseClipParams, names: Names, runtime: Runtime) -> DenseClip:
    """DenseCLIP with the encoder of its params, for some names.

    Raises:
        PipelineError: an encoder that cannot be loaded, or a name that it does not know.
    """
    encoder = load_clip(params.encoder, runtime.device, cache_dir=runtime.cache_dir)
    text = label_embeddings(
        encoder,
        background=names.background,
        categories=names.categories,
        templates=templates(params.templates),
    )
    return DenseClip(encoder, text, params).eval()


def dense_features(
    visual: nn.Module,
    images: Tensor,
    *,
    published_activation: bool = True,
    dense_attention: DenseAttention = "maskclip",
    position_resize: PositionResize = "size",
) -> tuple[Tensor, Tensor]:
    """Patch features in the joint embedding space (section 3.3), and the keys of the same layer.

    Args:
        visual: image tower of a CLIP: ViT, or ResNet with attention pooling.
        images: (B, 3, H, W), normalised; zero-padded right and bottom to a multiple of the patch.
        published_activation: in a ViT, exact GELU and LayerNorm eps 1e-6, to which the published
            configuration departs from CLIP; otherwise the network's own. No effect on a ResNet.
        dense_attention: of the last block of a ViT. "maskclip", the published code: the block with
            the identity as attention matrix, residual and MLP kept. "value_only", the paper's
            text: value and output projections alone. No effect on a ResNet, which has no residual.
        position_resize: see `resize_positions`. No effect on a ResNet, whose position embeddings
            are not used.

    Returns:
        Features (B, C, h, w), not normalised, and keys (B, h w, D), both float32. As in the
        published code the keys of a ViT pass the output projection too, those of a ResNet do not.

    Raises:
        PipelineError: the image tower is of another kind.
    """
    if isinstance(visual, ModifiedResNet):
        return _resnet_dense_features(visual, images)
    return _vit_dense_features(
        require_plain_vit(visual),
        images,
        published_activation=published_activation,
        keep_residual=dense_attention == "maskclip",
        position_resize=position_resize,
    )


def dense_logits(features: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, K, h, w) of features (B, C, h, w) with unit text embeddings (K, C)."""
    return torch.einsum("bchw,kc->bkhw", features / features.norm(dim=1, keepdim=True), text)


def prompt_denoising(logits: Tensor, threshold: float, *, scale: float = LOGIT_SCALE) -> Tensor:
    """Remove from each image the labels it nowhere believes in (section 3.3).

    A label whose largest softmax(scale * logit) over all positions is below the threshold gets
    logit -100 everywhere. If that removes every label, label 0 wins.

    Args:
        logits: cosines (B, K, h, w).
        threshold: in [0, 1]; 0.5 in the paper.
        scale: factor of the cosines inside the softmax.
    """
    peaks = (scale * logits).softmax(dim=1).amax(dim=(2, 3), keepdim=True)
    return logits.masked_fill(peaks < threshold, REMOVED_LOGIT)


def key_smoothing(
    logits: Tensor,
    keys: Tensor,
    threshold: float,
    *,
    affinity: KeyAffinity = "published",
    scale: float = LOGIT_SCALE,
) -> Tensor:
    """Spread probabilities between positions with similar keys (section 3.3).

    Args:
        logits: cosines (B, K, h, w), after prompt denoising if both are on.
        keys: (B, h w, D).
        threshold: positions whose largest probability reaches it keep their probabilities.
        affinity: how much a position counts for another. "published", as in the code: each key
            channel is normalised over the positions (not each key), and the Gram matrix is neither
            a softmax nor row-normalised, so the result is no distribution. "cosine": of the two
            keys, negative ones cut off, divided by the sum over all positions, so probabilities
            stay probabilities.
        scale: factor of the cosines inside the softmax.

    Returns:
        (B, K, h, w).
    """
    probabilities = (scale * logits).softmax(dim=1).flatten(2)
    keys = F.normalize(keys, dim=1 if affinity == "published" else 2)
    weights = keys @ keys.transpose(1, 2)  # symmetric
    if affinity == "cosine":
        weights = F.normalize(weights.clamp(min=0), p=1, dim=1)
    smoothed = probabilities @ weights
    uncertain = probabilities.amax(dim=1, keepdim=True) < threshold
    return torch.where(uncertain, smoothed, probabilities).unflatten(2, logits.shape[-2:])


def label_and_confidence(
    scores: Tensor,
    size: tuple[int, int],
    *,
    scale: float | None = LOGIT_SCALE,
    max_elements: int = UPSAMPLED_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Labels of pixels from scores of patches.

    Scores are upsampled bilinearly and the largest wins; labels are taken a few at a time, so that
    hundreds of them fit into memory.

    Args:
        scores: (B, K, h, w).
        size: (H, W).
        scale: the winner's confidence is its softmax(scale * score). None, for scores that key
            smoothing made probabilities: its share of the sum of all positive scores.
        max_elements: number of upsampled scores held at a time, if one label has no more.

    Returns:
        Label ids (B, H, W), int64, and confidence (B, H, W) in [0, 1], float32.
    """
    step = max(1, max_elements // (len(scores) * size[0] * size[1]))
    best = scores.new_full((len(scores), *size), -torch.inf)
    label = torch.zeros_like(best, dtype=torch.int64)
    total = torch.full_like(best, -torch.inf) if scale is not None else torch.zeros_like(best)
    for start in range(0, scores.shape[1], step):
        part = F.interpolate(scores[:, start : start + step], size=size, mode="bilinear")
        part_best, part_label = part.max(dim=1)
        label = torch.where(part_best > best, part_label + start, label)
        best = torch.maximum(best, part_best)
        if scale is not None:
            total = torch.logaddexp(total, (scale * part).logsumexp(dim=1))
        else:
            total += part.clamp(min=0).sum(dim=1)
    if scale is not None:
        return label, (scale * best - total).exp().clamp(max=1)
    return label, (best.clamp(min=0) / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)


def _vit_dense_features(
    visual: VisionTransformer,
    images: Tensor,
    *,
    published_activation: bool,
    keep_residual: bool,
    position_resize: PositionResize,
) -> tuple[Tensor, Tensor]:
    patches = visual.conv1(pad_to_multiple(images, visual.patch_size[0]))
    grid = patches.shape[-2:]
    tokens = torch.cat(
        [visual.class_embedding.expand(len(images), 1, -1), patches.flatten(2).transpose(1, 2)],
        dim=1,
    )
    positions = resize_positions(visual.positional_embedding, *grid, mode=position_resize)
    tokens = _norm(visual.ln_pre, tokens + positions, published_activation)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        normed = _norm(block.ln_1, tokens, published_activation)
        attended = block.attn(normed, normed, normed, need_weights=False)[0]
        tokens = _add_mlp(block, tokens + block.ls_1(attended), published_activation)
    normed = _norm(last.ln_1, tokens, published_activation)
    _, key_weight, value_weight = last.attn.in_proj_weight.chunk(3)
    _, key_bias, value_bias = last.attn.in_proj_bias.chunk(3)
    keys = last.attn.out_proj(F.linear(normed, key_weight, key_bias))
    values = last.attn.out_proj(F.linear(normed, value_weight, value_bias))
    if keep_residual:
        values = _add_mlp(last, tokens + last.ls_1(values), published_activation)
    features = _norm(visual.ln_post, values, published_activation) @ visual.proj
    features = features[:, 1:].transpose(1, 2).unflatten(2, grid)
    return features.float(), keys[:, 1:].float()


def _norm(norm: nn.Module, tokens: Tensor, published: bool) -> Tensor:
    if published and isinstance(norm, nn.LayerNorm):
        return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, PUBLISHED_EPS)
    return norm(tokens)  # type: ignore[no-any-return]


def _add_mlp(block: Any, tokens: Tensor, published: bool) -> Tensor:
    mlp = block.mlp
    hidden = mlp.c_fc(_norm(block.ln_2, tokens, published))
    hidden = F.gelu(hidden) if published else mlp.gelu(hidden)
    return tokens + block.ls_2(mlp.c_proj(hidden))


def _resnet_dense_features(visual: ModifiedResNet, images: Tensor) -> tuple[Tensor, Tensor]:
    height, width = images.shape[-2:]
    images = F.pad(
        images, (0, max(0, RESNET_MIN_SIDE - width), 0, max(0, RESNET_MIN_SIDE - height))
    )
    grid = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        grid = stage(grid)
    tokens = grid.flatten(2).transpose(1, 2)
    pool = visual.attnpool
    features = pool.c_proj(pool.v_proj(tokens)).transpose(1, 2).unflatten(2, grid.shape[-2:])
    return features.float(), pool.k_proj(tokens).float()
