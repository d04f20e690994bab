"""The network against published outputs and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.build import build_zutis
from pipeline.models.decoder import TransformerDecoder, sine_position_encoding
from pipeline.models.losses import mask_loss, semantic_loss
from pipeline.models.postprocess import semantic_logits, semantic_prediction
from pipeline.models.schedule import param_groups, set_learning_rates
from pipeline.models.tokens import embed_patches, encode_patches, resize_positions, vision_tower
from pipeline.models.weights import load_strict
from pipeline.models.zutis import Zutis

DATA = Path(__file__).parents[1] / "reference" / "data"
VARIANTS = ("p16", "p32")


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(DATA / f"{name}.io.safetensors"), json.loads(
        (DATA / f"{name}.json").read_text()
    )


def clip_vit(config: dict[str, int]) -> VisionTransformer:
    return VisionTransformer(
        image_size=config["image_resolution"],
        patch_size=config["vision_patch_size"],
        width=config["vision_width"],
        layers=config["vision_layers"],
        heads=config["vision_width"] // 64,
        mlp_ratio=4.0,
        output_dim=config["embed_dim"],
        act_layer=QuickGELU,
    )


def published_network(variant: str, **options: Any) -> Zutis:
    config = read(f"zutis_forward_{variant}")[1]["config"]
    model = build_zutis(
        clip_vit(config["clip"]),
        num_queries=config["n_queries"],
        decoder_layers=config["n_decoder_layers"],
        num_heads=config["n_heads"],
        feedforward_dim=config["decoder_feedforward"],
        **options,
    )
    weights = load_file(DATA / f"zutis_forward_{variant}.weights.safetensors")
    load_strict(model, weights, variant)
    return model.eval()


def with_layer_axis(proposals: Tensor) -> Tensor:
    return proposals if proposals.ndim == 5 else proposals[:, None]


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_forward_agrees_with_published(variant: str, case: str) -> None:
    io, _ = read(f"zutis_forward_{variant}")
    image = io[f"{case}.image"].float()
    with torch.inference_mode():
        output = published_network(variant).forward_normalised(image)
    proposals = with_layer_axis(io[f"{case}.mask_proposals"])
    torch.testing.assert_close(output.mask_probs, proposals, atol=5e-5, rtol=0)
    torch.testing.assert_close(output.patch_tokens, io[f"{case}.patch_tokens"], atol=5e-6, rtol=0)
    text = io["text_embeddings"]
    logits = semantic_logits(output.patch_tokens, text)
    expected = io[f"{case}.semantic_logits_lowres"]
    torch.testing.assert_close(logits, expected, atol=5e-6, rtol=0)
    size = (image.shape[-2], image.shape[-1])
    full = semantic_logits(output.patch_tokens, text, size)
    prediction = semantic_prediction(output.patch_tokens, text, size)
    first, second = full.topk(2, dim=1).values.unbind(1)
    decided = first - second > 1e-5
    assert torch.equal(prediction[decided], io[f"{case}.semantic_argmax"].long()[decided])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_positions_agree_with_published(variant: str, case: str) -> None:
    io, record = read(f"zutis_forward_{variant}")
    patch = record["config"]["clip"]["vision_patch_size"]
    height, width = (length // patch for length in io[f"{case}.image"].shape[-2:])
    own = vision_tower(published_network(variant).encoder).positional_embedding
    resized = resize_positions(own, height, width, mode="scale")
    expected = io[f"{case}.interpolated_pos_embed"][0]
    torch.testing.assert_close(resized.detach(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_agree_with_published(variant: str) -> None:
    io, _ = read(f"zutis_forward_{variant}")
    model = published_network(variant)
    with torch.inference_mode():
        tokens = encode_patches(model.encoder, io["A.image"].float())
        expected = io["A.encoder_tokens"]
        torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)
        _, dim, height, width = io["A.sine_pe"].shape
        positions = sine_position_encoding(height, width, dim)
        expected = io["A.sine_pe"][0].flatten(1).T
        torch.testing.assert_close(positions, expected, atol=1e-5, rtol=0)
        decoded = model.decoder(model.query_embed[None], io["A.decoder_memory"], positions)
        expected = io["A.decoder_out"][:, :, :1].permute(2, 0, 1, 3)
        torch.testing.assert_close(decoded, expected, atol=2e-5, rtol=1e-4)
        expected = io["A.query_ffn_out"].reshape(-1, *decoded.shape[1:])[:1]
        torch.testing.assert_close(model.ffn2(decoded), expected, atol=2e-5, rtol=1e-4)


def test_three_training_steps_agree_with_published() -> None:
    io, record = read("zutis_train_steps")
    model = published_network("p16").train()
    optimizer = torch.optim.AdamW(param_groups(model))
    semantic = io["semantic_masks"].long()
    semantic[semantic == 255] = -1
    instances = [io["instance_masks.0"].bool(), io["instance_masks.1"].bool()]
    for step, expected in enumerate(record["steps"]):
        set_learning_rates(optimizer, step, record["n_iters"])
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected["lr"])
        output = model.forward_normalised(io["image"].float())
        ce = semantic_loss(output.patch_tokens, io["text_embeddings"], semantic)
        mask = mask_loss(output.mask_probs, instances)
        assert ce.item() == pytest.approx(expected["ce_loss"], rel=2e-5)
        assert mask.item() == pytest.approx(expected["mask_loss"], rel=2e-5)
        optimizer.zero_grad()
        (ce + mask).backward()
        if step == 0:
            check_gradients(model, io, record["step0_gradients"])
        optimizer.step()
    with torch.inference_mode():
        output = model.forward_normalised(io["image"].float())
    for name in ("mask_probs", "patch_tokens"):
        expected = io[f"final.{'mask_proposals' if name == 'mask_probs' else name}"]
        torch.testing.assert_close(getattr(output, name), expected, atol=1e-3, rtol=0)


def check_gradients(model: nn.Module, io: dict[str, Tensor], norms: dict[str, Any]) -> None:
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, expected in norms.items():
        gradient = gradients[name]
        assert gradient is not None, name
        # Below 1e-6 a gradient is the rounding noise of a true zero.
        assert gradient.norm().item() == pytest.approx(expected["l2"], rel=1e-3, abs=1e-6), name
    for key, expected in io.items():
        if key.startswith("step0_grad."):
            gradient = gradients[key.removeprefix("step0_grad.")]
            assert gradient is not None
            gradient = gradient[: len(expected)]
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, atol=1e-4 * scale, rtol=1e-4)


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


def test_encoder_that_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"Conv2d has no conv1.*vision transformer"):
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
    positions = sine_position_encoding(2, 3, 8)
    with torch.inference_mode():
        plain, flipped = decoder(queries, memory), decoder(queries, memory.flip(1))
        placed = decoder(queries, memory, positions)
        placed_flipped = decoder(queries, memory.flip(1), positions)
    assert plain.shape == (1, 2, 3, 8)
    torch.testing.assert_close(plain, flipped, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(placed, placed_flipped, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [(0, 2, "0 layers: at least 1"), (1, 3, "3 attention heads.*width 8")],
)
def test_impossible_decoders_are_refused(layers: int, heads: int, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        TransformerDecoder(8, layers, heads, 16)


def test_position_code_needs_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4 features, got 6"):
        sine_position_encoding(2, 2, 6)
