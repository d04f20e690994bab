"""Folders of every format, made of predictions with hard masks, and read by its own reader."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from ruamel.yaml import YAML

from pipeline.benchmarks.voc import VocBenchmark
from pipeline.errors import PipelineError
from pipeline.exporters import export
from pipeline.exporters.registry import FORMATS
from pipeline.exporters.sources import PhotoPredictions
from pipeline.formats.images import load_image
from pipeline.formats.labels import IGNORE_INDEX
from tests.conftest import encoded_image, noise_image
from tests.exporters.hard_masks import hard_masks
from tests.exporters.predicted import CATEGORIES, Photo, write_predictions
from tests.locales import LOCALES, run_in_locale

OURS = ("coco", "yolo-seg", "voc", "png16")
Mask = NDArray[np.bool_]


def image_file(path: Path, seed: int = 0, size: tuple[int, int] = (16, 24), **options: Any) -> Path:
    """Write an image of (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix.lower()]
    path.write_bytes(encoded_image(noise_image(seed, size[1], size[0]), kind, **options))
    return path


def hard_photos(folder: Path) -> list[Photo]:
    """An image a hard mask, each with its label map, and one without an object."""
    photos = []
    for number, (name, mask) in enumerate(hard_masks().items()):
        label_id = 1 + number % len(CATEGORIES)
        path = image_file(folder / f"{name}.png", number, mask.shape)
        labels = np.where(mask, label_id, 0).astype(np.int16)
        score = round(0.2 + number / 40, 6)
        photos.append(Photo(path, mask.shape, [(mask, label_id, score)], labels))
    photos.append(Photo(image_file(folder / "nothing.jpg", 99), (16, 24)))
    return photos


def exported(photos: Sequence[Photo], tmp_path: Path, to: str, **options: Any) -> Path:
    """The folder of an export of some predictions."""
    folder = write_predictions(tmp_path / "predictions", photos)
    export.run(source=PhotoPredictions(folder), format_name=to, out_dir=tmp_path / "out", **options)
    return tmp_path / "out"


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def stored_images(out: Path) -> dict[str, Path]:
    """The images of an export by stem."""
    files = [path for path in out.rglob("*") if path.is_file()]
    folders = {path: path.relative_to(out).parts[0] for path in files}
    return {path.stem: path for path, name in folders.items() if name in ("images", "JPEGImages")}


