"""DINO features against the published SelfMask encoder, which is the same network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.masks import SpectralParams, load_mask_source
from pipeline.models.layers import dino
from pipeline.models.layers.dino import DinoEncoder, build_dino, load_dino
from pipeline.models.layers.vit import SelfMaskConfig
from pipeline.models.masks.making import coarse_masks
from pipeline.params.base import EncoderParams
from tests.paths import REFERENCE as DATA

VECTORS = load_file(DATA / "selfmask_forward.io.safetensors")
REFERENCE = SelfMaskConfig(dim=48, depth=2, num_heads=3)
CPU = torch.device("cpu")
CASES = pytest.mark.parametrize("case", ["A", "B"])


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reference encoder as a backbone file of its own, known as the model `dino_reference`."""
    monkeypatch.setitem(dino.DINO_MODELS, "dino_reference", REFERENCE)
    weights = load_file(DATA / "selfmask_forward.weights.safetensors")
    encoder = {
        name.removeprefix("encoder."): value.float()
        for name, value in weights.items()
        if name.startswith("encoder.")
    }
    torch.save(encoder, tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


@pytest.fixture
def encoder(backbone: Path, tmp_path: Path) -> DinoEncoder:
    return load_dino(
        EncoderParams(model="dino_reference", pretrained=str(backbone)), CPU, cache_dir=tmp_path
    )


def images_of(case: str, encoder: DinoEncoder) -> Tensor:
    return VECTORS[f"{case}.image"].float() * encoder.std + encoder.mean


@CASES
def test_tokens_agree_with_the_published_network(case: str, encoder: DinoEncoder) -> None:
    images = images_of(case, encoder)
    tokens = encoder.patch_features(images, facet="token")
    assert tokens.shape[-2:] == (-(-images.shape[2] // 8), -(-images.shape[3] // 8))
    expected = VECTORS[f"{case}.encoder_last_layer_tokens"][:, 1:]
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_keys_are_the_middle_third_of_the_projection(layer: int, encoder: DinoEncoder) -> None:
    seen: list[Tensor] = []
    block = encoder.vit.get_submodule(f"blocks.{layer % 2}.attn.qkv")
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.rand(2, 3, 16, 32)
    encoder.vit((images - encoder.mean) / encoder.std)
    handle.remove()
    keys = encoder.patch_features(images, layer=layer)
    assert keys.shape == (2, 48, 2, 4)
    torch.testing.assert_close(keys.flatten(2).transpose(1, 2), seen[0][:, 1:, 48:96])


def test_a_strip_of_as_many_patches_as_the_native_grid_has_its_own_positions(
    encoder: DinoEncoder,
) -> None:
    """Positions that tell rows alone do so at every grid: columns of a grey image are alike."""
    side = encoder.config.grid
    rows = torch.linspace(-1, 1, side).repeat_interleave(side)
    with torch.no_grad():
        encoder.vit.pos_embed[:, 1:] = rows[:, None] * torch.linspace(-1, 1, 48)
    height, width = side // 2, 2 * side
    grey = torch.full((1, 3, height * encoder.patch_size, width * encoder.patch_size), 0.5)
    [tokens] = encoder.patch_features(grey, facet="token")
    assert tokens.shape[1:] == (height, width)
    torch.testing.assert_close(tokens, tokens[..., :1].expand_as(tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(tokens[:, :1], tokens[:, -1:], atol=1e-2)


def test_a_block_beyond_the_last_is_refused(encoder: DinoEncoder) -> None:
    with pytest.raises(PipelineError, match="layer: 2 does not exist; this ViT has 2 blocks"):
        encoder.patch_features(torch.zeros(1, 3, 8, 8), layer=2)


def test_one_pixel_is_one_patch(encoder: DinoEncoder) -> None:
    assert encoder.patch_features(torch.rand(1, 3, 1, 1)).shape == (1, 48, 1, 1)


def test_the_fingerprint_follows_the_weights(backbone: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return load_dino(
            EncoderParams(model="dino_reference", pretrained=str(path)), CPU, cache_dir=tmp_path
        ).fingerprint()

    state = torch.load(backbone, weights_only=True)
    save_file(state, tmp_path / "same.safetensors")
    state["norm.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    assert fingerprint(tmp_path / "same.safetensors") == fingerprint(backbone)
    assert fingerprint(tmp_path / "other.safetensors") != fingerprint(backbone)


def test_weights_of_another_patch_size_are_refused(tmp_path: Path) -> None:
    torch.save(build_dino("dino_vits8").state_dict(), tmp_path / "s8.pth")
    with pytest.raises(PipelineError, match=r"s8\.pth: .*(?s:.*)pos_embed is \[1, 785, 384\]"):
        load_dino(
            EncoderParams(model="dino_vits16", pretrained=str(tmp_path / "s8.pth")),
            CPU,
            cache_dir=tmp_path,
        )


def test_published_weights_are_found_by_the_models_name(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="pipeline weights fetch dino_vits16"):
        load_dino(EncoderParams(model="dino_vits16", pretrained=""), CPU, cache_dir=tmp_path)


@pytest.mark.parametrize("facet", ["key", "token"])
def test_the_mask_stage_clusters_its_features(facet: str, backbone: Path, runtime: Runtime) -> None:
    encoder = EncoderParams(model="dino_reference", pretrained=str(backbone))
    params = SpectralParams(source="spectral", encoder=encoder, facet=facet, refine=False)  # type: ignore[arg-type]
    masker = load_mask_source(params, runtime)
    pixels = np.full((40, 56, 3), 30, dtype=np.uint8)
    pixels[10:26, 16:40] = (250, 60, 200)
    (mask,) = coarse_masks([Image.fromarray(pixels)], source=masker)
    assert mask.shape == (40, 56)
    assert 0 < mask.sum() < mask.size
    assert masker.settings["encoder"] != ""
