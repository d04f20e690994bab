"""Prediction: the Python API, and the stage that writes overlays and one COCO JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from scipy import ndimage

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, decode_label, load_image
from pipeline.formats.sources import list_images
from pipeline.inference.inputs import input_size, to_tensor
from pipeline.inference.labeller import Labeller
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import DenseClipParams
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.models.clip.crop_names import crop
from pipeline.models.layers.interpolate import upsample
from pipeline.models.layers.pamr import refine
from pipeline.params.base import CropNamesParams, EncoderParams, PamrParams, PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.params.sources import SourceParams
from pipeline.stages import predict
from tests.conftest import encoded_image, noise_image
from tests.processes import killed_after_moves
from tests.stages.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "zutis", tiny_clip)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Readable images of several sizes, with stems that collide, beside what is no image."""
    folder = tmp_path / "photos"
    for name, width, height in (
        ("a.jpg", 40, 56),
        ("deep/A.png", 64, 32),
        ("deep/b.jpg", 33, 17),
        ("dot.jpg", 1, 1),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        path.write_bytes(encoded_image(noise_image(width, width, height), kind))
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes((folder / "a.jpg").read_bytes())
    return folder


def predict_into(
    out_dir: Path,
    inputs: list[Path],
    checkpoint_dir: Path | None,
    runtime: Runtime,
    **changes: object,
) -> dict:
    arguments = {"categories": None, "params": EvaluateParams(batch_size=2)} | changes
    predict.run(
        inputs=inputs,
        checkpoint_dir=checkpoint_dir,
        out_dir=out_dir,
        runtime=runtime,
        **arguments,
    )
    return json.loads((out_dir / "predictions.json").read_text())


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def test_writes_a_coco_file_that_pycocotools_reads(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = tmp_path / "out"
    content = predict_into(out_dir, [photos], checkpoint_dir, runtime)
    coco = load_coco(out_dir / "predictions.json")
    settings = PredictionSettings(temperature=EvaluateParams().temperature)
    segmenter = Segmenter.load(checkpoint_dir, runtime=runtime, settings=settings)

    assert coco.getCatIds() == [1, 2, 3]
    assert [item["name"] for item in content["categories"]] == ["cat", "dog", "bird"]
    assert [Path(item["file_name"]).name for item in content["images"]] == [
        "a.jpg",
        "A.png",
        "b.jpg",
        "dot.jpg",
    ]
    assert [item["id"] for item in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    assert content["annotations"]
    for image_id, image in coco.imgs.items():
        with Image.open(image["file_name"]) as photo:
            assert photo.size == (image["width"], image["height"])
        expected = segmenter(image["file_name"]).instances
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(expected)
        for annotation, instance in zip(annotations, expected, strict=True):
            assert isinstance(annotation["segmentation"]["counts"], str)
            assert annotation["category_id"] == instance.label_id
            assert annotation["score"] == pytest.approx(instance.score, abs=1e-4)
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.shape == (image["height"], image["width"])
            assert (mask != instance.mask).mean() < 0.01
            assert annotation["area"] == mask.sum()
            x, y, width, height = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())


def test_writes_an_overlay_for_each_image_and_lists_the_rest(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    content = predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime)
    names = sorted(path.name for path in (tmp_path / "out/overlays").iterdir())
    assert names == ["A_2.png", "a.png", "b.png", "dot.png"]
    assert [item["overlay"] for item in content["images"]] == [
        "overlays/a.png",
        "overlays/A_2.png",
        "overlays/b.png",
        "overlays/dot.png",
    ]
    for name in names:
        with Image.open(tmp_path / "out/overlays" / name) as picture:
            picture.load()
            assert min(picture.size) >= 250
    assert [(Path(item["item"]).name, item["reason"]) for item in content["skipped"]] == [
        ("cut.jpg", "truncated"),
        ("empty.png", "empty file"),
    ]
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    assert (stats["items"], stats["skipped"]) == (4, 2)


def test_label_maps_are_stored_by_the_ids_of_the_categories(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    content = predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime)
    segmenter = Segmenter.load(checkpoint_dir, runtime=runtime)
    assert [item["name"] for item in content["categories"]] == segmenter.categories
    for item in content["images"]:
        labels = decode_label((tmp_path / "out" / item["labels"]).read_bytes())
        semantic = segmenter(Path(item["file_name"])).semantic
        np.testing.assert_array_equal(labels, semantic)


def test_a_second_run_gives_the_same_and_leaves_nothing_of_the_first(
    photos: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = photos / "out"
    first = predict_into(out_dir, [photos], checkpoint_dir, runtime)
    picture = (out_dir / "overlays/b.png").read_bytes()
    # Neither the pictures of the first run nor an image named twice count again.
    assert predict_into(out_dir, [photos, photos / "a.jpg"], checkpoint_dir, runtime) == first
    assert (out_dir / "overlays/b.png").read_bytes() == picture

    content = predict_into(out_dir, [photos / "a.jpg"], checkpoint_dir, runtime)
    assert len(content["images"]) == 1
    assert [path.name for path in (out_dir / "overlays").iterdir()] == ["a.png"]
    assert [path.name for path in (out_dir / "labels").iterdir()] == ["a.png"]
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "labels",
        "overlays",
        "predictions.json",
        "stats.json",
    ]


def test_any_names_may_be_asked_for(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    names = ["zebra crossing", "cat"]
    content = predict_into(
        tmp_path / "out", [photos / "a.jpg"], checkpoint_dir, runtime, categories=names
    )
    assert [(item["id"], item["name"]) for item in content["categories"]] == [
        (1, "zebra crossing"),
        (2, "cat"),
    ]
    assert {item["category_id"] for item in content["annotations"]} <= {1, 2}


def test_bad_inputs_are_named_and_leave_no_output(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    (tmp_path / "bare").mkdir()
    out_dir = tmp_path / "out"
    for inputs, message in (
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([tmp_path / "bare"], "bare: no image"),
        ([photos / "notes.txt"], r"notes\.txt: none of 1 images can be read.*not an image"),
    ):
        with pytest.raises(PipelineError, match=message):
            predict_into(out_dir, inputs, checkpoint_dir, runtime)
    with pytest.raises(PipelineError, match="'cat' is listed twice"):
        predict_into(out_dir, [photos], checkpoint_dir, runtime, categories=["cat", "cat"])
    assert not out_dir.exists() or not list(out_dir.iterdir())


def test_a_folder_of_someone_else_is_not_replaced(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    theirs = tmp_path / "project/overlays/map.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(PipelineError, match="not written by `pipeline predict`"):
        predict_into(tmp_path / "project", [photos], checkpoint_dir, runtime)
    assert theirs.read_text() == "mine"
    with pytest.raises(PipelineError, match="is a file"):
        predict_into(theirs, [photos], checkpoint_dir, runtime)


@pytest.mark.parametrize(
    "name",
    [
        *("predictions.json", "stats.json"),
        *("overlays", "overlays/mine.png", "labels", "labels/mine.png"),
    ],
)
def test_nothing_is_replaced_that_no_earlier_run_wrote(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime, name: str
) -> None:
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(PipelineError, match=rf"out: {name} was not written by"):
        predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime)
    assert theirs.read_text() == '{"images": [{"file_name": "a.jpg"}]}'
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [theirs]


def test_what_was_added_to_the_pictures_of_an_earlier_run_is_not_replaced(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = tmp_path / "out"
    first = predict_into(out_dir, [photos], checkpoint_dir, runtime)
    (out_dir / "overlays/.DS_Store").write_bytes(b"of a file browser")
    assert predict_into(out_dir, [photos], checkpoint_dir, runtime) == first
    (out_dir / "overlays/best.png").write_bytes((out_dir / "overlays/b.png").read_bytes())
    with pytest.raises(PipelineError, match=r"overlays/best\.png was not written by"):
        predict_into(out_dir, [photos], checkpoint_dir, runtime)
    assert (out_dir / "overlays/best.png").is_file()


def test_pictures_of_another_prediction_are_no_photos(
    photos: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    first = predict_into(photos / "first", [photos], checkpoint_dir, runtime)
    theirs = photos / "overlays/map.png"  # a folder that only bears the name
    theirs.parent.mkdir()
    theirs.write_bytes((photos / "deep/A.png").read_bytes())
    second = predict_into(photos / "second", [photos], checkpoint_dir, runtime)
    listed = {image["file_name"] for image in second["images"]}
    assert listed == {*(image["file_name"] for image in first["images"]), theirs.as_posix()}


def test_a_failed_run_keeps_the_earlier_one(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = tmp_path / "out"
    first = predict_into(out_dir, [photos], checkpoint_dir, runtime)
    with pytest.raises(PipelineError, match="can be read"):
        predict_into(out_dir, [photos / "cut.jpg"], checkpoint_dir, runtime)
    assert json.loads((out_dir / "predictions.json").read_text()) == first
    assert len(list((out_dir / "overlays").iterdir())) == 4


def test_a_run_killed_anywhere_can_be_run_again(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    """Whatever is put in place last before the kill, and whatever killed runs have left."""
    out_dir, calm = tmp_path / "out", tmp_path / "calm"

    def call(name: str, folder: Path, confidence: list[str]) -> dict:
        inputs = [photos / name]
        return predict_into(folder, inputs, checkpoint_dir, runtime, confidence=confidence)

    moves = 1
    while killed_after_moves(lambda: call("a.jpg", out_dir, ["cat"]), moves):
        killed_after_moves(lambda: call("deep/b.jpg", out_dir, []), moves)
        moves += 1
    assert moves > 6  # the list, folders of three kinds, predictions.json and the stats
    assert call("a.jpg", out_dir, []) == call("a.jpg", calm, [])
    left = [path for path in out_dir.iterdir() if path.suffix not in (".tmp", ".old")]
    assert sorted(path.name for path in left) == sorted(path.name for path in calm.iterdir())
    for name in ("labels", "overlays"):
        assert [path.name for path in (out_dir / name).iterdir()] == ["a.png"]


def test_pictures_of_a_killed_run_are_told_from_what_lies_beside_them(
    photos: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = photos / "out"

    def call() -> dict:
        return predict_into(out_dir, [photos], checkpoint_dir, runtime)

    assert killed_after_moves(call, 3)  # the list and two folders
    assert not (out_dir / "predictions.json").exists()
    assert len(list(out_dir.glob("*/*.png"))) == 8
    (out_dir / "overlays/mine.png").write_bytes((photos / "deep/A.png").read_bytes())
    with pytest.raises(PipelineError, match=r"overlays/mine\.png was not written by"):
        call()
    (out_dir / "overlays/mine.png").rename(photos / "mine.png")
    names = [Path(image["file_name"]).name for image in call()["images"]]
    assert sorted(names) == ["A.png", "a.jpg", "b.jpg", "dot.jpg", "mine.png"]


def test_image_path_array_and_picture_are_the_same(photos: Path, checkpoint_dir: Path) -> None:
    segmenter = Segmenter.load(str(checkpoint_dir), device="cpu")
    path = photos / "deep/A.png"
    with Image.open(path) as picture:
        inputs = [path, str(path), picture.convert("RGBA"), np.array(picture)]
    predictions = [segmenter(image) for image in inputs]
    assert predictions[0].semantic.shape == (32, 64)
    assert predictions[0].semantic.dtype == np.int16
    assert predictions[0].categories == ["cat", "dog", "bird"]
    assert len(np.unique(predictions[0].semantic)) > 1
    for prediction in predictions[1:]:
        np.testing.assert_array_equal(prediction.semantic, predictions[0].semantic)
        assert len(prediction.instances) == len(predictions[0].instances)
    with pytest.raises(ImageError, match=r"cut\.jpg: truncated"):
        segmenter(photos / "cut.jpg")
    with pytest.raises(ImageError, match=r"^missing\.jpg: cannot be read: No such file"):
        segmenter("missing.jpg")
    with pytest.raises(ValueError, match="expected uint8"):
        segmenter(np.zeros((4, 4)))


def test_a_batch_of_mixed_sizes_keeps_its_order(checkpoint_dir: Path, runtime: Runtime) -> None:
    segmenter = Segmenter.load(checkpoint_dir, runtime=runtime)
    images = [noise_image(1, 40, 24), noise_image(2, 24, 40), noise_image(3, 40, 24)]
    for image, prediction in zip(images, segmenter.predict(images), strict=True):
        assert prediction.semantic.shape == (image.height, image.width)
        alone = segmenter(image)
        assert (prediction.semantic != alone.semantic).mean() < 0.01
        assert [i.label_id for i in prediction.instances] == [i.label_id for i in alone.instances]
    assert segmenter.predict([]) == []


def test_predictions_of_resized_inputs_have_the_images_size(
    checkpoint_dir: Path, runtime: Runtime
) -> None:
    for settings in (
        PredictionSettings(resize_to=32),
        PredictionSettings(max_side=16),
        PredictionSettings(suppression="none", threshold=0.2),
    ):
        prediction = Segmenter.load(checkpoint_dir, runtime=runtime, settings=settings)(
            noise_image(5, 50, 31)
        )
        assert prediction.semantic.shape == (31, 50)
        assert all(instance.mask.shape == (31, 50) for instance in prediction.instances)


@pytest.mark.parametrize(
    ("size", "resize_to", "max_side", "expected"),
    [
        ((500, 375), None, None, (500, 375)),
        ((500, 375), None, 1000, (500, 375)),
        ((500, 375), 336, None, (448, 336)),
        ((500, 375), 336, 320, (320, 240)),
        ((5, 375), None, None, (16, 375)),
        ((1500, 1000), None, 1024, (1024, 682)),
        ((1031, 1031), None, 1024, (1024, 1024)),
        ((1, 1), None, 100, (16, 16)),
        ((4000, 20), 336, 640, (640, 16)),
    ],
)
def test_input_sizes(
    size: tuple[int, int],
    resize_to: int | None,
    max_side: int | None,
    expected: tuple[int, int],
) -> None:
    settings = PredictionSettings(resize_to=resize_to, max_side=max_side)
    assert input_size(*size, settings, patch_size=16) == expected


@pytest.mark.parametrize(
    ("size", "resize_to", "max_side", "expected"),
    [
        ((500, 333), 520, 520, (520, 346)),  # 346.32
        ((500, 334), 520, 520, (520, 347)),  # 347.36
        ((500, 331), 520, 520, (520, 344)),  # 344.24
        ((332, 500), 520, 520, (345, 520)),  # 345.28
        ((500, 375), 512, 2048, (683, 512)),  # 682.67
        ((281, 500), 512, 2048, (512, 911)),  # 911.03
        ((128, 125), 64, None, (66, 64)),  # 65.54
        ((5, 4), 50, None, (63, 50)),  # 62.5
        ((500, 375), None, None, (500, 375)),
        ((4, 500), None, 250, (16, 250)),
    ],
)
def test_sizes_rounded_half_up_are_those_of_mmcv(
    size: tuple[int, int],
    resize_to: int | None,
    max_side: int | None,
    expected: tuple[int, int],
) -> None:
    settings = PredictionSettings(resize_to=resize_to, max_side=max_side, rounding="half_up")
    assert input_size(*size, settings, patch_size=16) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_cpu_predicts_in_every_precision(checkpoint_dir: Path, precision: str) -> None:
    segmenter = Segmenter.load(checkpoint_dir, device="cpu", precision=precision)
    plain = Segmenter.load(checkpoint_dir, device="cpu")
    image = noise_image(3, 64, 48)
    found, expected = segmenter(image).semantic, plain(image).semantic
    assert found.shape == expected.shape
    assert (found == expected).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "not the settings of a checkpoint"),
        ({"templates": "sonnets"}, "templates 'sonnets': expected one of"),
        ({"architecture": {"num_heads": 2, "wings": 3}}, "architecture: .*wings"),
        ({"architecture": {"num_heads": 2, "decoder_layers": 1}}, "not the weights"),
        ({"architecture": {"num_heads": 0}}, "architecture: num_heads: 0"),
        ({"architecture": {"num_heads": 2, "num_queries": "7"}}, "architecture: "),
        ({"categories": "cat"}, "expected a list of names, found 'cat'"),
        ({"encoder": {"model": "m", "pretrained": None}}, "encoder: .*None.*expected [^\n]*$"),
        ({"encoder": {"model": 1, "pretrained": "p"}}, "encoder: .*1.*expected [^\n]*$"),
        ({"encoder": {"model": "m", "pretrained": {"tag": "t"}}}, "encoder: .*{tag: TAG, file"),
        ({"encoder": {"model": "m"}}, "entry 'pretrained' is missing"),
    ],
)
def test_a_bad_checkpoint_is_named(
    checkpoint_dir: Path, tmp_path: Path, change: dict, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_dir, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PipelineError, match=message):
        Segmenter.load(broken, device="cpu")


def test_a_missing_checkpoint_is_named(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"zutis/config\.json: no such file.*pipeline train"):
        Segmenter.load(tmp_path / "zutis")
    (tmp_path / "zutis").mkdir()
    config = json.loads((checkpoint_dir / "config.json").read_text())
    (tmp_path / "zutis/config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match=r"model\.safetensors: no such"):
        Segmenter.load(tmp_path / "zutis")
    del config["background"]
    (tmp_path / "zutis/config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="entry 'background' is missing"):
        Segmenter.load(tmp_path / "zutis")


def test_a_file_name_that_json_cannot_hold_is_named(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    name = os.fsdecode(b"\xff.jpg")
    try:
        shutil.copy(photos / "a.jpg", photos / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(PipelineError, match="not UTF-8; rename the file"):
        predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "resize_to", "expected"),
    [
        ((500, 375), None, (496, 368)),
        ((512, 384), None, (512, 384)),
        ((505, 5), None, (512, 16)),
        ((500, 375), 336, (448, 336)),
    ],
)
def test_whole_patches_leave_no_remainder(
    size: tuple[int, int], resize_to: int | None, expected: tuple[int, int]
) -> None:
    settings = PredictionSettings(resize_to=resize_to, whole_patches=True)
    assert input_size(*size, settings, patch_size=16) == expected


def test_params_become_settings_of_a_prediction() -> None:
    changed = {
        "threshold": 0.3,
        "temperature": 2.0,
        "suppression": "linear",
        "score_resolution": "pixel",
        "resize_to": 64,
        "max_side": 128,
        "whole_patches": True,
        "upsampling": "published",
        "region_majority": True,
        "flip": True,
        "joint_foreground": True,
        "pamr": PamrParams(dilations=[2], steps=3),
        "crop_names": CropNamesParams(weight=0.2, margin=0.1),
    }
    assert PredictionSettings.of(EvaluateParams(**changed)) == PredictionSettings(**changed)
    assert not changed.items() & PredictionSettings().model_dump().items()
    assert PredictionSettings.of(EvaluateParams()) == PredictionSettings()


def test_what_refines_a_prediction_is_off_and_then_no_part_of_its_settings() -> None:
    options = {"flip", "joint_foreground", "pamr", "crop_names"}
    assert not options & PredictionSettings().model_dump().keys()
    assert not options & EvaluateParams().model_dump().keys()


@pytest.mark.parametrize("size", [(48, 48), (64, 32), (8, 8)])
def test_with_flip_a_mirrored_image_has_the_mirrored_prediction(
    checkpoint_dir: Path, runtime: Runtime, size: tuple[int, int]
) -> None:
    image = noise_image(3, *size)
    mirrored = ImageOps.mirror(image)
    differs = []
    for is_on in (False, True):
        segmenter = Segmenter.load(
            checkpoint_dir, runtime=runtime, settings=PredictionSettings(flip=is_on)
        )
        found, other = (segmenter(each).semantic for each in (image, mirrored))
        differs.append((found != other[:, ::-1]).mean())
    assert differs[1] <= 0.001  # where two names are as likely, rounding decides
    assert size == (8, 8) or differs[0] > 0.01


@pytest.mark.parametrize("pamr", [None, PamrParams(dilations=[1, 3], steps=4)])
@pytest.mark.parametrize("size", [(48, 40), (9, 50), (1, 1)])
def test_a_joint_foreground_is_where_all_categories_together_outweigh_the_background(
    tiny_clip: tuple[Path, Path],
    tmp_path: Path,
    runtime: Runtime,
    size: tuple[int, int],
    pamr: PamrParams | None,
) -> None:
    checkpoint_dir = write_checkpoint(tmp_path / "zutis", tiny_clip, logit_scale=5.0)
    image = noise_image(4, *size)
    apart, jointly, everywhere = (
        Segmenter.load(
            checkpoint_dir,
            runtime=runtime,
            settings=PredictionSettings(pamr=pamr, joint_foreground=joint, background=background),
        )
        for joint, background in ((False, True), (True, True), (True, False))
    )
    pixels = to_tensor(image, apart.settings, patch_size=apart.student.patch_size)[None]
    scores = apart.student.scores(pixels)
    if pamr is None:
        scores = upsample(scores, (size[1], size[0]))
        probabilities = (apart.student.logit_scale * scores).softmax(dim=1)
    else:
        scores = upsample(scores, pixels.shape[-2:])
        softmax = (apart.student.logit_scale * scores).softmax(dim=1)
        refined = refine(softmax, pixels, dilations=pamr.dilations, steps=pamr.steps)
        probabilities = upsample(refined, (size[1], size[0]))
    is_object = probabilities[0, 1:].sum(dim=0) > probabilities[0, 0]
    best = 1 + probabilities[0, 1:].argmax(dim=0)
    found = jointly(image).semantic
    # Where rounding decides, either is right.
    assert (found != np.where(is_object, best, 0)).mean() <= 0.001
    before = apart(image).semantic
    assert not (found == 0)[before > 0].any()
    assert size != (48, 40) or (found > 0).sum() > (before > 0).sum()
    plain = PredictionSettings(pamr=pamr, background=False)
    assert np.array_equal(
        everywhere(image).semantic,
        Segmenter.load(checkpoint_dir, runtime=runtime, settings=plain)(image).semantic,
    )


@pytest.mark.parametrize("size", [(48, 40), (9, 50), (1, 1)])
def test_pamr_refines_labels_and_proposals_by_colour(
    checkpoint_dir: Path, runtime: Runtime, size: tuple[int, int]
) -> None:
    image, pamr = noise_image(4, *size), PamrParams(dilations=[1, 3], steps=4)
    plain, refining = (
        Segmenter.load(
            checkpoint_dir,
            runtime=runtime,
            settings=PredictionSettings(threshold=0.4, suppression="none", pamr=each),
        )
        for each in (None, pamr)
    )
    before, after = plain(image), refining(image)
    pixels = to_tensor(image, plain.settings, patch_size=plain.student.patch_size)[None]
    scores = upsample(plain.student.scores(pixels), pixels.shape[-2:])
    probabilities = (plain.student.logit_scale * scores).softmax(dim=1)
    expected = upsample(refine(probabilities, pixels, dilations=[1, 3], steps=4), size[::-1])
    np.testing.assert_array_equal(after.semantic, expected.argmax(dim=1)[0])
    assert after.semantic.shape == size[::-1]
    # What an object is called, and how sure that is, was decided before.
    of_labels = [{(i.label_id, i.score) for i in found.instances} for found in (before, after)]
    assert of_labels[1] <= of_labels[0]
    if size == (48, 40):
        assert (before.semantic != after.semantic).any()
        assert any(
            (a.mask != b.mask).any()
            for a, b in zip(before.instances, after.instances, strict=False)
        )


@pytest.mark.parametrize("size", [(48, 40), (9, 50), (1, 1)])
def test_crops_name_regions_and_objects(
    checkpoint_dir: Path, runtime: Runtime, encoder: EncoderParams, size: tuple[int, int]
) -> None:
    """With all of the weight, a name is what CLIP says of the crop of the region's box."""
    image = noise_image(4, *size)
    plain, naming = (
        Segmenter.load(
            checkpoint_dir,
            runtime=runtime,
            settings=PredictionSettings(threshold=0.4, suppression="none", crop_names=each),
        )
        for each in (None, CropNamesParams(weight=1.0))
    )
    clip = load_clip(encoder, runtime.device)
    text = text_embeddings(clip, plain.categories, ["{}"])
    pixels = to_tensor(image, plain.settings, patch_size=plain.student.patch_size)
    before, after = plain(image), naming(image)
    assert ((before.semantic > 0) == (after.semantic > 0)).all()
    assert len(before.instances) == len(after.instances)
    for label_id in np.unique(before.semantic[before.semantic > 0]):
        regions, count = ndimage.label(before.semantic == label_id)
        for number in range(1, 1 + count):
            rows, columns = np.nonzero(regions == number)
            if len(rows) < 64:  # less than a patch
                continue
            ends = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            box = [end / side for end, side in zip(ends, size[::-1] * 2, strict=True)]
            seen = clip.encode_images(crop(pixels, box, 0.0, clip.image_size)[None]) @ text.T
            assert set(after.semantic[rows, columns]) == {1 + int(seen.argmax())}
    if size == (48, 40):
        assert (before.semantic != after.semantic).any()
    unchanged = naming.select(plain.categories)(image)
    np.testing.assert_array_equal(unchanged.semantic, after.semantic)


def test_scores_and_remainders_are_settings_of_the_segmenter(
    checkpoint_dir: Path, runtime: Runtime
) -> None:
    image = noise_image(5, 45, 37)
    plain = PredictionSettings(suppression="none", threshold=0.4)
    results = [
        Segmenter.load(checkpoint_dir, runtime=runtime, settings=settings)(image)
        for settings in (
            plain,
            plain.model_copy(update={"score_resolution": "pixel"}),
            plain.model_copy(update={"whole_patches": True}),
        )
    ]
    scores = [[instance.score for instance in result.instances] for result in results]
    assert scores[0]
    assert scores[0] != pytest.approx(scores[1], rel=1e-4)
    assert (results[0].semantic == results[1].semantic).all()
    assert (results[0].semantic != results[2].semantic).any()


def test_a_folder_is_listed_as_by_embed(
    photos: Path,
    tmp_path: Path,
    checkpoint_dir: Path,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(photos / "a.jpg", elsewhere / "far.jpg")
    shutil.copy(photos / "a.jpg", elsewhere / "plain")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "again").symlink_to(elsewhere)
    (photos / "deep/up").symlink_to(photos)
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "x.heic").write_bytes(b"heic")
    content = predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime)
    seen = [Path(item["file_name"]).name for item in content["images"]]
    assert seen == ["a.jpg", "far.jpg", "plain", "A.png", "b.jpg", "dot.jpg"]
    reasons = {Path(item["item"]).name: item["reason"] for item in content["skipped"]}
    assert list(reasons) == ["cut.jpg", "empty.png", "gone.jpg", "pipe.jpg"]
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    left_out = {".heic": 1, "hidden": 1, "link to a folder above": 1, "seen twice": 2}
    assert stats["left_out"] == left_out
    assert "left out: 2 seen twice, 1 .heic, 1 hidden" in capsys.readouterr().out
    listed = {os.path.realpath(ref.path) for ref in list_images("s", SourceParams(root=photos))}
    assert listed == {os.path.realpath(path) for path in predict.list_inputs([photos])}


def test_paths_that_no_shell_has_expanded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    listed = predict.list_inputs([Path("~/photos")])
    assert listed == predict.list_inputs([photos])
    with pytest.raises(PipelineError, match="must be a path; a URL cannot"):
        predict.list_inputs([Path("s3://bucket/photos")])


@pytest.fixture
def labeller(encoder: EncoderParams) -> DenseClipParams:
    return DenseClipParams(encoder=encoder, templates="name", logit_scale=7.0)


def grey_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        return np.asarray(picture) / 255


@pytest.mark.parametrize("alone", [True, False])
def test_confidence_is_drawn_at_each_pixel_of_a_photo(
    photos: Path,
    tmp_path: Path,
    checkpoint_dir: Path,
    labeller: DenseClipParams,
    runtime: Runtime,
    alone: bool,
) -> None:
    names = ["cat", "tv/monitor", "TV monitor"]
    asked = {"categories": names, "labeller": labeller, "confidence": names}
    model = None if alone else checkpoint_dir
    out_dir = tmp_path / "out"
    content = predict_into(out_dir, [photos], model, runtime, **asked)
    assert [list(image["confidence"]) for image in content["images"]] == [names] * 4
    folders = sorted(path.name for path in (out_dir / "confidence").iterdir())
    assert folders == ["TV_monitor_2", "cat", "tv_monitor"]
    for image in content["images"]:
        assert Path(image["confidence"]["cat"]).name == Path(image["overlay"]).name
        maps = np.stack([grey_of(out_dir / image["confidence"][name]) for name in names])
        assert maps.shape == (3, image["height"], image["width"])
        assert (maps.sum(axis=0) < 1.01).all()  # the rest is background
    if alone:
        loaded = Labeller.load(
            labeller,
            categories=names,
            background=["background"],
            settings=PredictionSettings(),
            runtime=runtime,
        )
        assert content["images"][0]["file_name"].endswith("a.jpg")
        labels = loaded.predict(load_image(photos / "a.jpg")).semantic
        first = content["images"][0]["confidence"]
        best = np.stack([grey_of(out_dir / first[name]) for name in names])
        for label_id in (1, 2, 3):
            members = labels == label_id
            assert (best.max(axis=0)[members] - best[label_id - 1][members] < 0.01).all()
    else:
        assert content["annotations"]

    # Pictures of confidence are no photos, and go when none are asked for.
    again = predict_into(photos / "out", [photos], model, runtime, **asked)
    assert predict_into(photos / "out", [photos], model, runtime, **asked) == again
    (photos / "out/confidence/cat/mine.png").write_bytes(b"mine")
    with pytest.raises(PipelineError, match=r"confidence/cat/mine\.png was not written by"):
        predict_into(photos / "out", [photos], model, runtime, **(asked | {"confidence": []}))
    (photos / "out/confidence/cat/mine.png").unlink()
    bare = predict_into(photos / "out", [photos], model, runtime, **(asked | {"confidence": []}))
    assert "confidence" not in bare["images"][0]
    assert not (photos / "out/confidence").exists()


def test_a_name_that_is_not_asked_for_has_no_confidence(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, labeller: DenseClipParams, runtime: Runtime
) -> None:
    message = r"--confidence: 'zebra' is not among the names asked for: cat, dog, bird"
    with pytest.raises(PipelineError, match=message):
        predict_into(tmp_path / "out", [photos], checkpoint_dir, runtime, confidence=["zebra"])
    asked = {"categories": ["cat", "dog", "bird"], "labeller": labeller, "confidence": ["zebra"]}
    with pytest.raises(PipelineError, match=message):
        predict_into(tmp_path / "out", [photos], None, runtime, **asked)
    assert not (tmp_path / "out").exists()
    segmenter = Segmenter.load(checkpoint_dir, runtime=runtime)
    with pytest.raises(PipelineError, match=r"confidence: .zebra. is not among .* cat, dog, bird"):
        segmenter.confidence(photos / "a.jpg", "zebra")


def test_the_confidence_of_a_checkpoint_is_the_softmax_of_its_training(
    checkpoint_dir: Path, tmp_path: Path, runtime: Runtime
) -> None:
    shutil.copytree(checkpoint_dir, tmp_path / "sharp")
    config = json.loads((checkpoint_dir / "config.json").read_text())
    (tmp_path / "sharp/config.json").write_text(json.dumps(config | {"logit_scale": 30.0}))
    image = noise_image(5, 50, 31)
    plain, sharp = (
        Segmenter.load(folder, runtime=runtime) for folder in (checkpoint_dir, tmp_path / "sharp")
    )
    for segmenter in (plain, sharp):
        maps = [segmenter.confidence(image, name) for name in segmenter.categories]
        assert maps[0].shape == (31, 50)
        assert maps[0].dtype == np.float32
        background = 1 - np.sum(maps, axis=0)
        best = np.argmax([background, *maps], axis=0)
        assert (best == segmenter(image).semantic).mean() > 0.99
    spread = [np.ptp(segmenter.confidence(image, "cat")) for segmenter in (plain, sharp)]
    assert spread[1] > 3 * spread[0]
    settings = PredictionSettings(upsampling="published", resize_to=20)
    resized = Segmenter.load(tmp_path / "sharp", runtime=runtime, settings=settings)
    maps = [resized.confidence(image, name) for name in resized.categories]
    best = np.argmax([1 - np.sum(maps, axis=0), *maps], axis=0)
    assert (best == resized(image).semantic).mean() > 0.995
    foreground = Segmenter.load(
        checkpoint_dir, runtime=runtime, settings=PredictionSettings(background=False)
    )
    total = np.sum([foreground.confidence(image, name) for name in plain.categories], axis=0)
    np.testing.assert_allclose(total, 1, rtol=1e-4)
    one = plain.select(["dog"])
    assert (one.confidence(image, "dog") > plain.confidence(image, "dog")).all()


def test_context_is_asked_for_and_drawn_black(
    photos: Path, tmp_path: Path, checkpoint_dir: Path, labeller: DenseClipParams, runtime: Runtime
) -> None:
    cases = (
        ("own", checkpoint_dir, None, ["dog"], ["cat", "dog", "bird"]),
        ("more", checkpoint_dir, ["cat"], ["zebra", "Cat"], ["cat", "zebra"]),
        ("alone", None, ["cat", "dog"], ["zebra", "dog"], ["cat", "dog", "zebra"]),
    )
    for name, model, categories, context, listed in cases:
        out_dir = tmp_path / name
        asked = {"categories": categories, "context": context, "labeller": labeller}
        content = predict_into(out_dir, [photos / "a.jpg"], model, runtime, **asked)
        assert [item["name"] for item in content["categories"]] == listed
        asked["context"] = []
        asked["categories"] = listed
        predict_into(tmp_path / "plain", [photos / "a.jpg"], model, runtime, **asked)
        black, coloured = (
            np.asarray(Image.open(folder / "overlays/a.png").convert("RGB")).sum(axis=2) == 0
            for folder in (out_dir, tmp_path / "plain")
        )
        assert black.sum() > coloured.sum() + 1000


def test_categories_without_a_pixel_in_any_label_map_are_listed(
    photos: Path,
    tmp_path: Path,
    checkpoint_dir: Path,
    runtime: Runtime,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out_dir, names = tmp_path / "out", ["bird", "cat", "dog", "bus", "horse"]
    predict_into(out_dir, [photos], checkpoint_dir, runtime, categories=names)
    found = {
        int(label_id)
        for path in (out_dir / "labels").iterdir()
        for label_id in np.unique(decode_label(path.read_bytes()))
    }
    never = [name for label_id, name in enumerate(names, 1) if label_id not in found]
    assert json.loads((out_dir / "stats.json").read_text()).get("never_predicted", []) == never
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("predict: never predicted: ")]
    assert said == ([f"predict: never predicted: {', '.join(never)}"] if never else [])
