from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import PipelineError
from pipeline.methods.dense import DenseClipParams
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.dense.denseclip import (
    DenseClip,
    dense_features,
    dense_logits,
    key_smoothing,
    prompt_denoising,
)
from pipeline.models.dense.labels import label_and_confidence
from pipeline.params.base import EncoderParams
from tests.paths import REFERENCE

CPU = torch.device("cpu")
VOCABULARY = [0, 320, 2368, 49406, 49407]
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
        "text_cfg": {"width": 128, "heads": 2, "layers": 1},
    },
    "rn": {
        "vision_cfg": {"image_size": 96, "layers": [2, 1, 2, 1], "width": 6},
        "text_cfg": {"width": 64, "heads": 1, "layers": 1},
    },
}
WEIGHTS = {"vit": "clip_tiny_vit16", "rn": "denseclip_rn"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipEncoder]:
    """The reference image towers, each with a text tower of five words."""
    folder = tmp_path_factory.mktemp("denseclip")
    return {name: _load_reference(folder, name) for name in CONFIGS}


def _load_reference(folder: Path, name: str) -> ClipEncoder:
    config = {"embed_dim": 48, "quick_gelu": True, "vocabulary": VOCABULARY, **CONFIGS[name]}
    config["text_cfg"] = {**config["text_cfg"], "vocab_size": len(VOCABULARY)}
    (folder / f"{name}.json").write_text(json.dumps(config))
    settings = {key: value for key, value in config.items() if key != "vocabulary"}
    state = open_clip.CLIP(**settings).state_dict()
    for key, tensor in load_file(REFERENCE / f"{WEIGHTS[name]}.weights.safetensors").items():
        if key.startswith("visual."):
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    save_file({key: t.contiguous() for key, t in state.items()}, folder / f"{name}.safetensors")
    return load_clip(
        EncoderParams(
            model=str(folder / f"{name}.json"), pretrained=str(folder / f"{name}.safetensors")
        ),
        CPU,
    )


class TestDenseFeatures:
    IMAGES = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))

    def test_own_activation_is_that_of_the_network(self, encoders: dict[str, ClipEncoder]) -> None:
        """With an attention that is the identity, a block of the network gives the same tokens."""
        visual = encoders["vit"].visual
        features, _ = dense_features(visual, self.IMAGES, published_activation=False)
        published, _ = dense_features(visual, self.IMAGES)
        assert (features - published).abs().max() > 1e-3
        one_patch = self.IMAGES[:, :, :64, :64]
        tokens = visual.forward_intermediates(one_patch, indices=[0], intermediates_only=True)
        x = tokens["image_intermediates"][0].permute(0, 2, 3, 1)
        last = visual.transformer.resblocks[-1]
        value = last.ln_1(x) @ last.attn.in_proj_weight[256:].T + last.attn.in_proj_bias[256:]
        y = x + last.attn.out_proj(value)
        y = visual.ln_post(y + last.mlp(last.ln_2(y))) @ visual.proj
        actual, _ = dense_features(visual, one_patch, published_activation=False)
        assert torch.allclose(actual.permute(0, 2, 3, 1), y, atol=1e-4)

    def test_value_only_drops_residual_and_mlp(self, encoders: dict[str, ClipEncoder]) -> None:
        visual = encoders["vit"].visual
        published, keys = dense_features(visual, self.IMAGES)
        features, same_keys = dense_features(visual, self.IMAGES, dense_attention="value_only")
        assert features.shape == published.shape == (2, 48, 4, 5)
        assert torch.equal(keys, same_keys)
        assert not torch.allclose(features, published, atol=1e-2)
        last = visual.transformer.resblocks[-1]
        mlp = {name: tensor.clone() for name, tensor in last.mlp.state_dict().items()}
        for tensor in last.mlp.state_dict().values():
            tensor.zero_()
        without_mlp, _ = dense_features(visual, self.IMAGES, dense_attention="value_only")
        last.mlp.load_state_dict(mlp)
        assert torch.equal(features, without_mlp)

    @pytest.mark.parametrize("size", [(1, 1), (17, 250), (31, 33)])
    @pytest.mark.parametrize("tower", ["vit", "rn"])
    def test_any_image_size_is_labelled(
        self, encoders: dict[str, ClipEncoder], tower: str, size: tuple[int, int]
    ) -> None:
        text = F.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), dim=1)
        model = DenseClip(
            encoders[tower], text, DenseClipParams(prompt_denoising=0.5, key_smoothing=1.0)
        )
        label, confidence = model.label(torch.full((1, 3, *size), 0.5))
        assert label.shape == confidence.shape == (1, *size)
        assert torch.isfinite(confidence).all()

    def test_another_image_tower_is_refused(self) -> None:
        with pytest.raises(PipelineError, match=r"Linear; use for example"):
            dense_features(nn.Linear(1, 1), self.IMAGES)

    def test_normalisation_is_a_choice(self, encoders: dict[str, ClipEncoder]) -> None:
        encoder = encoders["vit"]
        text = F.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), dim=1)
        features, _ = dense_features(encoder.visual, encoder.normalise(self.IMAGES))
        clip = DenseClip(encoder, text, DenseClipParams(normalisation="clip"))(self.IMAGES)
        imagenet = DenseClip(encoder, text, DenseClipParams())(self.IMAGES)
        assert torch.allclose(clip, dense_logits(features, text), atol=1e-6)
        assert not torch.allclose(clip, imagenet, atol=1e-3)

    def test_scores_are_float32_under_autocast(self, encoders: dict[str, ClipEncoder]) -> None:
        text = F.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), dim=1)
        model = DenseClip(encoders["vit"], text, DenseClipParams())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(self.IMAGES)
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, model(self.IMAGES), atol=0.05)
        assert scores.unique().numel() > scores.numel() // 2


