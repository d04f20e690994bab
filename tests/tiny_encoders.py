"""A tiny random model of open_clip for every kind of image tower, as users name them: by files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.models.clip.loading import _build
from pipeline.params.base import EncoderParams

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TIMM_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}


# Of the architectures that `add_tiny_architectures` makes known.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


def add_tiny_architectures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip know Tiny-8 and Tiny-8-quickgelu, by files in `folder`, and nothing else."""
    folder.mkdir()
    (folder / "Tiny-8.json").write_text(json.dumps(TINY_CLIP))
    (folder / "Tiny-8-quickgelu.json").write_text(json.dumps(TINY_CLIP | {"quick_gelu": True}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [folder])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(folder)


def _timm(name: str, side: int = 32, pool: str = "", proj: str | None = "linear") -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": side, "timm_pool": pool, "timm_proj": proj}


VISION: dict[str, dict[str, Any]] = {
    "clip_vit": VIT,
    "clip_resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "coca": VIT
    | {
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "averaged_vit": VIT | {"pool_type": "avg"},
    "clipa": VIT | {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
    "eva": _timm("tiny_eva", pool="token", proj=None),
    "timm_vit": _timm("tiny_token_vit", pool="token"),
    "siglip": _timm("tiny_siglip", pool="map", proj="none"),
    "gap_vit": _timm("tiny_gap_vit"),
    "gap_vit_without_norm": _timm("tiny_plain_gap_vit"),
    "efficientnet": _timm("test_efficientnet", 64, "avg"),
    "resnet": _timm("test_resnet", 64, "avg"),
    "convnext": _timm("test_convnext", 64),
    "mobileclip": _timm("tiny_fastvit", 64, "avg", None),
}
# Towers for which the mean over the map is the embedding of the image.
EXACT = ["averaged_vit", "gap_vit_without_norm", "efficientnet", "resnet", "mobileclip"]
WITHOUT_KEYS = [*EXACT, "clipa", "gap_vit", "convnext"]
KINDS = list(VISION)
EMBED_DIM = 32  # SigLIP has no projection: its width is that of the joint space


def config_of(kind: str, **vision: Any) -> dict[str, Any]:
    """A model config in open_clip's form, whose image tower differs in `vision`."""
    tower = VISION[kind] | vision
    config: dict[str, Any] = {"embed_dim": EMBED_DIM, "vision_cfg": tower, "text_cfg": TEXT}
    if kind == "coca":
        text = TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 76, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        config |= {"text_cfg": text, "multimodal_cfg": decoder, "custom_text": True}
    return config


def write_encoder(folder: Path, kind: str, **vision: Any) -> EncoderParams:
    """Write config and random weights of a kind, whose image tower differs in `vision`."""
    config = config_of(kind, **vision)
    model, weights = folder / f"{kind}.json", folder / f"{kind}.safetensors"
    model.write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = _build(config, source=kind)
        _shake(clip.visual)  # type: ignore[arg-type]
        state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, weights)
    return EncoderParams(model=str(model), pretrained=str(weights))


def _shake(visual: nn.Module) -> None:
    """Give weight to what fresh networks start at zero or nearly so, and to statistics."""
    with torch.no_grad():
        for name, values in visual.state_dict().items():
            if "running_var" in name:
                values.uniform_(0.5, 1.5)
            elif values.is_floating_point():
                values.add_(0.1 * torch.randn_like(values))


def _model(network: type[nn.Module], options: dict[str, Any], **given: Any) -> nn.Module:
    """What timm's `create_model` asks for, without weights and their settings."""
    own = {name: given[name] for name in ("num_classes", "global_pool") if name in given}
    model = network(**{**options, **own})
    model.default_cfg = {}  # type: ignore[assignment]
    return model


@register_model
def tiny_token_vit(**given: Any) -> nn.Module:
    """A ViT with a class token and two registers without positions."""
    return _model(VisionTransformer, TIMM_VIT | {"reg_tokens": 2, "no_embed_class": True}, **given)


@register_model
def tiny_siglip(**given: Any) -> nn.Module:
    """A ViT with attention pooling."""
    return _model(VisionTransformer, TIMM_VIT | {"class_token": False}, **given)


@register_model
def tiny_gap_vit(**given: Any) -> nn.Module:
    """A ViT with a register, whose patch tokens are averaged, then normed."""
    options = {"class_token": False, "reg_tokens": 1, "global_pool": "avg"}
    return _model(VisionTransformer, TIMM_VIT | options, **given)


@register_model
def tiny_plain_gap_vit(**given: Any) -> nn.Module:
    """The same with the norm before the average."""
    options = {"class_token": False, "reg_tokens": 1, "global_pool": "avg", "fc_norm": False}
    return _model(VisionTransformer, TIMM_VIT | options, **given)


@register_model
def tiny_eva(**given: Any) -> nn.Module:
    """EVA-02's CLIP: positions and rotary ones, SwiGLU, separate queries, keys and values."""
    options = {
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "global_pool": "token",
    }
    return _model(Eva, TIMM_VIT | options, **given)


@register_model
def tiny_fastvit(**given: Any) -> nn.Module:
    """MobileCLIP's tower: convolutions, then attention."""
    options = {
        "layers": (1, 1, 1, 1),
        "embed_dims": (16, 16, 32, 32),
        "mlp_ratios": (2, 2, 2, 2),
        "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
        "act_layer": partial(nn.GELU, approximate="tanh"),
    }
    return _model(FastVit, options, **given)