@pytest.mark.parametrize("kind", ["annotations", "annotations_polygons"])
def test_coco_has_the_masks_pixel_by_pixel(tmp_path: Path, kind: str) -> None:
    photos = hard_photos(tmp_path / "photos")
    out = exported(photos, tmp_path, "coco")
    coco = COCO(out / kind / "instances_train.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == CATEGORIES
    images = {Path(image["file_name"]).stem: image for image in coco.loadImgs(coco.getImgIds())}
    assert len(images) == len(photos)
    for photo in photos:
        image = images[photo.path.stem]
        assert (image["height"], image["width"]) == photo.size
        assert (out / "images" / image["file_name"]).read_bytes() == photo.path.read_bytes()
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        assert len(annotations) == len(photo.objects)
        for annotation, (mask, label_id, score) in zip(annotations, photo.objects, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert (annotation["category_id"], annotation["score"]) == (label_id, score)
            assert (annotation["area"], annotation["iscrowd"]) == (mask.sum(), 0)
            assert isinstance(annotation["segmentation"], dict if kind == "annotations" else list)


def test_voc_is_read_by_the_benchmarks_reader(tmp_path: Path) -> None:
    photos = hard_photos(tmp_path / "photos")
    out = exported(photos, tmp_path, "voc")
    benchmark = VocBenchmark(out, split="train", categories=CATEGORIES, groups={})
    examples = {example.image_id: example for example in benchmark}
    assert len(examples) == len(photos)
    for photo in photos:
        example = examples[photo.path.stem]
        found = [(target.mask.tolist(), target.label_id) for target in example.instances()]
        assert found == [(mask.tolist(), label_id) for mask, label_id, _ in photo.objects]
        expected = np.zeros(photo.size) if photo.labels is None else photo.labels
        np.testing.assert_array_equal(example.semantic(), expected)
        with Image.open(example.image_path) as image:
            assert (image.format, image.size) == ("JPEG", photo.size[::-1])
    lines = (out / "labelmap.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ["background:0,0,0::", "bird:128,0,0::"]
    assert lines[3].count(":") == 3  # the colon of a name would be the format's own


def test_voc_gives_overlaps_to_the_best_and_says_what_is_lost(tmp_path: Path) -> None:
    whole, corner = np.ones((4, 6), bool), np.zeros((4, 6), bool)
    corner[:2, :2] = True
    labels = np.ones((4, 6), np.int16)
    labels[3] = IGNORE_INDEX
    objects = [(whole, 1, 0.5), (corner, 1, 0.9), (corner, 1, 0.4), (whole, 2, 0.8)]
    photo = Photo(image_file(tmp_path / "a.jpg", size=(4, 6)), (4, 6), objects, labels)
    out = exported([photo], tmp_path, "voc")
    (example,) = VocBenchmark(out, split="train", categories=CATEGORIES, groups={})
    np.testing.assert_array_equal(example.semantic(), labels)
    # The label map gives no pixel to the object of category 2, which hides the one below it.
    (target,) = example.instances()
    np.testing.assert_array_equal(target.mask, corner)
    assert manifest_of(out)["counts"] == {"objects": 4, "objects_without_pixels": 3}


def test_voc_has_room_for_254_categories(tmp_path: Path) -> None:
    photo = Photo(image_file(tmp_path / "a.jpg"), (16, 24))
    for count, name in ((254, "fits"), (255, "does_not")):
        listed = [f"name {number}" for number in range(count)]
        source = PhotoPredictions(write_predictions(tmp_path / name, [photo], listed))
        if count == 254:
            export.run(source=source, format_name="voc", out_dir=tmp_path / "out")
        else:
            with pytest.raises(PipelineError, match="255 categories, but its palette has room"):
                export.run(source=source, format_name="voc", out_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_png16_has_ids_of_objects_and_labels(tmp_path: Path) -> None:
    photos = hard_photos(tmp_path / "photos")
    out = exported(photos, tmp_path, "png16")
    content = json.loads((out / "instances.json").read_text(encoding="utf-8"))
    assert content["categories"][1] == {"id": 2, "name": CATEGORIES[1]}
    for photo, entry in zip(photos, content["images"], strict=True):
        with Image.open(out / entry["instances"]) as image:
            assert image.mode == "I;16"
            numbers = np.asarray(image)
        assert numbers.shape == photo.size == (entry["height"], entry["width"])
        assert len(entry["objects"]) == len(photo.objects)
        for item, (mask, label_id, score) in zip(entry["objects"], photo.objects, strict=True):
            np.testing.assert_array_equal(numbers == item["id"], mask)
            assert (item["category_id"], item["score"]) == (label_id, score)
            assert item["area"] == mask.sum()
        labels = np.asarray(Image.open(out / entry["semantic"]))
        expected = np.zeros(photo.size) if photo.labels is None else photo.labels
        np.testing.assert_array_equal(labels, expected)


def test_png16_holds_more_labels_than_a_palette(tmp_path: Path) -> None:
    labels = np.array([[0, 300, IGNORE_INDEX]], np.int16)
    photo = Photo(image_file(tmp_path / "a.png", size=(1, 3)), (1, 3), labels=labels)
    names = [f"name {number}" for number in range(300)]
    source = PhotoPredictions(write_predictions(tmp_path / "predictions", [photo], names))
    export.run(source=source, format_name="png16", out_dir=tmp_path / "out")
    stored = np.asarray(Image.open(tmp_path / "out/semantic/a.png"))
    assert stored.tolist() == [[0, 300, 65535]]
    # Where no object was found in any image, the categories of the label maps are the objects.
    assert np.asarray(Image.open(tmp_path / "out/instances/a.png")).tolist() == [[0, 1, 0]]
    assert manifest_of(tmp_path / "out")["source"]["objects"] == "categories of the label maps"


def yolo_polygons(path: Path, size: tuple[int, int]) -> list[tuple[int, NDArray[np.float64]]]:
    """Class and corners in pixels, by line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        category, *numbers = line.split()
        corners = np.array(numbers, float).reshape(-1, 2)
        assert corners.min() >= 0
        assert corners.max() <= 1
        found.append((int(category), corners * (size[1], size[0])))
    return found


def test_yolo_has_each_object_as_one_polygon(tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    photos = hard_photos(tmp_path / "photos")
    out = exported(photos, tmp_path, "yolo-seg", val_share=0.3)
    data = YAML(typ="safe", pure=True).load((out / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate(CATEGORIES))
    stems = {
        split: {path.stem: path for path in (out / data[split]).iterdir()}
        for split in ("train", "val")
    }
    assert not stems["train"].keys() & stems["val"].keys()
    assert len(stems["train"]) + len(stems["val"]) == len(photos)
    assert stems["val"]
    for photo in photos:
        split = next(split for split in stems if photo.path.stem in stems[split])
        lines = yolo_polygons(out / "labels" / split / f"{photo.path.stem}.txt", photo.size)
        assert [category for category, _ in lines] == [k - 1 for _, k, _ in photo.objects]
        for (_, corners), (mask, _, _) in zip(lines, photo.objects, strict=True):
            rles = coco_mask.frPyObjects([corners.ravel().tolist()], *photo.size)
            np.testing.assert_array_equal(coco_mask.decode(coco_mask.merge(rles)), mask)


def test_yolo_names_both_splits_where_one_has_no_image(tmp_path: Path) -> None:
    photos = [Photo(image_file(tmp_path / "a.jpg"), (16, 24))]
    for share, split in ((0.0, "train"), (1.0, "val")):
        folder = tmp_path / split
        folder.mkdir()
        out = exported(photos, folder, "yolo-seg", val_share=share)
        text = (out / "data.yaml").read_text(encoding="utf-8")
        assert text.startswith(f"train: images/{split}\nval: images/{split}\n")
        assert (out / f"labels/{split}/a.txt").read_text(encoding="utf-8") == ""


ULTRALYTICS = """
import json, sys
from ultralytics import YOLO
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset
data = check_det_dataset(sys.argv[1], autodownload=False)
found = {}
for split in ("train", "val"):
    for label in YOLODataset(img_path=data[split], data=data, task="segment", augment=False).labels:
        found[label["im_file"]] = [int(k) for k in label["cls"].ravel()], label["shape"]
        assert len(label["segments"]) == len(label["cls"])
YOLO("yolo11n-seg.yaml").train(
    data=sys.argv[1], epochs=1, imgsz=32, batch=4, device="cpu", workers=0, plots=False, amp=False,
    project="runs", val=True, verbose=False,
)
print(json.dumps(found))
"""


@pytest.mark.skipif(not find_spec("ultralytics"), reason="ultralytics is not installed")
def test_ultralytics_trains_on_it(tmp_path: Path) -> None:
    photos = hard_photos(tmp_path / "photos")
    large = [photo for photo in photos if min(photo.size) >= 10]  # it refuses smaller images
    out = exported(large, tmp_path, "yolo-seg", val_share=0.3)
    done = subprocess.run(
        [sys.executable, "-c", ULTRALYTICS, str(out / "data.yaml")],
        cwd=tmp_path,
        env={**os.environ, "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true"},
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    by_stem = {Path(name).stem: label for name, label in found.items()}
    assert by_stem == {
        photo.path.stem: [[label_id - 1 for _, label_id, _ in photo.objects], list(photo.size)]
        for photo in large
    }


def test_names_never_collide(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    names = ["a/boat.jpg", "b/boat.jpg", "A/Boat.JPG", "c/boat.png", "d/boat_2.jpg", "e/é.jpg"]
    names.append("f/e\u0301.jpg")  # the same letter, as macOS writes it
    names.append("g/bärén & <\"x\"> 'y'.jpg")
    paths = [image_file(folder / name, seed) for seed, name in enumerate(names)]
    for to in OURS:
        (tmp_path / to).mkdir()
        photos = [Photo(path, (16, 24), stem=f"s{n}") for n, path in enumerate(paths)]
        predictions = write_predictions(tmp_path / to / "predictions", photos)
        content = json.loads((predictions / "predictions.json").read_text(encoding="utf-8"))
        for image in content["images"]:
            del image["labels"]  # as an early version wrote it: file names are all there is
        (predictions / "predictions.json").write_text(json.dumps(content), encoding="utf-8")
        source = PhotoPredictions(predictions)
        export.run(source=source, format_name=to, out_dir=tmp_path / to / "out")
        files = manifest_of(tmp_path / to / "out")["files"]
        assert [file["source"] for file in files] == [path.as_posix() for path in paths]
        stems = {Path(file["name"]).stem.casefold() for file in files}
        assert len(stems) == len(names)
        assert "bärén & <\"x\"> 'y'" in stems
        images = stored_images(tmp_path / to / "out")
        assert sorted(images) == sorted(Path(file["name"]).stem for file in files)


@pytest.mark.parametrize("to", FORMATS)
def test_long_names_are_cut_between_letters_and_stay_unique(tmp_path: Path, to: str) -> None:
    stems = ["a" + "é" * 120, "a" + "é" * 120 + "bcd", "a" + "e" * 240]
    paths = [image_file(tmp_path / f"{stem}.jpg", seed) for seed, stem in enumerate(stems)]
    out = exported([Photo(path, (16, 24)) for path in paths], tmp_path, to)
    names = [file["name"] for file in manifest_of(out)["files"]]
    assert names == ["a" + "é" * 99 + ".jpg", "a" + "é" * 99 + "_2.jpg", "a" + "e" * 199 + ".jpg"]
    if to != "hf":  # which has them in its tables
        assert {Path(name).stem for name in names} == set(stored_images(out))


IN_C = """
import os, sys
from pathlib import Path
from pipeline.exporters.export import run
from pipeline.exporters.registry import FORMATS
from pipeline.exporters.sources import PhotoPredictions
root = Path(os.fsdecode(chr(0x72AC).encode()))
source = PhotoPredictions(root / "predictions")
for to in FORMATS:
    run(source=source, format_name=to, out_dir=root / sys.argv[1] / to)
"""


def test_names_are_the_same_under_a_locale_without_their_letters(tmp_path: Path) -> None:
    mask = np.ones((16, 24), bool)
    path = image_file(tmp_path / "犬/é.jpg")
    write_predictions(tmp_path / "犬/predictions", [Photo(path, (16, 24), [(mask, 1, 0.5)])])
    for name in LOCALES:
        run_in_locale(name, IN_C, name, cwd=tmp_path)
    made = [
        {
            found.relative_to(tmp_path / "犬" / name): found.read_bytes()
            for found in (tmp_path / "犬" / name).rglob("*")
            if found.is_file() and found.name != "manifest.json"
        }
        for name in LOCALES
    ]
    assert made[0] == made[1]
    assert Path("labelme/images/é.json") in made[1]


@pytest.mark.parametrize("to", OURS)
def test_images_are_stored_upright_and_plain(tmp_path: Path, to: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image_file(tmp_path / "turned.jpg", 1, (16, 24), exif=exif)
    alpha = tmp_path / "alpha.png"
    noise_image(2, 24, 16).convert("RGBA").save(alpha)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 100).save(deep)
    web = image_file(tmp_path / "web.webp", 3)
    sizes = {turned: (24, 16), alpha: (16, 24), deep: (16, 24), web: (16, 24)}
    photos = [Photo(path, size) for path, size in sizes.items()]
    out = exported(photos, tmp_path, to, val_share=0.0)
    for path in sizes:
        with Image.open(stored_images(out)[path.stem]) as image:
            assert image.format in ("JPEG", "PNG")
            assert image.mode == "RGB"
            assert image.getexif().get(0x0112) is None
            assert image.size == sizes[path][::-1]
            difference = np.asarray(image).astype(int) - np.asarray(load_image(path))
            assert np.abs(difference).mean() < 25  # what JPEG loses of coloured blocks


def test_what_is_gone_or_changed_is_skipped_and_listed(tmp_path: Path) -> None:
    good = image_file(tmp_path / "good.jpg")
    paths = [tmp_path / "gone.jpg", tmp_path / "broken.jpg", image_file(tmp_path / "grown.jpg")]
    paths[1].write_bytes(b"no image")
    photos = [Photo(path, (16, 24)) for path in [*paths[:2], good]]
    photos.append(Photo(paths[2], (10, 10)))
    beyond = np.full((16, 24), len(CATEGORIES) + 1, np.int16)
    photos.append(Photo(image_file(tmp_path / "beyond.jpg"), (16, 24), labels=beyond))
    out = exported(photos, tmp_path, "coco")
    manifest = manifest_of(out)
    assert manifest["images"] == 1
    assert [(Path(entry["item"]).name, entry["reason"]) for entry in manifest["skipped"]] == [
        ("gone.jpg", "file is missing"),
        ("broken.jpg", "not an image"),
        ("grown.jpg", "is 24x16, but its masks 10x10: it has changed since"),
        ("beyond.jpg", "its label map labels/beyond.png: label id 4: expected 0 to 3"),
    ]


def test_nothing_is_written_where_no_image_is_left(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none of 1 images .* file is missing"):
        exported([Photo(tmp_path / "gone.jpg", (4, 4))], tmp_path, "coco")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_manifest_says_what_was_exported_from_what(tmp_path: Path) -> None:
    photos = hard_photos(tmp_path / "photos")
    out = exported(photos, tmp_path, "coco", min_score=0.5, val_share=0.5)
    manifest = manifest_of(out)
    kept = [photo for photo in photos for _, _, score in photo.objects if score >= 0.5]
    below = sum(len(photo.objects) for photo in photos) - len(kept)
    assert kept
    assert manifest["counts"] == {"objects": len(kept), "below_min_score": below}
    assert manifest["source"]["weights"] == "ab12"
    assert manifest["categories"] == CATEGORIES
    assert manifest["splits"].keys() == {"train", "val"}
    assert sum(manifest["splits"].values()) == manifest["images"] == len(photos)
    assert str(out) in manifest["opened_by"]
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_a_split_depends_on_content_alone(tmp_path: Path) -> None:
    splits = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        paths = [image_file(folder / f"{name}_{seed}.jpg", seed) for seed in range(12)]
        chosen = paths if name == "one" else paths[::-1][:9]
        copy = image_file(folder / "copy.jpg", 11)
        photos = [Photo(path, (16, 24)) for path in [*chosen, copy]]
        files = manifest_of(exported(photos, folder, "coco", val_share=0.4))["files"]
        splits.append({file["source"].rpartition("_")[2]: file["split"] for file in files})
    common = splits[0].keys() & splits[1].keys() - {"copy.jpg"}
    assert len(common) == 9
    assert {name: splits[0][name] for name in common} == {name: splits[1][name] for name in common}
    copies = [split for name, split in splits[0].items() if name.endswith(("11.jpg", "copy.jpg"))]
    assert len(set(copies)) == 1


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_export_has_the_same_bytes(tmp_path: Path, to: str) -> None:
    photos = hard_photos(tmp_path / "photos")
    folder = write_predictions(tmp_path / "predictions", photos)
    contents = []
    for _ in range(2):
        export.run(source=PhotoPredictions(folder), format_name=to, out_dir=tmp_path / "out")
        files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        contents.append([(path, path.read_bytes()) for path in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not what `pipeline predict` writes"),
        ('{"images": [], "annotations": []}', "KeyError: 'categories'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 2, "name": "x"}]}', "ids of the"),
        (
            '{"images": [{"id": 1, "file_name": "a", "labels": "../b.png"}], "annotations": [], '
            '"categories": []}',
            "not below the folder",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": "x"}], '
            '"annotations": [{"image_id": 1, "category_id": 2, "segmentation": {}, "score": 1}]}',
            "category_id 2: expected 1 to 1",
        ),
        ("{", "not valid JSON"),
    ],
)
def test_another_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "predictions.json").write_text(content, encoding="utf-8")
    with pytest.raises(PipelineError, match=message):
        PhotoPredictions(tmp_path)


RUNS = [0, 64, 320]  # four columns of 16 of 16x24 pixels
SIZE = {"size": [16, 24]}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_id", 7, "image_id 7 is not among the images"),
        ("score", "0.5", "score is '0.5', not of type int or float"),
        ("score", True, "score is True"),
        ("score", float("nan"), "score nan: expected a number from 0 to 1"),
        ("score", float("inf"), "score inf: expected"),
        ("score", 1.5, "score 1.5: expected"),
        ("segmentation", None, "its segmentation is None"),
        ("segmentation", SIZE, "no 'counts'"),
        ("segmentation", {**SIZE, "counts": "zzzz"}, "its run-length code has the character 'z'"),
        ("segmentation", {**SIZE, "counts": [0, 64]}, "the counts of its run-length code add up"),
        ("segmentation", {"size": [24, 16], "counts": RUNS}, "its run-length code has size [24"),
        ("segmentation", [[0, 0, 4, 0, 400, 4]], "a polygon lies outside its image"),
    ],
)
def test_an_annotation_that_cannot_be_read_is_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    whole = np.ones((16, 24), bool)
    photo = Photo(image_file(tmp_path / "a.jpg"), (16, 24), [(whole, 1, 0.5), (whole, 2, 0.4)])
    path = write_predictions(tmp_path / "predictions", [photo]) / "predictions.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"][1][field] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PipelineError) as error:
        PhotoPredictions(path.parent)
    assert str(error.value).startswith(f"{path}: not what `pipeline predict` writes")
    assert f"annotations[1]: {message}" in str(error.value)


def test_masks_that_were_edited_are_exported(tmp_path: Path) -> None:
    """As polygons, as plain runs and without a pixel."""
    whole, columns = np.ones((16, 24), bool), np.zeros((16, 24), bool)
    columns[:, :4] = True
    objects = [(whole, 1, 0.9), (whole, 1, 0.8), (whole, 1, 0.7)]
    photo = Photo(image_file(tmp_path / "a.jpg"), (16, 24), objects)
    path = write_predictions(tmp_path / "predictions", [photo]) / "predictions.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for place, segmentation in enumerate(
        ([[0, 0, 4, 0, 4, 16, 0, 16]], {**SIZE, "counts": RUNS}, [])
    ):
        content["annotations"][place]["segmentation"] = segmentation
    path.write_text(json.dumps(content), encoding="utf-8")
    source = PhotoPredictions(path.parent)
    (entry,) = source
    for item in entry.read().objects[:2]:
        np.testing.assert_array_equal(item.mask, columns)
    export.run(source=source, format_name="coco", out_dir=tmp_path / "out")
    assert manifest_of(tmp_path / "out")["counts"] == {"objects": 2, "empty_masks": 1}


def test_images_that_are_plain_keep_their_bytes() -> None:
    from pipeline.exporters.images import portable

    for kind, suffix in (("JPEG", ".jpg"), ("PNG", ".png")):
        data = encoded_image(noise_image(0), kind)
        assert portable(data) == (suffix, data, 24, 16)
    grey = encoded_image(noise_image(0).convert("L"), "PNG")
    assert portable(grey).data == grey
    gif = portable(encoded_image(noise_image(0), "GIF"))
    assert gif.suffix == ".png"
    expected = np.asarray(load_image(encoded_image(noise_image(0), "GIF")))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(gif.data))), expected)
