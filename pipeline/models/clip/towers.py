"""The kinds of image towers, and which of them a network is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.errors import PipelineError
from pipeline.models.clip import open_clip_towers, timm_towers
from pipeline.models.clip.tower import DenseTower

TOWERS: list[tuple[Callable[[nn.Module], bool], Callable[[Any], DenseTower]]] = [
    (open_clip_towers.is_clip_vit, open_clip_towers.ClipVit),
    (open_clip_towers.is_clip_resnet, open_clip_towers.ClipResnet),
    (open_clip_towers.is_coca_vit, open_clip_towers.CocaVit),
    (open_clip_towers.is_averaged_vit, open_clip_towers.AveragedVit),
    (timm_towers.is_token_vit, timm_towers.TokenVit),
    (timm_towers.is_attention_vit, timm_towers.AttentionVit),
    (timm_towers.is_average_vit, timm_towers.AverageVit),
    (timm_towers.is_convolutions, timm_towers.TimmConvolutions),
]


def dense_tower(visual: nn.Module) -> DenseTower:
    """The tower that a network is, with its features of every position.

    Args:
        visual: image tower of a model of open_clip. A ViT of timm takes images of any size from
            now on.

    Raises:
        PipelineError: its pooling says nothing about single positions, or it takes images of one
            size alone.
    """
    for fits, kind in TOWERS:
        if fits(visual):
            return kind(visual)
    trunk = getattr(visual, "trunk", None)
    name = type(visual).__name__ + ("" if trunk is None else f" around timm's {_trunk_name(trunk)}")
    raise PipelineError(
        f"encoder: dense features need a map of the image, but this model's image tower is a {name}"
        "; use for example ViT-B-16-quickgelu, and see docs/encoders.md"
    )


def _trunk_name(trunk: nn.Module) -> str:
    pooling = getattr(trunk, "global_pool", None)
    return type(trunk).__name__ + (f" (pooling {pooling!r})" if isinstance(pooling, str) else "")


def check_in_graph(tower: DenseTower) -> None:
    """Refuse a tower of which no graph can be made for other programs.

    Raises:
        PipelineError: it is a ViT of timm, which resizes its positions as no operator of ONNX does
            (bicubic, antialiased).
    """
    if isinstance(tower, timm_towers.TimmVit):
        raise PipelineError(
            f"encoder: {tower.describe()}: has no form in ONNX, which lacks an operator for its "
            "position embeddings; docs/deploy.md says which encoders have one"
        )
