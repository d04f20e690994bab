"""A convolutional stem: a position a patch, batch norms folded away, loaded from a config file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.models.clip import load_clip
from pipeline.models.clip.loading import build_from_config
from pipeline.models.clip.stem import ConvStem
from pipeline.models.clip.tower import DenseOptions
from pipeline.models.weights.weights import save_tensors
from pipeline.params.base import EncoderParams

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 16,
        "head_width": 8,
        "patch_size": 4,
        "stem": {"width": 4, "blocks": [0, 1]},
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_folded_stem_is_the_same_function() -> None:
    torch.manual_seed(0)
    stem = ConvStem(6, width=4, blocks=(1, 0, 2), norm=nn.BatchNorm2d)
    for _ in range(3):  # statistics and weights other than the initial ones
        stem(torch.randn(4, 3, 24, 16) * 3 + 1)
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    images = torch.randn(2, 3, 16, 40)
    stem.eval()
    folded = stem.folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), stem(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (15, 9), (16, 23)])
def test_positions_are_whole_patches(size: tuple[int, int]) -> None:
    stem = ConvStem(6, width=4, blocks=(0, 0, 1))
    height, width = size
    images = torch.randn(1, 3, height, width)
    assert stem(images).shape == (1, 6, height // 8, width // 8)
    rest = images.clone()
    rest[..., height - height % 8 :, :] = 9.0
    rest[..., width - width % 8 :] = 9.0
    torch.testing.assert_close(stem(rest), stem(images))


def test_config_with_a_stem_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = build_from_config(CONFIG, source="test")
    (tmp_path / "clip.json").write_text(json.dumps(CONFIG))
    save_tensors(dict(clip.state_dict()), tmp_path / "clip.safetensors")
    encoder = load_clip(
        EncoderParams(
            model=str(tmp_path / "clip.json"), pretrained=str(tmp_path / "clip.safetensors")
        ),
        torch.device("cpu"),
    )
    assert encoder.patch_size == 4
    assert encoder.encode_images(torch.rand(2, 3, 16, 16)).shape == (2, 8)
    dense = encoder.tower.dense(torch.rand(2, 3, 12, 20), DenseOptions())
    assert dense.features.shape == (2, 8, 3, 5)
    assert encoder.tower.feature_map(torch.rand(1, 3, 13, 22)).shape == (1, 16, 3, 5)


def test_wrong_stem_names_the_file(tmp_path: Path) -> None:
    vision = {**CONFIG["vision_cfg"], "stem": {"depth": 3}}
    model, weights = tmp_path / "clip.json", tmp_path / "clip.safetensors"
    model.write_text(json.dumps({**CONFIG, "vision_cfg": vision}))
    save_tensors({"logit_scale": torch.zeros(())}, weights)
    with pytest.raises(PipelineError, match=r"clip\.json.*depth"):
        load_clip(EncoderParams(model=str(model), pretrained=str(weights)), torch.device("cpu"))
