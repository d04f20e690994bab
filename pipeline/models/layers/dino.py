"""DINO vision transformers (Caron et al., 2021), which tell what is alike without labels.

The network is SelfMask's encoder, whose names are those of the published backbones. Letters: B
images, D width, H W pixels, h w patch grid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.layers.vit import CLS_TOKENS, EncoderBlock, SelfMaskConfig, ViTEncoder
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import hash_tensors, load_strict, read_weights
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.base import EncoderParams

DINO_MODELS = {
    "dino_vits8": SelfMaskConfig(patch_size=8, grid=28),
    "dino_vits16": SelfMaskConfig(patch_size=16, grid=14),
}


class DinoEncoder(nn.Module):
    """A frozen DINO ViT in float32.

    Attributes:
        config: its geometry; fields about queries and the decoder mean nothing here.
        vit: the network.
        patch_size: side of a patch in pixels.
        mean, std: (1, 3, 1, 1) ImageNet statistics, applied to images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: ViTEncoder, config: SelfMaskConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = vit.eval().requires_grad_(False)
        self.patch_size = config.patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def patch_features(
        self, images: Tensor, *, layer: int = -1, facet: Literal["key", "value", "token"] = "key"
    ) -> Tensor:
        """Features of the patches of images of any size, for clustering.

        The input is zero-padded right and bottom (after normalisation) to a multiple of the patch
        size; position embeddings are resized to the grid.

        Args:
            images: (B, 3, H, W) in [0, 1].
            layer: block of the ViT.
            facet: "key", "value": attention keys or values of that block, all heads side by side;
                "token": its output after the network's last layer norm, as in SelfMask's published
                mask generator.

        Returns:
            (B, D, h, w), with h = ceil(H / patch), w = ceil(W / patch).

        Raises:
            PipelineError: there is no such block.
        """
        blocks = cast(list[EncoderBlock], list(self.vit.blocks))
        if not -len(blocks) <= layer < len(blocks):
            raise PipelineError(f"layer: {layer} does not exist; this ViT has {len(blocks)} blocks")
        height, width = images.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        padded = F.pad((images - self.mean) / self.std, padding)
        grid = (padded.shape[-2] // self.patch_size, padded.shape[-1] // self.patch_size)
        chosen = layer % len(blocks)
        tokens = self.vit.embed(padded, position_resize="grid")
        for block in blocks[:chosen]:
            tokens = block(tokens)
        if facet == "token":
            tokens = self.vit.norm(blocks[chosen](tokens))
        else:
            projected = blocks[chosen].attn.qkv(blocks[chosen].norm1(tokens))
            tokens = projected.chunk(3, dim=-1)[1 if facet == "key" else 2]
        return tokens[:, CLS_TOKENS:].transpose(1, 2).unflatten(2, grid)

    def fingerprint(self) -> str:
        """SHA-256 of geometry and weights: changes whenever results may change."""
        hasher = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        hash_tensors(hasher, self.state_dict())
        return hasher.hexdigest()


def build_dino(model: str) -> ViTEncoder:
    """A DINO ViT with random weights, under the published names.

    Args:
        model: name of `DINO_MODELS`.
    """
    return ViTEncoder(DINO_MODELS[model])


def load_dino(
    encoder: EncoderParams, device: torch.device, *, cache_dir: Path, field: str = "mask.encoder"
) -> DinoEncoder:
    """Build a DINO ViT and load its weights.

    Args:
        encoder: `model` is a name of `DINO_MODELS`; `pretrained` a weights file (the authors'
            backbone .pth, or safetensors) or a name of `pipeline weights list`, empty for the
            published weights of the model.
        device: where the encoder goes.
        cache_dir: cache folder with the published weights.
        field: where the encoder stands in the params, for messages.

    Raises:
        PipelineError: the weights are not there, or are of another architecture.
    """
    if not isinstance(encoder.pretrained, str):
        raise PipelineError(
            f"{field}.pretrained: {encoder.model} has no tags; write the file's path alone"
        )
    path = resolve_weights(encoder.pretrained or encoder.model, cache_dir)
    vit = build_dino(encoder.model)
    load_strict(vit, read_weights(path), path)
    return DinoEncoder(vit, DINO_MODELS[encoder.model]).to(device)
