"""The network: its inputs, its choices, its gradients, its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from pipeline.errors import PipelineError
from pipeline.models.clip.tokens import (
    embed_patches,
    encode_patches,
    resize_positions,
    vision_tower,
)
from pipeline.models.layers.decoder import Memory, TransformerDecoder, sine_codes
from pipeline.models.zutis.build import build_zutis
from pipeline.models.zutis.network import Zutis


def small_network(**options: Any) -> Zutis:
    torch.manual_seed(0)
    encoder = VisionTransformer(32, 8, 16, 1, 2, 2.0, output_dim=12, act_layer=QuickGELU)
    sizes: dict[str, Any] = {
        "num_queries": 3,
        "decoder_layers": 2,
        "num_heads": 2,
        "feedforward_dim": 8,
    }
    return build_zutis(encoder, **sizes, **options)


def test_forward_normalises_with_imagenet_statistics() -> None:
    model = small_network()
    images = torch.rand(1, 3, 16, 24)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        direct = model(images)
        by_hand = model.forward_normalised((images - mean) / std)
    torch.testing.assert_close(direct.mask_logits, by_hand.mask_logits)
    torch.testing.assert_close(direct.patch_tokens, by_hand.patch_tokens)


def test_output_shapes_and_unit_tokens() -> None:
    with torch.inference_mode():
        output = small_network()(torch.rand(2, 3, 17, 40))
    assert output.mask_logits.shape == (2, 2, 3, 4, 10)
    assert output.patch_tokens.shape == (2, 4, 10, 12)
    norms = output.patch_tokens.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_separates_masks_from_encoder(stop: bool) -> None:
    model = small_network(stop_gradient=stop)
    model(torch.rand(1, 3, 16, 16)).mask_logits.square().sum().backward()
    encoder_gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert bool(encoder_gradients) is not stop
    assert model.query_embed.grad is not None
    assert model.query_embed.grad.abs().sum() > 0


def test_query_norm_bounds_logits() -> None:
    """Unit queries make scaling the last layer of ffn2 irrelevant; raw ones do not."""
    images = torch.rand(1, 3, 16, 16)
    for query_norm in (True, False):
        model = small_network(query_norm=query_norm)
        with torch.inference_mode():
            before = model(images).mask_logits
            for parameter in list(model.ffn2.parameters())[-2:]:
                parameter.mul_(3)
            after = model(images).mask_logits
        torch.testing.assert_close(after, before if query_norm else 3 * before)


def test_autocast_keeps_float32_outputs() -> None:
    model, images = small_network(), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(images)
    assert output.mask_logits.dtype == output.patch_tokens.dtype == torch.float32
    torch.testing.assert_close(output.patch_tokens, exact.patch_tokens, atol=0.05, rtol=0)


def test_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(PipelineError, match="40 x 7 pixels is smaller than a patch"):
        small_network()(torch.rand(1, 3, 7, 40))


def test_encoder_without_a_map_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"need a map .* is a Conv2d; use for example"):
        build_zutis(nn.Conv2d(3, 3, 1))


def test_queries_of_another_width_are_refused() -> None:
    model = small_network()
    with pytest.raises(ValueError, match=r"\(3, 5\), expected \(Q, 16\)"):
        Zutis(model.encoder, model.decoder, model.ffn1, model.ffn2, torch.zeros(3, 5))


def test_positions_to_target_size_keep_the_native_count() -> None:
    positions = torch.randn(17, 6)
    assert torch.equal(resize_positions(positions, 4, 4, mode="size"), positions)
    assert torch.equal(resize_positions(positions, 2, 8, mode="size"), positions)
    assert not torch.allclose(resize_positions(positions, 4, 4, mode="scale"), positions)
    resized = resize_positions(positions, 3, 5, mode="size")
    assert resized.shape == (16, 6)
    assert torch.equal(resized[0], positions[0])
    constant = resize_positions(torch.ones(17, 6), 7, 3, mode="size")
    torch.testing.assert_close(constant, torch.ones(22, 6))


def test_native_tokens_equal_the_towers_own() -> None:
    """At the native size, with positions left alone, this is what open_clip computes."""
    encoder = small_network().encoder.eval()
    encoder.output_tokens = True  # type: ignore[assignment]
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        _, expected = encoder(images)
        tokens = encode_patches(encoder, images, position_resize="size")
        embedded, grid = embed_patches(encoder, images, position_resize="size")
    torch.testing.assert_close(tokens.flatten(1, 2), expected)
    assert grid == (4, 4)
    assert embedded.shape == (2, 17, 16)


def test_decoder_without_memory_positions_ignores_token_order() -> None:
    torch.manual_seed(0)
    decoder = TransformerDecoder(8, 2, 2, 16)
    queries, memory = torch.randn(1, 3, 8), torch.randn(1, 6, 8)
    codes = sine_codes(2, 3, 8)
    with torch.inference_mode():
        plain, flipped = (decoder(queries, Memory(m)) for m in (memory, memory.flip(1)))
        placed, placed_flipped = (
            decoder(queries, Memory(m, positions=codes)) for m in (memory, memory.flip(1))
        )
    assert plain.shape == (1, 2, 3, 8)
    torch.testing.assert_close(plain, flipped, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(placed, placed_flipped, atol=1e-3)


@pytest.mark.parametrize("features", [5, 8, 11])
def test_memory_is_what_its_layer_makes_of_its_features(features: int) -> None:
    """Keys, values and products, and their gradients, in either form."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(features, 8)
    inputs, queries = torch.randn(2, 6, features), torch.randn(2, 4, 8)
    weight, bias = torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    codes = sine_codes(2, 3, 8)
    rows, columns = codes[0].repeat_interleave(3, dim=0), codes[1].repeat(2, 1)
    positions = torch.cat((rows, columns), dim=1)

    def outputs(memory: Memory) -> list[torch.Tensor]:
        return [memory.keys(weight, bias), memory.values(weight, bias), memory.dot(queries)]

    tokens = layer(inputs)
    expected = [
        (tokens + positions) @ weight.T + bias,
        tokens @ weight.T + bias,
        queries @ tokens.transpose(1, 2),
    ]
    learned = [layer.weight, layer.bias, weight, bias]
    upstream = [torch.randn_like(value) for value in expected]
    wanted = torch.autograd.grad(expected, learned, upstream, retain_graph=True)
    for memory in (Memory.of(inputs, layer, codes), Memory(tokens, positions=codes)):
        found = outputs(memory)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found, learned, upstream, retain_graph=True)
        torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [(0, 2, "0 layers: at least 1"), (1, 3, "3 attention heads.*width 8")],
)
def test_impossible_decoders_are_refused(layers: int, heads: int, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        TransformerDecoder(8, layers, heads, 16)


def test_position_code_needs_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4 features, got 6"):
        sine_codes(2, 2, 6)


def test_positions_by_grid_leave_the_native_grid_alone_and_no_other() -> None:
    positions = torch.randn(17, 6)
    assert torch.equal(resize_positions(positions, 4, 4, mode="grid"), positions)
    resized = resize_positions(positions, 2, 8, mode="grid")
    assert resized.shape == positions.shape
    # Twice as coarse in y and as fine in x: the middle row lies between rows 1 and 2.
    smooth = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, 6)
    columns = resize_positions(torch.cat((positions[:1], smooth)), 2, 8, mode="grid")[1:]
    assert torch.equal(columns[:8], columns[:1].expand(8, 6))
    assert not torch.allclose(resized, positions, atol=0.1)
    elsewhere = resize_positions(positions, 3, 5, mode="grid")
    assert torch.equal(elsewhere, resize_positions(positions, 3, 5, mode="size"))


