"""Every kind of image tower: its map, its head, its own forward, any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip import ClipEncoder, DenseOptions, dense_tower, load_clip
from tests.tiny_encoders import EMBED_DIM, EXACT, KINDS, WITHOUT_KEYS, write_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipEncoder]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: load_clip(write_encoder(folder, kind), CPU) for kind in KINDS}


def images(encoder: ClipEncoder, *, rows: int = 0, columns: int = 0, count: int = 2) -> Tensor:
    """Normalised images of the native size and some patches more or less."""
    side, patch = encoder.image_size, encoder.patch_size
    size = (count, 3, side + rows * patch, side + columns * patch)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def embedding(encoder: ClipEncoder, pixels: Tensor) -> Tensor:
    """What the tower itself says of the image (B, C)."""
    with torch.no_grad():
        pooled = encoder.visual(pixels)
    return pooled[0] if isinstance(pooled, tuple) else pooled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(0, 0), (1, -1), (-1, 2)])
def test_shapes_follow_the_image(
    encoders: dict[str, ClipEncoder], kind: str, size: tuple[int, int]
) -> None:
    encoder = encoders[kind]
    tower = encoder.tower
    pixels = images(encoder, rows=size[0], columns=size[1])
    grid = tuple(side // tower.patch_size for side in pixels.shape[-2:])
    with torch.no_grad():
        maps = tower.feature_map(pixels)
        features, keys = tower.dense(pixels, DenseOptions())
        projected = tower.project(maps)
    assert maps.shape == (2, tower.width, *grid)
    assert projected.shape == features.shape == (2, EMBED_DIM, *grid)
    assert (keys is not None) is tower.has_keys is (kind not in WITHOUT_KEYS)
    assert keys is None or keys.shape[:2] == (2, grid[0] * grid[1])
    for facet in ("key", "value", "token"):
        assert encoder.patch_features(pixels, facet=facet).shape[-2:] == grid  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "clip_resnet"])
def test_what_exceeds_whole_patches_is_ignored_or_padded(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    tower = encoders[kind].tower
    pixels = images(encoders[kind], rows=1)
    odd = F.pad(pixels, (0, tower.patch_size - 1, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(tower.feature_map(odd), tower.feature_map(pixels))
        padded = F.pad(pixels, (0, tower.patch_size, 0, tower.patch_size))
        features = tower.dense(odd, DenseOptions()).features
        torch.testing.assert_close(features, tower.dense(padded, DenseOptions()).features)
    with pytest.raises(PipelineError, match="smaller than a patch"):
        tower.feature_map(pixels[..., : tower.patch_size - 1])


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("size", [(0, 0), (1, -1)])
def test_the_mean_of_the_map_is_the_embedding_where_the_pooling_is_an_average(
    encoders: dict[str, ClipEncoder], kind: str, size: tuple[int, int]
) -> None:
    """Of the text's logits, too, which are products with it. A ViT's own forward has one size."""
    encoder = encoders[kind]
    rows, columns = (0, 0) if kind == "averaged_vit" else size
    pixels = images(encoder, rows=rows, columns=columns)
    with torch.no_grad():
        features = encoder.tower.dense(pixels, DenseOptions()).features
    torch.testing.assert_close(
        features.mean(dim=(2, 3)), embedding(encoder, pixels), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["convnext", "gap_vit", "clipa"])
def test_a_norm_after_the_average_is_applied_to_positions(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    """Exact on a map whose positions are alike, which is all that is promised."""
    encoder = encoders[kind]
    tower = encoder.tower
    pixels = images(encoder)
    with torch.no_grad():
        maps = tower.feature_map(pixels)
        alike = maps.mean(dim=(2, 3), keepdim=True)
        projected = tower.project(alike)
    torch.testing.assert_close(
        projected[..., 0, 0], embedding(encoder, pixels), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["coca", "siglip"])
def test_the_head_of_an_attention_pooling_is_exact_where_all_positions_agree(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    """A softmax over equal values returns the value, through projection, residual and MLP."""
    visual: Any = encoders[kind].visual
    maps = torch.randn(2, encoders[kind].tower.width, 1, 1)
    tokens = maps[..., 0].transpose(1, 2).expand(-1, 7, -1)
    with torch.no_grad():
        if kind == "siglip":
            pooled = visual.head(visual.trunk.forward_head(tokens))
        else:
            pooled = visual._pool(tokens)[0] @ visual.proj
        projected = encoders[kind].tower.project(maps)
    torch.testing.assert_close(projected[..., 0, 0], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["eva", "timm_vit"])
def test_the_class_tokens_value_path_is_the_block_where_it_sees_itself_alone(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    """The identity as attention matrix, by timm's own masks."""
    encoder = encoders[kind]
    trunk: Any = encoder.visual.trunk
    pixels = images(encoder, columns=1)
    with torch.no_grad():
        actual = encoder.tower.dense(pixels, DenseOptions()).features
        *blocks, last = trunk.blocks
        tokens, rope = _tokens(trunk, pixels)
        for block in blocks:
            tokens = block(tokens, **rope)
        alone = torch.full((tokens.shape[1],) * 2, -torch.inf).fill_diagonal_(0)
        tokens = trunk.norm(last(tokens, attn_mask=alone, **rope))
        expected = encoder.visual.head(trunk.head(tokens))[:, trunk.num_prefix_tokens :]  # type: ignore[operator]
    expected = expected.transpose(1, 2).unflatten(2, actual.shape[-2:])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def _tokens(trunk: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = trunk._pos_embed(trunk.patch_embed(pixels))
    if isinstance(tokens, tuple):
        return trunk.norm_pre(tokens[0]), {"rope": tokens[1]}
    return trunk.norm_pre(tokens), {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_leaves_the_embedding_of_the_image_as_it_is(tmp_path: Path, kind: str) -> None:
    encoder = load_clip(write_encoder(tmp_path, kind), CPU)
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    before = embedding(encoder, pixels)
    with torch.no_grad():
        encoder.tower.dense(images(encoder, rows=2), DenseOptions())
        encoder.tower.dense(pixels, DenseOptions())
    assert torch.equal(embedding(encoder, pixels), before)


@pytest.mark.parametrize("kind", ["eva", "timm_vit", "siglip", "gap_vit"])
def test_native_maps_are_the_towers_own(tmp_path: Path, kind: str) -> None:
    encoder = load_clip(write_encoder(tmp_path, kind), CPU)
    trunk: Any = encoder.visual.trunk
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        expected = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
        maps = encoder.tower.feature_map(pixels)
    assert torch.equal(maps.flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize(("kind", "name"), [("eva", "tiny_eva"), ("siglip", "tiny_siglip")])
def test_positions_of_another_grid_are_those_of_timm(
    encoders: dict[str, ClipEncoder], kind: str, name: str
) -> None:
    """A network that timm itself resizes: rotary positions and embeddings follow the grid."""
    encoder = encoders[kind]
    pixels = images(encoder, rows=2, columns=-1)
    pool = {"eva": "token", "siglip": "map"}[kind]
    resized = timm.create_model(name, num_classes=0, global_pool=pool).eval()
    trunk: Any = encoder.visual.trunk
    state = trunk.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    resized.load_state_dict(state)
    resized.set_input_size(img_size=tuple(pixels.shape[-2:]))
    with torch.no_grad():
        expected = resized.forward_features(pixels)[:, resized.num_prefix_tokens :]
        maps = encoder.tower.feature_map(pixels)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", ["clip_vit", "coca", "averaged_vit", "eva", "timm_vit", "siglip", "gap_vit"]
)
def test_keys_of_a_vit_are_those_of_its_blocks(encoders: dict[str, ClipEncoder], kind: str) -> None:
    encoder = encoders[kind]
    pixels = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    keys, tokens = (encoder.patch_features(pixels, facet=facet) for facet in ("key", "token"))  # type: ignore[arg-type]
    assert keys.shape == tokens.shape == (1, encoder.tower.width, 4, 4)
    assert not torch.allclose(keys, tokens, atol=0.01)
    first = encoder.patch_features(pixels, layer=0)
    assert torch.equal(first, encoder.patch_features(pixels, layer=-2))
    with pytest.raises(PipelineError, match="layer: 2 does not exist; this ViT has 2 blocks"):
        encoder.patch_features(pixels, layer=2)


@pytest.mark.parametrize("kind", ["eva", "timm_vit", "siglip", "gap_vit"])
def test_values_are_what_attention_returns_to_a_position_alone(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    encoder = encoders[kind]
    pixels = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    attention = encoder.visual.trunk.blocks[-1].attn  # type: ignore[union-attr,index]
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _module, inputs, _output: seen.append(*inputs))
    values = encoder.patch_features(pixels, facet="value")
    handle.remove()
    patches = seen[0][0, -16:]
    with torch.no_grad():
        expected = attention(patches[:, None])[:, 0]
        actual = attention.proj(attention.norm(values.flatten(2)[0].T))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["efficientnet", "convnext", "mobileclip"])
def test_networks_of_convolutions_give_the_output_of_a_stage_for_keys(
    encoders: dict[str, ClipEncoder], kind: str
) -> None:
    encoder = encoders[kind]
    pixels = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    trunk: Any = encoder.visual.trunk
    with torch.no_grad():
        stages = trunk.forward_intermediates(encoder.normalise(pixels), intermediates_only=True)
    for facet in ("key", "value", "token"):
        for layer in (0, -1):
            actual = encoder.patch_features(pixels, facet=facet, layer=layer)  # type: ignore[arg-type]
            assert torch.equal(actual, stages[layer])
    with pytest.raises(PipelineError, match=r"layer: 7 does not exist; timm's .* stages"):
        encoder.patch_features(pixels, layer=7)


@pytest.mark.parametrize(
    ("visual", "name"),
    [
        (nn.Linear(1, 1), "Linear"),
        (TimmModel("test_mambaout", 8, 64, pool="", proj="linear"), "TimmModel .* MambaOut"),
        (TimmModel("test_efficientnet", 8, 64, pool="max", proj="linear"), "EfficientNet"),
        (TimmModel("test_vit", 8, 160, pool="max", proj="linear"), r"VisionTransformer.*'max'"),
    ],
)
def test_a_tower_without_a_map_is_refused_by_name(visual: nn.Module, name: str) -> None:
    with pytest.raises(PipelineError, match=f"dense features need a map.*{name}"):
        dense_tower(visual)


def test_one_by_one_does_not_depend_on_how_many_go_at_once(
    encoders: dict[str, ClipEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders["siglip"]
    pixels = images(encoder, rows=1)
    with torch.no_grad():
        whole = encoder.tower.dense(pixels, DenseOptions()).features
        monkeypatch.setattr("pipeline.models.clip.timm_towers.ROWS_AT_ONCE", 3)
        parts = encoder.tower.dense(pixels, DenseOptions()).features
    torch.testing.assert_close(parts, whole)
