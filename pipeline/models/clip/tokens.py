"""Patch tokens of a CLIP vision transformer at any image size.

Works on every module with the attributes of the OpenAI and open_clip visual towers, whatever
library built it. Letters: B batch, D width, H W pixels, h w patch grid, g side of the native grid.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip.stem import ConvStem

PositionResize = Literal["scale", "size", "grid"]
CUBIC_COEFFICIENT = -0.75  # torch's


class VisionTower(Protocol):
    """What the functions below read from a CLIP vision transformer."""

    conv1: nn.Conv2d | ConvStem
    class_embedding: Tensor
    positional_embedding: Tensor
    ln_pre: nn.Module
    transformer: nn.Module
    ln_post: nn.Module
    proj: Tensor


def vision_tower(encoder: nn.Module) -> VisionTower:
    """Check that `encoder` is a CLIP vision transformer with a square native grid.

    Its `transformer` takes and returns (B, N, D), as open_clip's does.

    Raises:
        PipelineError: it is another network, e.g. a ResNet; the message lists what is missing.
    """
    missing = [name for name in VisionTower.__annotations__ if getattr(encoder, name, None) is None]
    if missing:
        raise PipelineError(
            f"encoder {type(encoder).__name__} has no {', '.join(missing)}: a CLIP vision "
            "transformer (for example ViT-B-16) is needed here"
        )
    tower = cast(VisionTower, encoder)
    num_patches = len(tower.positional_embedding) - 1
    if round(num_patches**0.5) ** 2 != num_patches:
        raise PipelineError(
            f"encoder {type(encoder).__name__} has {num_patches} patch positions, which is not a "
            "square grid; choose an encoder trained on square images"
        )
    return tower


def patch_sides(embedding: nn.Conv2d | ConvStem) -> tuple[int, int]:
    """Height and width in pixels of what becomes one token."""
    if isinstance(embedding, ConvStem):
        return embedding.patch_size
    height, width = embedding.weight.shape[-2:]
    return height, width


def resize_positions(
    positional_embedding: Tensor, height: int, width: int, *, mode: PositionResize
) -> Tensor:
    """Fit position embeddings to a patch grid by bicubic interpolation.

    The papers do not say how. The first two modes are those of their code; they sample at
    different coordinates, so they differ even at equal grids:

    - "scale" (ZUTIS): the scale factors are (h + 0.1) / g and (w + 0.1) / g. Applied always, also
      at the native grid, where it is not the identity.
    - "size" (MaskCLIP/DenseCLIP): to the target size; left alone if the number of patches is the
      native one, which misplaces every row of a grid of that number and another shape.
    - "grid", without either slip: to the target size, which leaves the native grid as it is.

    Args:
        positional_embedding: (1 + g * g, D), class token first.
        height: target rows h.
        width: target columns w.
        mode: "scale", "size" or "grid".

    Returns:
        (1 + h * w, D) in the dtype of the input; the class token's row is unchanged.
    """
    class_position, patch_positions = positional_embedding[:1], positional_embedding[1:]
    if torch.onnx.is_in_onnx_export():
        resized = _resize_in_graph(patch_positions, height, width, mode=mode)
        return torch.cat((class_position, resized))
    if mode == "size" and height * width == len(patch_positions):
        return positional_embedding
    side = round(len(patch_positions) ** 0.5)
    grid = patch_positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if mode == "scale":
        scale = ((height + 0.1) / side, (width + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    resized = grid.flatten(2)[0].T.to(positional_embedding.dtype)
    return torch.cat((class_position, resized))


def _resize_in_graph(
    patch_positions: Tensor, height: int, width: int, *, mode: PositionResize
) -> Tensor:
    """Patch rows (h * w, D) of `resize_positions` for a graph whose h and w change at each call.

    Bicubic interpolation is linear, so each axis is a product with a matrix made of its length.
    """
    side = round(len(patch_positions) ** 0.5)
    rows, columns = torch.as_tensor(height), torch.as_tensor(width)
    if mode == "size":
        # What is left alone is what resizing to the native grid gives.
        is_native = rows * columns == len(patch_positions)
        rows, columns = (torch.where(is_native, side, length) for length in (rows, columns))
    slip = 0.1 if mode == "scale" else 0.0
    by_row, by_column = (
        cubic_weights(length, side, scale=(length + slip) / side) for length in (rows, columns)
    )
    grid = patch_positions.float().unflatten(0, (side, side))
    tall = (by_row @ grid.flatten(1)).unflatten(1, (side, -1))
    return (by_column @ tall).flatten(0, 1).to(patch_positions.dtype)


def cubic_weights(length: Tensor, side: int, *, scale: Tensor) -> Tensor:
    """The matrix of torch's bicubic interpolation along one axis, from basic operations.

    Args:
        length: target cells m, an integer scalar.
        side: source cells n.
        scale: scalar; a target cell is 1 / scale source cells wide.

    Returns:
        (m, n) float32, rows of sum 1.
    """
    targets = torch.arange(length, device=length.device)  # type: ignore[call-overload]
    places = (targets + 0.5) / scale - 0.5
    first = places.floor()
    t = places - first
    a = CUBIC_COEFFICIENT
    # The cubic of the two inner neighbours, and that of the two outer ones, by their distance.
    inner = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (t, 1 - t)]
    outer = [((a * x - 5 * a) * x + 8 * a) * x - 4 * a for x in (t + 1, 2 - t)]
    weights = torch.stack((outer[0], *inner, outer[1]), dim=1)
    neighbours = first[:, None] + torch.arange(-1, 3, device=length.device)
    is_source = neighbours.clamp(0, side - 1)[..., None] == torch.arange(side, device=length.device)
    return (weights[..., None] * is_source).sum(1)


def embed_patches(
    encoder: nn.Module, images: Tensor, *, position_resize: PositionResize
) -> tuple[Tensor, tuple[int, int]]:
    """Turn images into the token sequence that enters the first block.

    Args:
        encoder: CLIP vision transformer.
        images: (B, 3, H, W), normalised. What exceeds a multiple of the patch size at the right
            and bottom is ignored.
        position_resize: see `resize_positions`.

    Returns:
        Tokens (B, 1 + h * w, D) after `ln_pre`, class token first, and the grid (h, w).

    Raises:
        PipelineError: the encoder is no CLIP vision transformer, or an image is smaller than a
            patch.
    """
    tower = vision_tower(encoder)
    patch_height, patch_width = patch_sides(tower.conv1)
    if images.shape[-2] < patch_height or images.shape[-1] < patch_width:
        raise PipelineError(
            f"image of {images.shape[-1]} x {images.shape[-2]} pixels is smaller than a patch of "
            f"the encoder ({patch_width} x {patch_height}); resize it first"
        )
    patches = tower.conv1(images)
    height, width = patches.shape[-2:]
    class_token = tower.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
    tokens = torch.cat((class_token, patches.flatten(2).transpose(1, 2)), dim=1)
    positions = resize_positions(tower.positional_embedding, height, width, mode=position_resize)
    return tower.ln_pre(tokens + positions.to(tokens.dtype)), (height, width)


def encode_patches(
    encoder: nn.Module, images: Tensor, *, position_resize: PositionResize = "scale"
) -> Tensor:
    """Run all blocks and return the patch tokens, not yet projected to text space.

    Args:
        encoder: CLIP vision transformer.
        images: (B, 3, H, W), normalised.
        position_resize: see `resize_positions`.

    Returns:
        (B, h, w, D) tokens after `ln_post`, class token dropped.

    Raises:
        PipelineError: as `embed_patches`.
    """
    tower = vision_tower(encoder)
    tokens, (height, width) = embed_patches(encoder, images, position_resize=position_resize)
    tokens = tower.transformer(tokens)[:, 1:]
    # Not `unflatten`, which an exported graph would hold with the sizes of one image.
    return tower.ln_post(tokens).reshape(tokens.shape[0], height, width, tokens.shape[2])
