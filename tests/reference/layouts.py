"""Names and shapes of the published checkpoints: our networks at real size must have the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig
from pipeline.models.zutis.build import build_zutis

from .checks import Parts, Result, equal, none_differs
from .networks import HEAD_WIDTH
from .vectors import Vectors

ZUTIS_PREFIX = "checkpoint_layout_zutis_vit_"
SELFMASK_PREFIX = "checkpoint_layout_selfmask_nq"


def zutis_layout(vectors: Vectors) -> Parts:
    """ZUTIS around the CLIP that the file's name says, for example `..._vit_b_16`."""
    config = _clip_config(vectors.name.removeprefix(ZUTIS_PREFIX).split("_"))
    vision = config["vision_cfg"]
    with torch.device("meta"):
        encoder = VisionTransformer(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // HEAD_WIDTH,
            mlp_ratio=4.0,
            output_dim=config["embed_dim"],
            act_layer=QuickGELU,
        )
        model = build_zutis(encoder)
    yield "layout", partial(_layout, vectors, model)


def selfmask_layout(vectors: Vectors) -> Parts:
    """SelfMask with the number of queries that the file's name says, for example `..._nq20`."""
    num_queries = int(vectors.name.removeprefix(SELFMASK_PREFIX).split("_")[0])
    with torch.device("meta"):
        model = SelfMask(SelfMaskConfig(num_queries=num_queries))
    yield "layout", partial(_layout, vectors, model)


def _clip_config(words: list[str]) -> dict[str, Any]:
    """Configuration of the CLIP ViT of these words; what follows its name is no part of it.

    Raises:
        ValueError: there is none.
    """
    for count in range(len(words), 1, -1):
        config = open_clip.get_model_config("-".join(("ViT", words[0].upper(), *words[1:count])))
        if config is not None:
            return dict(config)
    raise ValueError(f"there is no CLIP ViT {'-'.join(words)}")


def _layout(vectors: Vectors, model: nn.Module) -> Iterator[Result]:
    record, name, state = vectors.record, vectors.name, model.state_dict()
    published = {key: list(shape) for key, shape in record["tensors"].items()}
    ours = {key: list(value.shape) for key, value in state.items()}
    shared = published.keys() & ours.keys()
    yield none_differs(f"{name}/names", published.keys() ^ ours.keys())
    yield none_differs(f"{name}/shapes", [key for key in shared if published[key] != ours[key]])
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values()}
    yield none_differs(f"{name}/dtype", kinds ^ {record["dtype"]})
    yield equal(f"{name}/n_tensors", len(ours), record["n_tensors"])
    total = sum(value.numel() for value in state.values())
    yield equal(f"{name}/n_parameters", total, record["n_parameters"])
