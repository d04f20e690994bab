"""Students as ONNX files: what they say beside torch, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.exporters.onnx import export_onnx
from pipeline.files import file_sha256
from pipeline.inference.onnx import OnnxNetwork, OnnxSegmenter
from pipeline.inference.segmenter import Segmenter
from pipeline.models.clip import load_clip
from pipeline.models.plus.network import build_plus
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME, save_checkpoint
from pipeline.models.zutis.build import build_zutis
from pipeline.params.base import CropNamesParams, EncoderParams, PredictionSettings
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint
from tests.tiny_encoders import write_encoder

# Of the tiny encoder, whose patches are 8 wide and whose own grid is 4 x 4: that grid, as many
# patches in another shape, one patch, sides that are no multiples.
SIZES = [(32, 32), (16, 64), (8, 8), (45, 83), (130, 24)]
SMALL = {"num_queries": 12, "decoder_layers": 2, "num_heads": 2, "feedforward_dim": 16}
PLUS = {
    "backbone": "timm:test_resnet",
    "head": "lraspp",
    "channels": 16,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.2],
}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Blots of colour, (height, width)."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def write_network(
    folder: Path, network: torch.nn.Module, encoder: EncoderParams, **config: Any
) -> Path:
    """A checkpoint for CATEGORIES."""
    content = {
        "encoder": {"model": encoder.model, "pretrained": encoder.pretrained},
        "categories": CATEGORIES,
        "background": ["background"],
        "templates": "name",
        "step": 7,
    }
    save_checkpoint(folder, network, content | config)
    return folder


def write_zutis(folder: Path, encoder: EncoderParams, **options: Any) -> Path:
    """A ZUTIS of random weights around an encoder, some of whose proposals are objects."""
    architecture: dict[str, Any] = SMALL | options
    network = build_zutis(load_clip(encoder, torch.device("cpu")).visual, **architecture)
    torch.nn.init.normal_(network.ffn1.layers[-1].weight, std=0.5)
    return write_network(folder, network, encoder, architecture=architecture)


def export(checkpoint: Path, path: Path, **options: Any) -> Path:
    """The file at `path`."""
    settings = options.pop("settings", PredictionSettings())
    export_onnx(checkpoint, path, settings=settings, cache_dir=path.parent, **options)
    return path


def assert_same(ours: OnnxSegmenter, theirs: Segmenter, image: Image.Image) -> None:
    """The label maps agree, and the objects, but for rounding."""
    mine, its = ours(image), theirs(image)
    assert (mine.semantic == its.semantic).mean() >= 0.999
    assert mine.semantic.dtype == its.semantic.dtype
    assert [item.label_id for item in mine.instances] == [item.label_id for item in its.instances]
    for one, other in zip(mine.instances, its.instances, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert (one.mask == other.mask).mean() >= 0.999


class TestZutis:
    @pytest.mark.parametrize(
        ("position_resize", "token_norm"), [("scale", "map"), ("size", "token"), ("grid", "none")]
    )
    def test_one_graph_is_right_for_every_size(
        self, position_resize: str, token_norm: str, encoder: EncoderParams, tmp_path: Path
    ) -> None:
        folder = write_zutis(
            tmp_path / "zutis", encoder, position_resize=position_resize, token_norm=token_norm
        )
        settings = PredictionSettings(suppression="none")
        network = OnnxNetwork.load(export(folder, tmp_path / "z.onnx", settings=settings))
        segmenter = Segmenter.load(folder, device="cpu", settings=settings)
        num_objects = 0
        for size in SIZES:
            image = picture(size)
            outputs = network.run(pixels(image).numpy(), ["semantic_logits"])
            wanted = segmenter.student.scores(pixels(image)).numpy()
            np.testing.assert_allclose(outputs["semantic_logits"], wanted, atol=1e-4)
            assert_same(OnnxSegmenter(network), segmenter, image)
            num_objects += len(segmenter(image).instances)
        assert num_objects > 5

    def test_a_network_that_gives_no_numbers_is_not_written(
        self, encoder: EncoderParams, tmp_path: Path
    ) -> None:
        network = build_zutis(load_clip(encoder, torch.device("cpu")).visual, **SMALL)
        torch.nn.init.constant_(network.ffn1.layers[-1].weight, torch.nan)  # of proposals alone
        folder = write_network(tmp_path / "zutis", network, encoder, architecture=SMALL)
        with pytest.raises(PipelineError, match=r"not written: .*largest difference nan"):
            export(folder, tmp_path / "z.onnx")
        assert not (tmp_path / "z.onnx").exists()

    def test_a_batch_of_several_sizes_keeps_its_order(
        self, tiny_clip: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        segmenter = OnnxSegmenter.load(export(folder, tmp_path / "z.onnx"))
        images = [picture((40, 64), 1), picture((33, 20), 2), picture((40, 64), 3)]
        together = segmenter.predict(images)
        assert [found.semantic.shape for found in together] == [(40, 64), (33, 20), (40, 64)]
        for image, found in zip(images, together, strict=True):
            assert (segmenter(image).semantic == found.semantic).mean() > 0.999

    def test_settings_and_some_of_the_names(
        self, tiny_clip: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip, logit_scale=20.0)
        network = OnnxNetwork.load(export(folder, tmp_path / "z.onnx"))
        image = picture((50, 70))
        for settings in (
            PredictionSettings(threshold=0.3, temperature=2.0, suppression="linear"),
            PredictionSettings(background=False, resize_to=40, region_majority=True),
            PredictionSettings(joint_foreground=True),
            PredictionSettings(suppression="none", max_side=48, whole_patches=True),
        ):
            theirs = Segmenter.load(folder, device="cpu", settings=settings)
            ours = OnnxSegmenter(network, settings=settings)
            assert_same(ours, theirs, image)
            assert_same(ours.select(["bird", "cat"]), theirs.select(["bird", "cat"]), image)
            difference = ours.confidence(image, "dog") - theirs.confidence(image, "dog")
            assert np.abs(difference).max() < 1e-4

    def test_text_as_an_input(
        self, tiny_clip: tuple[Path, Path], runtime: Runtime, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        path = export(folder, tmp_path / "z.onnx", text_input=True)
        network = OnnxNetwork.load(path)
        image = picture((40, 56))
        assert_same(OnnxSegmenter(network), Segmenter.load(folder, runtime=runtime), image)
        others = Segmenter.load(folder, categories=["boat", "bus"], runtime=runtime)
        text = others.student.graph().text.numpy()
        found = network.session.run(
            ["semantic_logits", "similarities"], {"images": pixels(image).numpy(), "text": text}
        )
        wanted = others.student.scores(pixels(image)).numpy()
        np.testing.assert_allclose(found[0], wanted, atol=1e-4)
        assert found[1].shape == (1, 12, 3)

    def test_other_names_are_folded_in(
        self, tiny_clip: tuple[Path, Path], runtime: Runtime, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        names = ["red car", "boat"]
        ours = OnnxSegmenter.load(export(folder, tmp_path / "z.onnx", categories=names))
        assert ours.categories == names
        theirs = Segmenter.load(folder, categories=names, runtime=runtime)
        assert_same(ours, theirs, picture((40, 56)))
        with pytest.raises(PipelineError, match="'cat' is not among its names: red car, boat"):
            ours.select(["cat"])

    def test_one_size(self, tiny_clip: tuple[Path, Path], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        segmenter = OnnxSegmenter.load(export(folder, tmp_path / "z.onnx", size=(32, 48)))
        assert_same(segmenter, Segmenter.load(folder, device="cpu"), picture((32, 48)))
        with pytest.raises(PipelineError, match="images of 48 x 32 pixels alone, not 32 x 48"):
            segmenter(picture((48, 32)))

    def test_8_bits_are_smaller_and_about_the_same(
        self, tiny_clip: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        whole, small = (
            export(folder, tmp_path / f"{int8}.onnx", int8=int8) for int8 in (False, True)
        )
        assert small.stat().st_size < 0.8 * whole.stat().st_size
        image = picture((64, 64))
        first, second = OnnxSegmenter.load(whole)(image), OnnxSegmenter.load(small)(image)
        assert (first.semantic == second.semantic).mean() > 0.9
        assert OnnxNetwork.load(small).info.int8

    def test_what_the_file_says_of_itself(
        self, tiny_clip: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        settings = PredictionSettings(resize_to=64, threshold=0.4)
        model = onnx.load(export(folder, tmp_path / "z.onnx", settings=settings))
        props = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        assert props["categories"] == CATEGORIES
        assert props["background"] == ["background"]
        assert props["mean"] == pytest.approx([0.485, 0.456, 0.406])
        assert props["checkpoint"] == file_sha256(folder / WEIGHTS_NAME)
        assert props["settings"]["resize_to"] == 64
        assert props["size"] is None
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
        defaults = {
            entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer
        }
        assert float(defaults["threshold"]) == pytest.approx(0.4)
        assert [entry.name for entry in model.graph.output] == [
            "semantic_logits",
            "proposals",
            "similarities",
            "scores",
        ]

    def test_scores_are_those_of_the_objects(
        self, tiny_clip: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        settings = PredictionSettings(suppression="none")
        network = OnnxNetwork.load(export(folder, tmp_path / "z.onnx", settings=settings))
        image = picture((64, 64))
        outputs = network.run(pixels(image).numpy(), ["scores", "similarities"])
        labels = outputs["similarities"][0].argmax(axis=1)
        scores = sorted(outputs["scores"][0][labels > 0].tolist(), reverse=True)
        found = [item.score for item in Segmenter.load(folder, settings=settings)(image).instances]
        assert len(found) > 5
        assert found == pytest.approx(scores, abs=1e-5)

    @pytest.mark.parametrize("kind", ["clip_resnet", "coca", "efficientnet"])
    def test_other_encoders(self, kind: str, tmp_path: Path) -> None:
        folder = write_zutis(tmp_path / "zutis", write_encoder(tmp_path, kind), num_heads=1)
        segmenter = OnnxSegmenter.load(export(folder, tmp_path / "z.onnx"))
        theirs = Segmenter.load(folder, device="cpu")
        for size in ((64, 96), (101, 70)):
            found, wanted = segmenter(picture(size)), theirs(picture(size))
            assert (found.semantic == wanted.semantic).mean() >= 0.999


class TestDenseClipPlus:
    @pytest.mark.parametrize("label_0", ["none", "learned", "names"])
    def test_it_has_label_maps_alone(
        self, label_0: str, encoder: EncoderParams, tmp_path: Path
    ) -> None:
        architecture = PLUS | {"background": label_0 == "learned", "num_classes": None}
        folder = write_network(
            tmp_path / "plus",
            build_plus(**architecture),
            encoder,
            student="denseclip_plus",
            architecture=architecture | {"label_0": label_0},
        )
        network = OnnxNetwork.load(export(folder, tmp_path / "p.onnx"))
        assert not network.finds_objects
        published = PredictionSettings(upsampling="published", joint_foreground=True)
        for settings in (PredictionSettings(), published):
            theirs = Segmenter.load(folder, device="cpu", settings=settings)
            for size in ((64, 96), (101, 70), (9, 40)):
                assert_same(OnnxSegmenter(network, settings=settings), theirs, picture(size))

    def test_a_learned_classifier_has_no_text(self, encoder: EncoderParams, tmp_path: Path) -> None:
        architecture = PLUS | {"background": False, "num_classes": 4}
        folder = write_network(
            tmp_path / "plus",
            build_plus(**architecture),
            encoder,
            student="denseclip_plus",
            architecture=architecture | {"label_0": "learned"},
        )
        ours = OnnxSegmenter.load(export(folder, tmp_path / "p.onnx"))
        assert_same(ours, Segmenter.load(folder, device="cpu"), picture((64, 96)))
        with pytest.raises(PipelineError, match=r"--text-input: .* has no text"):
            export(folder, tmp_path / "t.onnx", text_input=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"flip": True}, r"evaluate\.flip"),
            ({"crop_names": CropNamesParams()}, r"evaluate\.crop_names"),
            ({"score_resolution": "pixel"}, r"evaluate\.score_resolution: pixel"),
        ],
    )
    def test_settings_that_need_more_than_the_outputs(
        self,
        settings: dict[str, Any],
        message: str,
        tiny_clip: tuple[Path, Path],
        tmp_path: Path,
    ) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        with pytest.raises(PipelineError, match=message):
            export(folder, tmp_path / "z.onnx", settings=PredictionSettings(**settings))
        assert not (tmp_path / "z.onnx").exists()

    def test_an_encoder_without_a_form(self, tmp_path: Path) -> None:
        folder = write_zutis(tmp_path / "zutis", write_encoder(tmp_path, "siglip"), num_heads=1)
        with pytest.raises(PipelineError, match="has no form in ONNX"):
            export(folder, tmp_path / "z.onnx")

    def test_a_size_below_a_patch(self, tiny_clip: tuple[Path, Path], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        with pytest.raises(PipelineError, match="--size: 4x64: no side may be below 8"):
            export(folder, tmp_path / "z.onnx", size=(4, 64))

    def test_files_of_others(self, tiny_clip: tuple[Path, Path], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
        with pytest.raises(PipelineError, match="no such file"):
            OnnxNetwork.load(tmp_path / "z.onnx")
        with pytest.raises(PipelineError, match="cannot load it"):
            OnnxNetwork.load(folder / CONFIG_NAME)
        path = export(folder, tmp_path / "z.onnx")
        model = onnx.load(path)
        (entry,) = [entry for entry in model.metadata_props if entry.key == "format"]
        entry.value = "99"
        onnx.save(model, path)
        with pytest.raises(PipelineError, match="metadata: format: not what this version reads"):
            OnnxNetwork.load(path)
        del model.metadata_props[:]
        onnx.save(model, path)
        with pytest.raises(PipelineError, match="has no metadata of a student"):
            OnnxNetwork.load(path)
