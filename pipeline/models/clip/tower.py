"""What an image tower says about every position of an image, whatever its kind.

Letters: B images, H W pixels, h w grid of positions, D width of the map, C joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip.stitching import Windows
from pipeline.models.clip.tokens import PositionResize

DenseAttention = Literal["maskclip", "value_only"]
Facet = Literal["key", "value", "token"]


@dataclass(frozen=True)
class DenseOptions:
    """What DenseCLIP's published code does to CLIP's own ViT; other towers have no use for it.

    Attributes:
        published_activation: exact GELU and LayerNorm eps 1e-6, to which the published
            configuration departs from CLIP; otherwise the network's own.
        dense_attention: of the last block. "maskclip", the published code: the block with the
            identity as attention matrix, residual and MLP kept. "value_only", the paper's text:
            value and output projections alone.
        position_resize: see `resize_positions`.
        windows: of the blocks before the last one, see `stitch`; None for the whole image.
    """

    published_activation: bool = True
    dense_attention: DenseAttention = "maskclip"
    position_resize: PositionResize = "size"
    windows: Windows | None = None


class DenseFeatures(NamedTuple):
    """Features of all positions, float32.

    Attributes:
        features: (B, C, h, w) in the joint space, not normalised.
        keys: (B, h w, D) attention keys of the layer that pools, or of a ViT's last block; None
            where there is no attention.
    """

    features: Tensor
    keys: Tensor | None


class DenseTower(Protocol):
    """An image tower as a map of features and a head that takes them to the joint space.

    A tower pools its map to one embedding; the head is what that pooling and all that follows do
    to a single position. It holds the network and has no weights of its own.

    Attributes:
        visual: the network.
        patch_size: pixels, along a side, that a position stands for.
        width: D.
        published: whether the code of DenseCLIP and ZUTIS knows this kind (CLIP's own ViT and
            ResNet), so that its slips, which the defaults keep, apply to it.
        has_keys: whether `dense` gives keys.
        stays_in_eval: whether it is trained in evaluation mode: with the statistics of its batch
            norms as they are, and without dropping paths or patches.
    """

    visual: nn.Module
    patch_size: int
    width: int
    published: bool
    has_keys: bool
    stays_in_eval: bool

    def feature_map(self, images: Tensor, *, position_resize: PositionResize = "grid") -> Tensor:
        """The map that the tower pools.

        Args:
            images: (B, 3, H, W), normalised. What exceeds a multiple of the patch size at the
                right and bottom is ignored.
            position_resize: see `resize_positions`; only CLIP's own ViT does not always take
                "grid".

        Returns:
            (B, D, h, w), with h = H // patch, w = W // patch.

        Raises:
            PipelineError: an image is smaller than a patch.
        """

    def project(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w) in the joint space, each position by itself."""

    def dense(self, images: Tensor, options: DenseOptions) -> DenseFeatures:
        """DenseCLIP's features of images (B, 3, H, W), normalised, of any size.

        They are padded with zeros at the right and bottom to whole patches (CLIP's ResNet, as
        published, to one patch at least).
        """

    def patch_features(self, images: Tensor, *, layer: int, facet: Facet) -> Tensor:
        """Features (B, D', h, w) for clustering, see `ClipEncoder.patch_features`."""

    def describe(self) -> str:
        """The architecture in one line, for messages."""


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) without what exceeds a multiple of the patch at the right and bottom.

    Raises:
        PipelineError: they are smaller than a patch.
    """
    height, width = images.shape[-2:]
    if height < patch or width < patch:
        raise PipelineError(
            f"image of {width} x {height} pixels is smaller than a patch of the encoder "
            f"({patch} x {patch}); resize it first"
        )
    # Contiguous: with cut-off channels-last images torch's convolutions crash in backward (2.14).
    return images[..., : height - height % patch, : width - width % patch].contiguous()


def as_rows(maps: Tensor) -> Tensor:
    """Maps (B, D, h, w) as positions (B h w, D)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """Positions (B h w, C) as maps (B, C, h, w), of the batch and grid of another map."""
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def grid_of(sequence: Tensor, grid: Sequence[int]) -> Tensor:
    """Positions (B, D, h w) as a map (B, D, h, w), also in a graph that takes any h and w."""
    # `unflatten` would hold the sizes of the image that the graph was traced with.
    return sequence.reshape(sequence.shape[0], sequence.shape[1], grid[0], grid[1])