class TestRefinements:
    def test_prompt_denoising_is_per_image(self) -> None:
        logits = torch.zeros(2, 2, 1, 2)
        logits[0, 0] = 1.0
        logits[1, :, 0, :] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        denoised = prompt_denoising(logits, 0.5)
        assert denoised[0, 1].tolist() == [[-100.0, -100.0]]
        assert torch.equal(denoised[0, 0], logits[0, 0])
        assert torch.equal(denoised[1], logits[1])

    def test_label_0_wins_where_every_label_is_removed(self) -> None:
        denoised = prompt_denoising(torch.zeros(1, 4, 2, 2), 0.5)
        label, confidence = label_and_confidence(denoised, (3, 3))
        assert (denoised == -100).all()
        assert (label == 0).all()
        assert torch.allclose(confidence, torch.full((1, 3, 3), 0.25), atol=1e-3)

    def test_key_smoothing_keeps_the_positions_that_reach_the_threshold(self) -> None:
        logits = torch.tensor([[[[0.01, 0.5]], [[0.0, 0.0]]]])
        keys = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])  # channels normalise to (.6, .8), (1, 0)
        smoothed = key_smoothing(logits, keys, 0.9)
        p = (100 * logits).softmax(dim=1)[0, :, 0]
        unsure = 1.36 * p[:, 0] + 0.48 * p[:, 1]
        assert torch.allclose(smoothed[0, :, 0], torch.stack([unsure, p[:, 1]], dim=1), atol=1e-6)


class TestLabelAndConfidence:
    SCORES = torch.randn(2, 11, 3, 4, generator=torch.Generator().manual_seed(0)) / 50

    @pytest.mark.parametrize("elements", [1, 2 * 7 * 9 * 4, 2**26])
    def test_labels_taken_in_parts_give_the_softmax_of_all(self, elements: int) -> None:
        label, confidence = label_and_confidence(self.SCORES, (7, 9), max_elements=elements)
        upsampled = F.interpolate(self.SCORES, size=(7, 9), mode="bilinear")
        expected, index = (100 * upsampled).softmax(dim=1).max(dim=1)
        assert torch.equal(label, index)
        assert torch.allclose(confidence, expected, atol=1e-5)

    def test_without_scale_confidence_is_a_share_of_the_positive_scores(self) -> None:
        scores = torch.tensor([6.0, -5.0, 2.0]).view(1, 3, 1, 1)
        label, confidence = label_and_confidence(scores, (1, 1), scale=None)
        assert (label.item(), confidence.item()) == (0, 0.75)
        label, confidence = label_and_confidence(-scores.abs(), (1, 1), scale=None)
        assert (label.item(), confidence.item()) == (2, 0.0)

    def test_the_first_of_equal_labels_wins(self) -> None:
        label, confidence = label_and_confidence(torch.ones(1, 4, 1, 1), (2, 2), max_elements=1)
        assert (label == 0).all()
        assert torch.allclose(confidence, torch.full((1, 2, 2), 0.25))


def test_cosine_affinity_averages_probabilities_by_the_keys() -> None:
    logits = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0)) / 100
    keys = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    smoothed = key_smoothing(logits, keys, 1.0, affinity="cosine")
    probabilities = (100 * logits).softmax(dim=1).flatten(2)
    for image in range(2):
        for position in range(6):
            cosines = F.cosine_similarity(keys[image], keys[image, position, None], dim=1)
            weights = cosines.clamp(min=0) / cosines.clamp(min=0).sum()
            expected = probabilities[image] @ weights
            torch.testing.assert_close(smoothed[image].flatten(1)[:, position], expected)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.ones(2, 2, 3))
    scaled = key_smoothing(logits, 3 * keys, 1.0, affinity="cosine")
    torch.testing.assert_close(scaled, smoothed)
    assert not torch.allclose(key_smoothing(logits, keys, 1.0), smoothed, atol=0.1)


def test_affinity_is_a_choice_of_the_model(encoders: dict[str, ClipEncoder]) -> None:
    text = F.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    images = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    cosine = DenseClip(
        encoders["vit"], text, DenseClipParams(key_smoothing=1.0, key_affinity="cosine")
    )(images)
    published = DenseClip(encoders["vit"], text, DenseClipParams(key_smoothing=1.0))(images)
    torch.testing.assert_close(cosine.sum(dim=1), torch.ones(1, 4, 5))
    assert not torch.allclose(cosine, published, atol=0.1)


@pytest.mark.parametrize(
    ("size", "same"), [((64, 64), True), ((64, 80), True), ((32, 128), False), ((128, 32), False)]
)
def test_grids_of_the_native_number_but_another_shape_are_resized_on_request(
    encoders: dict[str, ClipEncoder], size: tuple[int, int], same: bool
) -> None:
    """The native grid is 4 x 4, so 2 x 8 patches have its number."""
    text = F.normalize(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    published, grid = (
        DenseClip(encoders["vit"], text, DenseClipParams(position_resize=mode))(images)  # type: ignore[arg-type]
        for mode in ("size", "grid")
    )
    assert torch.equal(published, grid) is same
