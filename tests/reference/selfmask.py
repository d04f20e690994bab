"""SelfMask: every tensor of the forward pass, and the masks before and after refinement."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.layers.decoder import Memory
from pipeline.models.masks.bilateral import bilateral_solve
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig
from pipeline.models.weights.weights import load_strict

from .checks import TIE, Parts, Result, close, equal, first_is_clear
from .vectors import Tensors, Vectors

BOUNDS = {"mask_pred": 5e-5}
HALF = 0.5


def forward(vectors: Vectors) -> Parts:
    """Positions, tokens, queries, proposals, objectness and masks of each sub-case."""
    config = vectors.record["config"]
    model = SelfMask(
        SelfMaskConfig(
            dim=config["embed_dim"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            patch_size=config["patch_size"],
            num_queries=config["n_queries"],
            decoder_layers=config["n_decoder_layers"],
            mlp_ratio=config["mlp_ratio"],
            grid=config["pos_embed_grid"],
        )
    ).eval()
    load_strict(model, vectors.weights(), vectors.name)
    for part in vectors.parts():
        yield part, partial(_forward_part, vectors, part, model)


@torch.inference_mode()
def _forward_part(vectors: Vectors, part: str, model: SelfMask) -> Iterator[Result]:
    name, io = f"{vectors.name}/{part}", vectors.io.part(part)
    normalised = io["image"].float()
    images = normalised * model.std + model.mean
    height, width = normalised.shape[-2:]
    patch = model.config.patch_size
    padded = F.pad(normalised, (0, -width % patch, 0, -height % patch))
    tokens = model.encoder(padded)
    queries = model.query_embed.expand(len(images), -1, -1)
    decoded = model.decoder(queries, Memory(tokens[:, 1:]))
    output = model(images)
    grid = (padded.shape[-2] // patch, padded.shape[-1] // patch)
    ours = {
        "interpolated_pos_embed": model.encoder.position_embedding(*grid),
        "encoder_last_layer_tokens": tokens,
        "queries": decoded[:, -1].transpose(0, 1),
        "mask_pred": output.mask_logits[:, -1:].sigmoid(),
        "objectness": output.objectness_logits[:, -1:, :, None].sigmoid(),
    }
    for key, value in ours.items():
        if key in io:
            yield close(f"{name}/{key}", value, io[key], bound=BOUNDS.get(key))
    if "binary_mask" in io:
        probs = model.saliency(images)
        clear = first_is_clear(output.objectness_logits[:, -1])[:, None, None]
        decided = ((probs - HALF).abs() > TIE) & clear
        yield equal(f"{name}/binary_mask", probs > HALF, io["binary_mask"], decided=decided)
    if "denormalised_image_uint8" in io:
        yield from _refinement(name, io, images)


def _refinement(name: str, io: Tensors, images: Tensor) -> Iterator[Result]:
    """The image rebuilt from the network's input, and the mask refined along its colours."""
    levels = (images * 255).clamp(0, 255).permute(0, 2, 3, 1)
    pixels = io["denormalised_image_uint8"]
    decided = (levels - levels.round()).abs() > 1e-4  # elsewhere rounding decides the truncation
    at_most_one = (levels.to(torch.uint8).int() - pixels.int()).abs() <= 1
    yield equal(
        f"{name}/denormalised_image_uint8",
        levels.to(torch.uint8),
        pixels,
        decided=decided | ~at_most_one,
    )
    if "binary_mask_refined" in io:
        refined = np.stack(
            [
                bilateral_solve(image, mask)
                for image, mask in zip(pixels.numpy(), io["binary_mask"].numpy(), strict=True)
            ]
        )
        decided_masks = np.abs(refined - HALF) > TIE
        yield equal(
            f"{name}/binary_mask_refined",
            refined > HALF,
            io["binary_mask_refined"],
            decided=decided_masks,
        )
