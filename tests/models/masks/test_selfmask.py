"""SelfMask: its answer, its loss, and its weights files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import PipelineError
from pipeline.models.masks.selfmask import (
    SelfMask,
    SelfMaskConfig,
    SelfMaskOutput,
    load_selfmask,
    save_selfmask,
    selfmask_loss,
)

TINY = SelfMaskConfig(
    dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=2, mlp_ratio=2, grid=4
)


def tiny_model(seed: int = 0) -> SelfMask:
    torch.manual_seed(seed)
    return SelfMask(TINY).eval()


def test_position_embedding_is_kept_whenever_the_number_of_patches_agrees() -> None:
    encoder = tiny_model().encoder
    assert torch.equal(encoder.position_embedding(4, 4), encoder.pos_embed)
    assert torch.equal(encoder.position_embedding(2, 8), encoder.pos_embed)
    assert encoder.position_embedding(3, 4).shape == (1, 13, 16)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 31), (40, 17)])
def test_any_size_gives_probabilities_of_that_size(size: tuple[int, int]) -> None:
    probs = tiny_model().saliency(torch.rand(2, 3, *size))
    assert probs.shape == (2, *size)
    assert probs.dtype == torch.float32
    assert probs.min() >= 0
    assert probs.max() <= 1


def test_the_answer_is_the_query_with_the_highest_objectness() -> None:
    model = tiny_model()
    images = torch.rand(4, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(images)
    masks = model.saliency(images) > 0.5
    for index in range(4):
        best = int(output.objectness_logits[index, -1].argmax())
        logits = output.mask_logits[index, -1, best]
        upsampled = torch.nn.functional.interpolate(
            logits.sigmoid()[None, None], size=(32, 24), mode="bilinear"
        )
        assert torch.equal(upsampled[0, 0] > 0.5, masks[index])


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    model = tiny_model()
    images = torch.rand(2, 3, 24, 40)
    together = model.saliency(images)
    alone = model.saliency(images[1:])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


def perfect_output(target: torch.Tensor, *, logit: float) -> SelfMaskOutput:
    """One layer, two queries: the target itself, and nothing."""
    right = (target * 2 - 1) * logit
    wrong = torch.full_like(target, -logit)
    mask_logits = torch.stack((wrong, right), dim=1)[:, None]
    objectness = torch.tensor([[[-logit, logit]]]).expand(len(target), -1, -1)
    return SelfMaskOutput(mask_logits, objectness, cell_size=4)


def test_loss_vanishes_for_the_right_mask_and_ranking() -> None:
    cells = torch.zeros(1, 4, 6)
    cells[:, 1:3, 2:5] = 1
    pixels = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)
    losses = selfmask_loss(perfect_output(cells, logit=30.0), pixels.bool())
    assert losses["mask"] < 1e-6
    assert losses["objectness"] < 1e-6
    assert losses["total"] == losses["mask"] + losses["objectness"]


def test_only_the_closest_query_of_each_layer_is_pulled_to_the_target() -> None:
    cells = torch.zeros(1, 4, 4)
    cells[:, :2] = 1
    generator = torch.Generator().manual_seed(0)
    mask_logits = torch.randn(1, 2, 3, 4, 4, generator=generator) * 0.1
    mask_logits[0, 0, 2] += cells[0]
    mask_logits[0, 1, 0] += cells[0]
    mask_logits.requires_grad_()
    objectness = torch.zeros(1, 2, 3, requires_grad=True)
    target = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)
    selfmask_loss(SelfMaskOutput(mask_logits, objectness, 4), target)["total"].backward()
    assert mask_logits.grad is not None
    pulled = mask_logits.grad.abs().sum((3, 4))[0] > 0
    assert pulled.tolist() == [[False, False, True], [True, False, False]]
    assert objectness.grad is not None
    assert (objectness.grad != 0).all()


def test_loss_of_an_empty_target_is_finite_and_asks_for_an_empty_mask() -> None:
    model = tiny_model()
    output = model(torch.rand(2, 3, 20, 28))
    losses = selfmask_loss(output, torch.zeros(2, 20, 28))
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_padding_counts_as_background() -> None:
    output = tiny_model()(torch.rand(1, 3, 12, 20))  # padded to 16 x 24
    full = selfmask_loss(output, torch.ones(1, 12, 20))
    padded = torch.zeros(1, 16, 24)
    padded[:, :12, :20] = 1
    torch.testing.assert_close(full["mask"], selfmask_loss(output, padded)["mask"])


def test_targets_of_another_size_are_refused() -> None:
    output = tiny_model()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="32 x 16 pixels for masks over 16 x 16"):
        selfmask_loss(output, torch.zeros(1, 32, 16))


def test_training_learns_to_find_a_square() -> None:
    torch.manual_seed(0)
    model = SelfMask(TINY)
    images = torch.full((8, 3, 32, 32), 0.2)
    targets = torch.zeros(8, 32, 32)
    for index in range(8):
        top, left = 8 * (index // 3), 8 * (index % 3)
        images[index, :, top : top + 16, left : left + 16] = 0.8
        targets[index, top : top + 16, left : left + 16] = 1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        selfmask_loss(model(images), targets)["total"].backward()
        optimizer.step()
    masks = model.eval().saliency(images) > 0.5
    wanted = targets.bool()
    iou = (masks & wanted).sum((1, 2)) / (masks | wanted).sum((1, 2))
    assert iou.mean() > 0.8


def test_a_saved_network_comes_back_with_its_geometry(tmp_path: Path) -> None:
    model = tiny_model()
    save_selfmask(model, tmp_path / "a" / "tiny.safetensors")
    loaded = load_selfmask(tmp_path / "a" / "tiny.safetensors", torch.device("cpu"))
    assert loaded.config == TINY
    assert not loaded.training
    images = torch.rand(1, 3, 24, 16)
    assert torch.equal(loaded.saliency(images), model.saliency(images))


def test_a_bare_state_dict_in_a_pt_file_loads(tmp_path: Path) -> None:
    model = tiny_model()
    save_selfmask(model, tmp_path / "tiny.safetensors")
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    (tmp_path / "tiny.safetensors").unlink()
    loaded = load_selfmask(tmp_path / "tiny.pt")
    assert torch.equal(loaded.query_embed, model.query_embed)


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    save_selfmask(tiny_model(), tmp_path / "tiny.safetensors")
    state = load_file(tmp_path / "tiny.safetensors")
    state["stranger"] = state.pop("encoder.norm.bias")
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(PipelineError, match=r"(?s)tiny\.safetensors.*encoder\.norm\.bias.*strang"):
        load_selfmask(tmp_path / "tiny.safetensors")


def test_without_a_json_the_published_geometry_is_expected(tmp_path: Path) -> None:
    save_selfmask(tiny_model(), tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").unlink()
    with pytest.raises(PipelineError, match="dim=384"):
        load_selfmask(tmp_path / "tiny.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "needs a key `architecture`"),
        ("[]", "needs a key `architecture`"),
        ('{"architecture": {"dims": 3}}', "unknown dims; known are dim, depth"),
        ('{"architecture": {"dim": "big"}}', "dim must be a positive integer, got 'big'"),
        ('{"architecture": {"dim": 16, "num_heads": 3}}', "num_heads 3 does not divide dim 16"),
        ('{"architecture": {"patch_size": 7}}', "patch_size must be even, got 7"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_a_wrong_json_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    save_selfmask(tiny_model(), tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(content)
    with pytest.raises(PipelineError, match=rf"tiny\.json.*{message}"):
        load_selfmask(tmp_path / "tiny.safetensors")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none\.safetensors"):
        load_selfmask(tmp_path / "none.safetensors")
