"""DenseCLIP+ through the train stage: what it leaves, resumes, keeps at the switch, and skips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.benchmarks.voc import VocWriter
from pipeline.errors import PipelineError
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.students import DenseClipPlusParams
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.models.clip.crop_names import crop
from pipeline.models.layers.interpolate import upsample
from pipeline.models.layers.pamr import refine
from pipeline.models.layers.regions import (
    boxes_of_regions,
    majority_of_regions,
    regions_of_one_label,
)
from pipeline.params.base import CropNamesParams, EncoderParams, PamrParams, PredictionSettings
from pipeline.params.benches import VocBench
from pipeline.params.sources import SourceParams
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_training import (
    CATEGORIES,
    curve,
    outputs,
    run,
    start_training,
    states,
    write_labels,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven photos in VOC's layout, one of them damaged."""
    root = tmp_path_factory.mktemp("photos") / "voc"
    writer = VocWriter(root)
    for number in range(11):
        labels = np.zeros((30, 40), dtype=np.uint8)
        labels[:20, :20], labels[20:] = 1, 2
        data = encoded_image(noise_image(number, 40, 30), "JPEG")
        writer.add(f"im{number:02d}", data if number != 3 else data[:-200], labels, labels)
    writer.write_split("train", [f"im{number:02d}" for number in range(11)])
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plus(encoder: EncoderParams, **changes: Any) -> DenseClipPlusParams:
    settings: dict[str, Any] = {
        "encoder": encoder,
        "backbone": "timm:resnet10t",
        "backbone_weights": None,
        "head": "lraspp",
        "iterations": 4,
        "guided_iterations": 2,
        "batch_size": 2,
        "crop_size": 32,
        "base_size": None,
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 1,
    }
    return DenseClipPlusParams(**{**settings, **changes})


