"""A checkpoint of a tiny ZUTIS with random weights, for the stages that predict."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.models.clip import load_clip
from pipeline.models.weights.checkpoint import save_checkpoint
from pipeline.models.zutis.build import build_zutis
from pipeline.params.base import EncoderParams

ARCHITECTURE = {"num_queries": 12, "decoder_layers": 2, "num_heads": 2, "feedforward_dim": 16}
CATEGORIES = ["cat", "dog", "bird"]


def write_checkpoint(
    folder: Path, tiny_clip: tuple[Path, Path], *, logit_scale: float = 1.0
) -> Path:
    """Write a checkpoint for `CATEGORIES` whose predictions have labels and objects."""
    model_path, weights_path = map(str, tiny_clip)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = load_clip(
            EncoderParams(model=model_path, pretrained=weights_path), torch.device("cpu")
        )
        network = build_zutis(clip.visual, **ARCHITECTURE)
        torch.nn.init.normal_(network.ffn1.layers[-1].weight, std=0.5)
    config = {
        "architecture": ARCHITECTURE,
        "encoder": {"model": model_path, "pretrained": weights_path},
        "categories": CATEGORIES,
        "background": ["background"],
        "templates": "name",
        "logit_scale": logit_scale,
        "step": 7,
    }
    save_checkpoint(folder, network, config)
    return folder
