"""Weights by tag and by the path of the same file: what the tag knows is applied to both."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.dense import DenseClipParams, load_dense_labeller
from pipeline.methods.masks import SpectralParams, load_mask_source
from pipeline.methods.students import ZutisParams
from pipeline.models.clip import ClipEncoder, clip_config, load_clip
from pipeline.models.clip.hub import tried_once
from pipeline.models.weights.acquire import add
from pipeline.models.weights.zoo import PublishedWeights, manifest
from pipeline.models.zutis.student import ZutisStudent
from pipeline.params.base import EncoderParams, TaggedFile
from pipeline.params.sections import EmbedParams
from pipeline.stages.embed import EmbedMaker
from pipeline.vocabulary.categories import Names
from tests.tiny_encoders import TINY_CLIP, add_tiny_architectures

CPU = torch.device("cpu")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TAGS: dict[str, dict[str, Any]] = {
    "openai": {"quick_gelu": True},
    "laion": {},
    "half": HALF,
    "siglip": HALF | {"resize_mode": "squash"},
    "mobile": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
    "squashed": {"interpolation": "bilinear", "resize_mode": "squash", "quick_gelu": True},
    "padded": {"resize_mode": "longest"},
}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of all tags of the architectures Tiny-8 and Tiny-8-quickgelu."""
    path = tmp_path / "downloaded.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**TINY_CLIP)
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    add_tiny_architectures(tmp_path / "configs", monkeypatch)
    tags = {tag: known | {"file": str(path)} for tag, known in TAGS.items()}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", tags)
    trained = {tag: known for tag, known in tags.items() if known.get("quick_gelu")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8-quickgelu", trained)
    return path


def load(model: str, pretrained: str | TaggedFile, **options: Any) -> ClipEncoder:
    return load_clip(EncoderParams(model=model, pretrained=pretrained), CPU, **options)


def warnings_of(function: Callable[[], object]) -> list[str]:
    gc.collect()  # what other tests have left open would warn of itself in here
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


@pytest.mark.filterwarnings("ignore:.*lacks QuickGELU")
class TestTaggedFile:
    @pytest.mark.parametrize("tag", TAGS)
    @pytest.mark.parametrize("form", ["mapping", "clip_retrieval", "both"])
    def test_it_is_read_as_the_tag(self, weights: Path, tag: str, form: str) -> None:
        model = "Tiny-8" if form == "mapping" else f"open_clip:Tiny-8/{tag}"
        file = str(weights) if form == "clip_retrieval" else TaggedFile(tag=tag, file=str(weights))
        by_tag, by_path = load("Tiny-8", tag), load(model, file)
        assert by_path.config == by_tag.config
        assert by_path.fingerprint() == by_tag.fingerprint()
        pixels = by_path.preprocess(PHOTO)
        assert torch.equal(pixels, by_tag.preprocess(PHOTO))
        expected = by_tag.encode_images(by_tag.preprocess(PHOTO)[None])
        assert torch.equal(by_path.encode_images(pixels[None]), expected)
        assert torch.equal(by_path.encode_texts(["a cat"]), by_tag.encode_texts(["a cat"]))

    @pytest.mark.parametrize("tag", TAGS)
    def test_images_are_prepared_as_by_open_clip(self, weights: Path, tag: str) -> None:
        encoder = load("Tiny-8", TaggedFile(tag=tag, file=str(weights)))
        known = {name: value for name, value in TAGS[tag].items() if name != "quick_gelu"}
        expected = image_transform_v2(PreprocessCfg(size=32, **known), is_train=False)(PHOTO)
        assert torch.allclose(encoder.normalise(encoder.preprocess(PHOTO)), expected, atol=1e-6)

    def test_the_dense_features_have_the_tags_mean_and_deviation(self, weights: Path) -> None:
        encoder = load("Tiny-8", TaggedFile(tag="half", file=str(weights)))
        for normalisation in ("clip", "imagenet"):
            assert encoder.statistics(normalisation) == ([0.5] * 3, [0.5] * 3)
        openai = load("Tiny-8", TaggedFile(tag="openai", file=str(weights)))
        assert openai.statistics("imagenet") == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def test_encoders_that_prepare_images_otherwise_have_other_fingerprints(
        self, weights: Path
    ) -> None:
        files = [TaggedFile(tag=tag, file=str(weights)) for tag in TAGS]
        known = [load("Tiny-8", file).fingerprint() for file in files]
        assert len(set(known)) == len(TAGS)

    def test_a_tag_that_the_model_lacks_is_refused_with_those_it_has(self, weights: Path) -> None:
        with pytest.raises(PipelineError, match=r"'openia' .*did you mean openai.*laion, half"):
            load("Tiny-8", TaggedFile(tag="openia", file=str(weights)))
        with pytest.raises(PipelineError, match=r"belongs to Tiny-8.*: openai, squashed"):
            load("Tiny-8-quickgelu", TaggedFile(tag="laion", file=str(weights)))

    def test_other_mistakes_are_answered(self, weights: Path, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"gone\.pt: no such weights file"):
            load("Tiny-8", TaggedFile(tag="laion", file="gone.pt"))
        with pytest.raises(PipelineError, match="'half' contradicts"):
            load("open_clip:Tiny-8/laion", TaggedFile(tag="half", file=str(weights)))
        own = tmp_path / "own.json"
        own.write_text(json.dumps(TINY_CLIP))
        with pytest.raises(PipelineError, match=r"own\.json has no tags.*write pretrained: "):
            load(str(own), TaggedFile(tag="laion", file=str(weights)))


class TestPathAlone:
    @pytest.mark.parametrize(
        ("model", "activation"),
        [("Tiny-8", "with GELU, not QuickGELU"), ("Tiny-8-quickgelu", "with QuickGELU")],
    )
    def test_it_says_in_one_warning_what_is_assumed(
        self, weights: Path, model: str, activation: str
    ) -> None:
        (said,) = warnings_of(lambda: load(model, str(weights), field="train.encoder"))
        assert said.startswith(f"train.encoder.pretrained: {weights} says no tag")
        words = [activation, "mean (0.48145", "std (0.2686", "bicubic resize (shortest)", "openai"]
        assert [word for word in words if word not in said] == []
        assert f"{{tag: TAG, file: {weights}}}" in said
        assert "\n" not in said

    def test_what_says_it_itself_needs_no_warning(self, weights: Path, tmp_path: Path) -> None:
        own = tmp_path / "own.json"
        own.write_text(json.dumps(TINY_CLIP))
        for model, file in [
            (str(own), str(weights)),
            ("Tiny-8", TaggedFile(tag="half", file=str(weights))),
            ("Tiny-8", "half"),
            ("open_clip:Tiny-8/half", str(weights)),
        ]:
            assert warnings_of(lambda model=model, file=file: load(model, file)) == []

    def test_a_copy_of_the_zoo_keeps_its_tag_by_name_and_by_path(
        self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = PublishedWeights(
            name="tiny_siglip",
            kind="open_clip",
            url="https://localhost.invalid/tiny.safetensors",
            sha256=None,
            size=None,
            licence="MIT",
            page="https://localhost.invalid",
            architecture={"model": "Tiny-8", "tag": "siglip"},
        )
        monkeypatch.setitem(manifest(), entry.name, entry)
        expected = load("Tiny-8", "siglip").fingerprint()
        copy = add(entry, weights, tmp_path / "cache")
        for pretrained in (entry.name, str(copy), "siglip"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loaded = load("Tiny-8", pretrained, cache_dir=tmp_path / "cache")
            assert loaded.fingerprint() == expected


@pytest.mark.filterwarnings("ignore:.*lacks QuickGELU")
class TestOwnConfig:
    def test_it_may_say_how_images_are_resized(self, weights: Path, tmp_path: Path) -> None:
        own = tmp_path / "own.json"
        preprocess = {"interpolation": "bilinear", "resize_mode": "squash"}
        own.write_text(json.dumps(TINY_CLIP | {"preprocess": preprocess}))
        expected = load("Tiny-8", TaggedFile(tag="squashed", file=str(weights))).preprocess(PHOTO)
        assert torch.equal(load(str(own), str(weights)).preprocess(PHOTO), expected)

    def test_an_unknown_way_is_refused(self, weights: Path, tmp_path: Path) -> None:
        own = tmp_path / "own.json"
        own.write_text(json.dumps(TINY_CLIP | {"preprocess": {"resize_mode": "stretch"}}))
        with pytest.raises(PipelineError, match=r"preprocess\.resize_mode is one of shortest, "):
            load(str(own), str(weights))


class TestMessages:
    def test_they_name_the_section(self) -> None:
        with pytest.raises(PipelineError, match=r"^embed\.encoder\.pretrained: empty"):
            load("ViT-B-32", "", field="embed.encoder")
        with pytest.raises(PipelineError, match=r"^mask\.encoder\.model: none\.json: no such"):
            clip_config(EncoderParams(model="none.json"), field="mask.encoder")

    @pytest.mark.parametrize("typed", ["photo_clib", "photoclip", "PHOTO_CLIP", "Photo-Clip"])
    def test_photo_clip_is_among_the_suggestions(self, typed: str) -> None:
        with pytest.raises(PipelineError, match="did you mean photo_clip"):
            load(typed, "photo_clip")

    def test_without_a_network_the_lines_to_write_are_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(PipelineError) as error:
            load("ViT-B-32", "laion2b_s34b_b79k", field="train.encoder")
        message = str(error.value)
        line = "encoder: {model: ViT-B-32, pretrained: {tag: laion2b_s34b_b79k, file: PATH}}"
        assert line in message
        assert "set train.encoder.pretrained to its path" in message
        assert "folder-offline" in message


class TestHub:
    def test_a_hub_that_cannot_be_reached_is_not_asked_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from huggingface_hub import constants, hf_hub_download

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(Exception, match=r"(?i)refused") as error, tried_once():
            open_clip.download_pretrained({"hf_hub": "no/where/"}, cache_dir=str(tmp_path))
        assert "Connect" in type(error.value).__name__
        assert "Retrying" not in caplog.text
        assert not constants.HF_HUB_OFFLINE
        folder = tmp_path / "models--no--where"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("1" * 40)
        (folder / "snapshots" / ("1" * 40)).mkdir(parents=True)
        file = folder / "snapshots" / ("1" * 40) / "open_clip_pytorch_model.bin"
        file.touch()
        with tried_once():
            found = open_clip.download_pretrained({"hf_hub": "no/where/"}, cache_dir=str(tmp_path))
            assert hf_hub_download("no/where", file.name, cache_dir=tmp_path) == found == str(file)
        assert "Retrying" not in caplog.text


@pytest.mark.parametrize("section", ["embed", "mask", "pseudo_label", "train"])
def test_every_stage_names_its_own_encoder(
    section: str, encoder: EncoderParams, runtime: Runtime
) -> None:
    missing = encoder.model_copy(update={"pretrained": "weights/none.pt"})
    names = Names(["cat"], ["background"])
    makers: dict[str, Callable[[], object]] = {
        "embed": lambda: EmbedMaker(EmbedParams(encoder=missing), runtime),
        "mask": lambda: load_mask_source(SpectralParams(encoder=missing), runtime),
        "pseudo_label": lambda: load_dense_labeller(
            DenseClipParams(encoder=missing), names, runtime
        ),
        "train": lambda: ZutisStudent(ZutisParams(encoder=missing), names, runtime),
    }
    with pytest.raises(PipelineError, match=rf"^{section}\.encoder\.pretrained: weights/none\.pt"):
        makers[section]()
