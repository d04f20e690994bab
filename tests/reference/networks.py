"""Our networks with the weights of the vectors, their geometry read off the weights' shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor

from pipeline.models.clip import VOCABULARY_SPECIALS, ClipEncoder, load_clip
from pipeline.models.weights.weights import load_strict
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.network import Zutis
from pipeline.params.base import EncoderParams

HEAD_WIDTH = 64  # of every attention head of a CLIP


def count_layers(names: Mapping[str, Any] | list[str], prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return len(numbers)


def clip_vit(state: Mapping[str, Tensor]) -> VisionTransformer:
    """A CLIP vision transformer of the geometry of `state`, with other weights."""
    width, _, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    hidden = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
    return VisionTransformer(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=count_layers(dict(state), "transformer.resblocks."),
        heads=width // HEAD_WIDTH,
        mlp_ratio=hidden / width,
        output_dim=state["proj"].shape[1],
        act_layer=QuickGELU,
    )


def zutis_network(
    state: Mapping[str, Tensor], *, num_heads: int, stop_gradient: bool = True
) -> Zutis:
    """ZUTIS with the weights `state`; only the number of decoder heads is not in them."""
    prefix = "encoder."
    tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model = build_zutis(
        clip_vit(tower),
        num_queries=len(state["query_embed"]),
        decoder_layers=count_layers(dict(state), "decoder.layers."),
        num_heads=num_heads,
        feedforward_dim=len(state["decoder.layers.0.linear1.weight"]),
        stop_gradient=stop_gradient,
    )
    load_strict(model, state, "vectors")
    return model.eval()


def clip_encoder(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ClipEncoder:
    """A CLIP of `config`, OpenAI's arguments by name, loaded as a user's own weights are.

    If `state` holds only the image tower, the text tower is random and knows no word.
    """
    vision = {
        "image_size": config["image_resolution"],
        "layers": config["vision_layers"],
        "width": config["vision_width"],
    }
    if config["vision_patch_size"] is not None:
        vision["patch_size"] = config["vision_patch_size"]
    text = {
        "context_length": config["context_length"],
        "vocab_size": config["vocab_size"],
        "width": config["transformer_width"],
        "heads": config["transformer_heads"],
        "layers": config["transformer_layers"],
    }
    settings: dict[str, Any] = {
        "embed_dim": config["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    own_settings: dict[str, Any] = {}
    tensors = dict(state)
    if "token_embedding.weight" not in tensors:
        own_settings["vocabulary"] = list(VOCABULARY_SPECIALS)
        text["vocab_size"] = len(VOCABULARY_SPECIALS)
        tensors = CLIP(**settings).state_dict() | tensors
    with TemporaryDirectory() as folder:
        config_path, weights_path = Path(folder, "clip.json"), Path(folder, "clip.safetensors")
        config_path.write_text(json.dumps(settings | own_settings))
        save_file({name: value.contiguous() for name, value in tensors.items()}, weights_path)
        return load_clip(
            EncoderParams(model=str(config_path), pretrained=str(weights_path)), torch.device("cpu")
        )
