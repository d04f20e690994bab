"""ZUTIS: every tensor of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.clip.tokens import encode_patches, resize_positions, vision_tower
from pipeline.models.layers.decoder import sine_codes
from pipeline.models.layers.interpolate import upsample
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.postprocess import semantic_logits, semantic_prediction

from .checks import Parts, Result, close, equal, first_is_clear
from .networks import zutis_network
from .vectors import Vectors

BOUNDS = {"mask_proposals": 5e-5, "patch_tokens": 5e-6, "semantic_logits_lowres": 5e-6}


def forward(vectors: Vectors) -> Parts:
    """Positions, tokens, decoder states, proposals, embeddings and labels of each sub-case."""
    model = zutis_network(vectors.weights(), num_heads=vectors.record["config"]["n_heads"])
    for part in vectors.parts():
        yield part, partial(_forward_part, vectors, part, model)


@torch.inference_mode()
def _forward_part(vectors: Vectors, part: str, model: Zutis) -> Iterator[Result]:
    io = vectors.io.part(part)
    text = vectors.io["text_embeddings"]
    images = io["image"].float()
    size = (images.shape[-2], images.shape[-1])
    modules = {"decoded": model.decoder, "queries": model.ffn2}
    seen: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(partial(_keep, seen, k)) for k, module in modules.items()]
    output = model.forward_normalised(images)
    for hook in hooks:
        hook.remove()
    tokens = encode_patches(model.encoder, images)
    height, width, dim = tokens.shape[1:]
    positions = vision_tower(model.encoder).positional_embedding
    rows, columns = sine_codes(2 * height, 2 * width, dim)
    sine = torch.cat((rows.repeat_interleave(2 * width, dim=0), columns.repeat(2 * height, 1)), 1)
    upsampled = upsample(tokens[:1].permute(0, 3, 1, 2), (2 * height, 2 * width))
    memory = model.ffn1(upsampled.flatten(2).transpose(1, 2))
    ours = {
        "interpolated_pos_embed": resize_positions(positions, height, width, mode="scale")[None],
        "encoder_tokens": tokens.flatten(1, 2),
        "decoder_memory": memory,
        "sine_pe": sine.T.unflatten(1, (2 * height, 2 * width))[None],
        "decoder_out": seen["decoded"].permute(1, 2, 0, 3),
        "query_ffn_out": _published_layers(seen["queries"]),
        "mask_proposals": _published_layers(output.mask_probs),
        "patch_tokens": output.patch_tokens,
        "semantic_logits_lowres": semantic_logits(output.patch_tokens, text),
    }
    for name in ours:
        if name in io:
            label = f"{vectors.name}/{part}/{name}"
            yield close(label, ours[name], io[name], bound=BOUNDS.get(name))
    if "semantic_argmax" in io:
        yield equal(
            f"{vectors.name}/{part}/semantic_argmax",
            semantic_prediction(output.patch_tokens, text, size),
            io["semantic_argmax"],
            decided=first_is_clear(semantic_logits(output.patch_tokens, text, size)),
        )


def _keep(seen: dict[str, Tensor], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    seen[name] = output


def _published_layers(values: Tensor) -> Tensor:
    """(B, L, ...) without the axis of decoder layers if there is only one, as published."""
    return values.squeeze(1)