def zero_shot(photos: Path, encoder: EncoderParams, **changes: Any) -> DenseClipPlusParams:
    settings: dict[str, Any] = {
        "data": VocBench(format="voc", root=photos, split="train", categories=CATEGORIES),
        "labels": photos,
        "setting": "zero_shot",
        "unseen": ["dog"],
        "background": "learned",
        "self_training": "on",
    }
    return plus(encoder, **{**settings, **changes})


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def test_stored_labels_teach_a_network_that_takes_any_names(
    shards: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = plus(encoder, teacher="stored", labels=shards, background="names")
    root = run(shards, tmp_path / "a", params)
    config = config_of(root / "zutis")
    assert (config["student"], config["step"]) == ("denseclip_plus", 4)
    assert config["architecture"]["label_0"] == "names"
    assert not (root / "zutis/guided").exists()
    # The labels that are stored here say background everywhere.
    assert [value for _, value in curve(root, "share_background")] == [1.0] * 4
    segmenter = Segmenter.load(root / "zutis", categories=["horse", "dog", "car"], device="cpu")
    for size in ((40, 24), (1, 1), (7, 50)):
        semantic = segmenter(Image.new("RGB", size)).semantic
        assert semantic.shape == size[::-1]
        assert set(np.unique(semantic)) <= {0, 1, 2, 3}
    confidence = segmenter.confidence(Image.new("RGB", (9, 5)), "dog")
    assert confidence.shape == (5, 9)
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_a_region_takes_what_most_of_it_has_where_that_is_asked_for(
    shards: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(shards, tmp_path, plus(encoder, data="archives"))
    maps = []
    for is_on in (False, True):
        settings = PredictionSettings(region_majority=is_on)
        segmenter = Segmenter.load(root / "zutis", settings=settings, device="cpu")
        maps.append(segmenter(noise_image(1, 200, 300)).semantic)
        protocol = segmenter.student.protocol(settings)
        assert protocol.get("region_majority") == (is_on or None)
    assert len(np.unique(maps[0])) == 2  # all is foreground, and so one region
    np.testing.assert_array_equal(maps[1], majority_of_regions(maps[0]))
    assert len(np.unique(maps[1])) == 1


def test_flip_and_pamr_refine_what_it_predicts(
    shards: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(shards, tmp_path, plus(encoder, data="archives"))
    image, pamr = noise_image(1, 40, 56), PamrParams(dilations=[1, 2], steps=3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    segmenter = Segmenter.load(root / "zutis", device="cpu")
    scores = segmenter.student.scores(pixels)
    mirrored = segmenter.student.scores(pixels.flip(-1)).flip(-1)
    for settings, mean in (
        (PredictionSettings(pamr=pamr), scores),
        (PredictionSettings(pamr=pamr, flip=True), (scores + mirrored) / 2),
    ):
        refined = refine(upsample(mean, (56, 40)).softmax(dim=1), pixels, dilations=[1, 2], steps=3)
        segmenter = Segmenter.load(root / "zutis", settings=settings, device="cpu")
        np.testing.assert_array_equal(segmenter(image).semantic, refined.argmax(dim=1)[0])
        jointly = settings.model_copy(update={"joint_foreground": True})
        segmenter = Segmenter.load(root / "zutis", settings=jointly, device="cpu")
        is_object = refined[0, 1:].sum(dim=0) > refined[0, 0]
        best = 1 + refined[0, 1:].argmax(dim=0)
        np.testing.assert_array_equal(segmenter(image).semantic, np.where(is_object, best, 0))


def test_crops_name_the_regions_that_it_predicts(
    shards: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(shards, tmp_path, plus(encoder, data="archives"))
    image = noise_image(1, 40, 56)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    clip = load_clip(encoder, torch.device("cpu"))
    before, after = (
        Segmenter.load(root / "zutis", settings=settings, device="cpu")(image).semantic
        for settings in (
            PredictionSettings(),
            PredictionSettings(crop_names=CropNamesParams(weight=1.0)),
        )
    )
    segmenter = Segmenter.load(root / "zutis", device="cpu")
    text = text_embeddings(clip, segmenter.categories, ["{}"])
    tokens = segmenter.student.scores(pixels[None]).shape[-2:]
    regions = regions_of_one_label(before, before.size // (tokens[0] * tokens[1]))
    assert regions.max() > 0
    for number, box in enumerate(boxes_of_regions(regions).tolist(), start=1):
        seen = clip.encode_images(crop(pixels, box, 0.0, clip.image_size)[None]) @ text.T
        assert set(after[regions == number]) == {1 + int(seen.argmax())}
    np.testing.assert_array_equal(after[regions == 0], before[regions == 0])


def test_without_a_row_for_background_nothing_is_background(
    shards: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(shards, tmp_path, plus(encoder, data="archives"))
    segmenter = Segmenter.load(root / "zutis", device="cpu")
    assert set(np.unique(segmenter(noise_image(1, 20, 30)).semantic)) <= {1, 2}


def test_the_network_at_the_switch_is_kept(
    photos: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = zero_shot(photos, encoder, unseen=CATEGORIES)
    whole = run(photos, tmp_path / "whole", params)
    assert config_of(whole / "zutis/guided")["step"] == 2
    assert config_of(whole / "zutis")["step"] == 4
    # Up to the switch, the same as with a teacher to the end.
    guided = run(
        photos,
        tmp_path / "guided",
        zero_shot(photos, encoder, unseen=CATEGORIES, self_training="off"),
    )
    assert curve(whole, "loss")[:2] == curve(guided, "loss")[:2]
    assert curve(whole, "loss")[2:] != curve(guided, "loss")[2:]
    stats = json.loads((whole / "stats.json").read_text())
    assert stats["counts"] == {"images": 11}


def test_an_image_that_cannot_be_read_is_skipped_and_listed(
    photos: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(photos, tmp_path, zero_shot(photos, encoder, iterations=6))
    stats = json.loads((root / "stats.json").read_text())
    (skipped,) = stats["skipped_items"]
    assert skipped["item"].endswith("im03.jpg")
    assert stats["skipped"] == 1


def test_images_without_annotation_are_unlabelled_beside_those_with_truth(
    photos: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    for number in range(4):
        data = encoded_image(noise_image(20 + number, 40, 30), "JPEG")
        (tmp_path / f"more/{number}.jpg").write_bytes(data)
    more = SourceParams(root=tmp_path / "more")
    params = zero_shot(photos, encoder, unlabelled=more, iterations=8)
    root = run(photos, tmp_path / "run", params)
    stats = json.loads((root / "stats.json").read_text())
    assert stats["counts"] == {"images": 15}
    alone = run(photos, tmp_path / "alone", zero_shot(photos, encoder, iterations=8))
    assert curve(root, "pseudo") != curve(alone, "pseudo")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_an_image_is_said_in_one_line(
    photos: Path, encoder: EncoderParams, tmp_path: Path, workers: int
) -> None:
    """Whoever finds it: too many images that cannot be read, a label that is no category's."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(
            b"" if number else encoded_image(noise_image(1), "JPEG")
        )
    data = SourceParams(root=folder)
    with pytest.raises(
        PipelineError, match=r"^2 of 3 images cannot be read, the last .*\.jpg: "
    ) as bad:
        run(photos, tmp_path / "a", plus(encoder, data=data, labels=folder, workers=workers))
    assert "\n" not in str(bad.value)
    fewer = VocBench(format="voc", root=photos, split="train", categories=["dog"])
    params = zero_shot(photos, encoder, data=fewer, workers=workers)
    with pytest.raises(PipelineError, match=r"SegmentationClass/im\d+\.png: ") as wrong:
        run(photos, tmp_path / "b", params)
    assert "Traceback" not in str(wrong.value)


def test_on_and_off_may_be_booleans(encoder: EncoderParams) -> None:
    assert plus(encoder, self_training=True).self_training == "on"
    assert plus(encoder, self_training=False).self_training == "off"


def test_killed_and_started_again_gives_the_same_bytes(
    photos: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    """Before the switch and after it; the network of the switch is the same as well."""
    params = zero_shot(photos, encoder, unseen=CATEGORIES, iterations=24, guided_iterations=12)
    undisturbed = outputs(run(photos, tmp_path / "undisturbed", params))
    assert "zutis/guided/model.safetensors" in undisturbed
    root = tmp_path / "killed"
    for reached in (2, 14):
        process = start_training(photos, root, params)
        process.wait_until(lambda reached=reached: step_of(root) >= reached)
        process.kill()
        assert states(root)
    process = start_training(photos, root, params)
    code, output = process.wait(), process.output()
    assert code == 0, output
    assert "train: resumed at step " in output
    finished = outputs(root)
    assert {name: finished[name] for name in undisturbed} == undisturbed


def step_of(root: Path) -> int:
    try:
        return int(config_of(root / "zutis")["step"])
    except (OSError, ValueError):
        return 0


def test_drift_ends_training_with_the_network_of_the_switch(
    photos: Path, encoder: EncoderParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = SourceParams(root=photos / "JPEGImages")
    params = plus(
        encoder,
        data=data,
        labels=photos / "JPEGImages",
        self_training="until_drift",
        drift_tolerance=0.0,
        iterations=20,
    )
    root = run(photos, tmp_path, params)
    assert config_of(root / "zutis")["step"] == 2
    weights = (root / "zutis/model.safetensors").read_bytes()
    assert weights == (root / "zutis/guided/model.safetensors").read_bytes()
    (warning,) = json.loads((root / "stats.json").read_text())["warnings"]
    assert warning.startswith("self-training has drifted: shares of categories moved by ")
    assert warning.endswith(": training ended, with the weights of step 2")
    assert warning in capsys.readouterr().out
    assert len(curve(root, "loss")) < 20


def test_a_learned_classifier_knows_its_names_alone(
    photos: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = zero_shot(
        photos,
        encoder,
        setting="supervised",
        unseen=[],
        self_training="off",
        classifier="learned",
        background="learned",
    )
    root = run(photos, tmp_path, params)
    segmenter = Segmenter.load(root / "zutis", categories=["dog"], device="cpu")
    assert set(np.unique(segmenter(noise_image(1, 20, 30)).semantic)) <= {0, 1}
    with pytest.raises(PipelineError, match=r"knows no 'horse'; it knows cat, dog"):
        Segmenter.load(root / "zutis", categories=["horse"], device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "zero_shot", "unseen": ["dog"]}, "setting zero_shot reads true masks"),
        ({"unseen": ["dog"]}, "setting annotation_free has no unseen categories"),
        ({"background": "learned"}, "background learned needs true background"),
        ({"data": {"format": "folder", "root": "a"}, "teacher": "stored"}, "set data: archives"),
        (
            {"data": {"format": "folder", "root": "a"}, "labels": "b"},
            "labels: b must be data.root: a",
        ),
        ({"unlabelled": {"format": "folder", "root": "a"}}, "unlabelled stands beside truth"),
        ({"crop_size": 7}, "crop_size: 7 is less than a cell of the last map, output_stride: 8"),
        ({"self_training": "on", "guided_iterations": 4}, "of iterations: 4"),
        ({"classifier": "learned"}, "classifier learned is for setting supervised"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    encoder: EncoderParams, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plus(encoder, **changes)