def test_token_norms_span_what_they_say() -> None:
    norm_names = ("map", "token", "none")
    tokens = torch.randn(2, 4, 6, 16)
    with torch.inference_mode():
        raw = tokens @ vision_tower(small_network().encoder).proj
        networks = {name: small_network(token_norm=name) for name in norm_names}
        whole = {name: net.normalise_tokens(raw) for name, net in networks.items()}
        part = {name: net.normalise_tokens(raw[:, 1:2, 3:5]) for name, net in networks.items()}
    for name in norm_names:
        alone = torch.allclose(whole[name][:, 1:2, 3:5], part[name], atol=1e-5)
        assert alone is (name != "map"), name
        norms = whole[name].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)
    centred = raw - raw.mean(dim=-1, keepdim=True)
    for name, expected in (("none", raw), ("token", centred)):
        expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(whole[name], expected, atol=1e-4, rtol=0)


def test_positions_of_the_network_are_a_choice() -> None:
    images = torch.rand(1, 3, 32, 32)
    outputs = {}
    for mode in ("scale", "grid"):
        model = small_network(position_resize=mode, token_norm="none").eval()
        with torch.inference_mode():
            outputs[mode] = model.forward_normalised(images).patch_tokens
            tokens = encode_patches(model.encoder, images, position_resize=mode)
            # Upsampling by two leaves the corners of the map as they are.
            projected = tokens @ vision_tower(model.encoder).proj
            corners = model.normalise_tokens(projected)[:, ::3, ::3]
        torch.testing.assert_close(outputs[mode][:, ::7, ::7], corners, atol=1e-5, rtol=0)
    assert not torch.allclose(outputs["scale"], outputs["grid"], atol=1e-4)


def test_statistics_of_the_input_are_a_choice() -> None:
    images = torch.rand(1, 3, 16, 24)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    model = small_network(mean=mean, std=std)
    shape = (3, 1, 1)
    expected = (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(model.normalise(images), expected)
    assert model.state_dict().keys() == small_network().state_dict().keys()
