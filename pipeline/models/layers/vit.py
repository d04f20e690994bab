"""The ViT of DINO and SelfMask; names in the state dict are those of the published backbones.

Letters: B batch, D width, h w patch grid, N = h w patches, H W pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_NORM_EPS = 1e-6
FEATURE_SCALE = 2  # features are upsampled by this much before they meet SelfMask's queries
CLS_TOKENS = 1


@dataclass(frozen=True)
class SelfMaskConfig:
    """Geometry of the network; the defaults are those of the published `selfmask_nq20`.

    Attributes:
        dim: width D of encoder and decoder.
        depth: encoder blocks.
        num_heads: attention heads of encoder and decoder, a divisor of `dim`.
        patch_size: side of a patch in pixels; even.
        num_queries: Q.
        decoder_layers: L.
        mlp_ratio: width of the feed-forward parts over `dim`.
        grid: side of the square grid of position embeddings.
    """

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 8
    num_queries: int = 20
    decoder_layers: int = 6
    mlp_ratio: int = 4
    grid: int = 28

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide dim {self.dim}")
        if self.patch_size % FEATURE_SCALE:
            raise ValueError(f"patch_size must be even, got {self.patch_size}")


class ViTEncoder(nn.Module):
    """A DINO ViT: pre-norm blocks with exact GELU, LayerNorm eps 1e-6, one CLS token."""

    def __init__(self, config: SelfMaskConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(
            torch.empty(1, CLS_TOKENS + config.grid**2, config.dim).normal_(std=0.02)
        )
        self.patch_embed = PatchEmbedding(config.dim, config.patch_size)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.dim, config.num_heads, config.dim * config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=ENCODER_NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), H and W whole patches -> (B, 1 + N, D), CLS first."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def embed(self, images: Tensor, *, position_resize: Literal["size", "grid"] = "size") -> Tensor:
        """The tokens (B, 1 + N, D) that enter the first block, CLS first."""
        patches = self.patch_embed(images)
        height, width = patches.shape[-2:]
        cls_tokens = self.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat((cls_tokens, patches.flatten(2).transpose(1, 2)), dim=1)
        return tokens + self.position_embedding(height, width, mode=position_resize)

    def position_embedding(
        self, height: int, width: int, *, mode: Literal["size", "grid"] = "size"
    ) -> Tensor:
        """(1, 1 + N, D) embedding of CLS and a grid of `height` x `width` patches.

        The learned grid is left as it is where it has as many patches ("size", as SelfMask's code
        does it, even if the sides do not agree), or the same sides ("grid").
        """
        native = (self.grid, self.grid)
        if (height, width) == native or (mode == "size" and height * width == self.grid**2):
            return self.pos_embed
        learned = self.pos_embed[:, CLS_TOKENS:].transpose(1, 2).unflatten(2, (self.grid, -1))
        resized = F.interpolate(learned, (height, width), mode="bicubic", align_corners=False)
        patches = resized.flatten(2).transpose(1, 2)
        return torch.cat((self.pos_embed[:, :CLS_TOKENS], patches), dim=1)


class PatchEmbedding(nn.Module):
    """Convolution of non-overlapping patches: (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward over tokens (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ENCODER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=ENCODER_NORM_EPS)
        self.mlp = FeedForward(dim, feedforward_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one joint projection to queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        split = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))
