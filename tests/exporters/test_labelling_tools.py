"""labelme, Label Studio, CVAT, Datumaro: what a reader written by their documentation finds again.

Their own libraries read the same folders where they are installed.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.exporters.brush import encode_brush
from pipeline.exporters.cvat import Cvat
from pipeline.exporters.datumaro import Datumaro
from pipeline.exporters.items import ExportedImage
from pipeline.exporters.label_studio import LabelStudio
from pipeline.exporters.labelme import Labelme
from pipeline.formats.images import decode_png
from pipeline.formats.rle import decode_mask
from tests.exporters.hard_images import CATEGORIES, written

Found = list[tuple[str, NDArray[np.bool_]]]


def same(found: Found, image: ExportedImage) -> bool:
    """Whether labels and masks are those of an image, pixel by pixel and in order."""
    expected = [(CATEGORIES[object_.category - 1], object_.mask) for object_ in image.objects]
    return [label for label, _ in found] == [label for label, _ in expected] and all(
        np.array_equal(mask, true) for (_, mask), (_, true) in zip(found, expected, strict=True)
    )


# labelme


def test_labelme_has_a_file_beside_each_image(tmp_path: Path) -> None:
    images, line = written(Labelme, tmp_path)
    assert line.startswith("labelme ")
    for image in images:
        path = tmp_path / "images" / image.name
        assert path.read_bytes() == image.data
        label_file = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert label_file["imagePath"] == path.name
        assert (label_file["imageWidth"], label_file["imageHeight"]) == (image.width, image.height)
        assert same([_labelme_shape(shape, image) for shape in label_file["shapes"]], image)
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8").splitlines() == list(CATEGORIES)


def test_labelme_shows_scores_as_descriptions_and_facts_of_the_image(tmp_path: Path) -> None:
    images, _ = written(Labelme, tmp_path)
    path = (tmp_path / "images" / images[0].name).with_suffix(".json")
    label_file = json.loads(path.read_text(encoding="utf-8"))
    assert [shape["description"] for shape in label_file["shapes"]][::4] == ["score 0.8750", ""]
    assert (label_file["rank"], label_file["source"]) == (3, "photos/IMG 1.jpg")


def test_labelme_itself_reads_the_masks(tmp_path: Path) -> None:
    label_files = pytest.importorskip("labelme._label_file")
    images, _ = written(Labelme, tmp_path)
    for image in images:
        path = (tmp_path / "images" / image.name).with_suffix(".json")
        shapes = label_files.LabelFile(str(path)).shapes
        assert all(shape["shape_type"] == "mask" for shape in shapes)
        found = []
        for shape in shapes:
            (left, top), (right, bottom) = np.array(shape["points"]).astype(int)
            mask = np.zeros((image.height, image.width), dtype=bool)
            mask[top : bottom + 1, left : right + 1] = shape["mask"]
            found.append((shape["label"], mask))
        assert same(found, image)


def _labelme_shape(shape: dict[str, Any], image: ExportedImage) -> tuple[str, NDArray[np.bool_]]:
    (left, top), (right, bottom) = shape["points"]
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[top : bottom + 1, left : right + 1] = decode_png(base64.b64decode(shape["mask"])) > 0
    return shape["label"], mask


# Label Studio


def test_label_studio_has_a_task_an_image_with_its_masks(tmp_path: Path) -> None:
    images, _ = written(LabelStudio, tmp_path)
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    for task, image in zip(tasks, images, strict=True):
        url = urlsplit(task["data"]["image"])
        assert url.path == "/data/local-files/"
        assert (tmp_path / parse_qs(url.query)["d"][0]).read_bytes() == image.data
        assert url.fragment == ""
        (prediction,) = task["predictions"]
        assert len({region["id"] for region in prediction["result"]}) == len(image.objects)
        assert same([_brush(region, _plain_decode) for region in prediction["result"]], image)
        assert all(
            (region["original_width"], region["original_height"]) == (image.width, image.height)
            for region in prediction["result"]
        )
    scores = [region.get("score") for region in tasks[0]["predictions"][0]["result"]]
    assert scores == [0.875, 0.5, 0.25, 0.125, None]
    assert tasks[0]["predictions"][0]["score"] == 0.4375
    assert "score" not in tasks[1]["predictions"][0]


def test_the_config_of_label_studio_names_what_results_refer_to(tmp_path: Path) -> None:
    written(LabelStudio, tmp_path)
    (task, *_) = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    config = ElementTree.parse(tmp_path / "config.xml").getroot()
    image, brush = config.find("Image"), config.find("BrushLabels")
    assert image is not None
    assert brush is not None
    assert image.get("value", "").removeprefix("$") in task["data"]
    assert [label.get("value") for label in brush] == list(CATEGORIES)
    for region in task["predictions"][0]["result"]:
        assert (region["from_name"], region["to_name"]) == (brush.get("name"), image.get("name"))
        assert region["type"] == "brushlabels"


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (300, 500), (17, 16384)])
def test_brush_runs_of_every_length_are_read_again(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.choice([1, 2, 3, 4, 5, 63, 64, 65, 16384, 16385], 200))
    mask = (np.searchsorted(ends, np.arange(shape[0] * shape[1]), side="right") % 2 == 0).reshape(
        shape
    )
    assert np.array_equal(_plain_decode(encode_brush(mask), shape), mask)


def test_label_studio_itself_decodes_the_masks(tmp_path: Path) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    images, _ = written(LabelStudio, tmp_path)
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))

    def decode(rle: list[int], shape: tuple[int, int]) -> NDArray[np.bool_]:
        return brush.decode_rle(rle).reshape(*shape, 4)[:, :, 3] > 0

    for task, image in zip(tasks, images, strict=True):
        regions = task["predictions"][0]["result"]
        assert same([_brush(region, decode) for region in regions], image)


def _brush(region: dict[str, Any], decode: Any) -> tuple[str, NDArray[np.bool_]]:
    value = region["value"]
    assert value["format"] == "rle"
    (label,) = value["brushlabels"]
    return label, decode(value["rle"], (region["original_height"], region["original_width"]))


def _plain_decode(rle: list[int], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The decoder of thi.ng's rle-pack, which Label Studio has, and the alpha channel of pixels."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    size, width = read(32), read(5) + 1
    run_bits = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < size:
        is_run = read(1)
        count = read(run_bits[read(2)]) + 1
        values += [read(width)] * count if is_run else [read(width) for _ in range(count)]
    assert len(values) == size
    assert len(bits) - place < 8
    pixels = np.array(values).reshape(*shape, 4)
    assert (pixels == pixels[:, :, :1]).all()
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels[:, :, 3] == 255


# CVAT


def test_cvat_has_masks_as_runs_of_their_boxes(tmp_path: Path) -> None:
    images, _ = written(Cvat, tmp_path)
    root = ElementTree.parse(tmp_path / "annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert [label.findtext("name") for label in root.iter("label")] == list(CATEGORIES)
    for number, (node, image) in enumerate(zip(root.findall("image"), images, strict=True)):
        assert (node.get("id"), node.get("name")) == (str(number), image.name)
        assert (node.get("width"), node.get("height")) == (str(image.width), str(image.height))
        assert (tmp_path / "images" / image.name).read_bytes() == image.data
        assert same([_cvat_mask(mask, image) for mask in node.findall("mask")], image)
    scores = [mask.findtext("attribute") for mask in root.iter("mask")]
    assert scores[:5] == ["0.8750", "0.5000", "0.2500", "0.1250", None]


def test_labels_of_cvat_are_those_of_its_file(tmp_path: Path) -> None:
    written(Cvat, tmp_path)
    labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert [label["name"] for label in labels] == list(CATEGORIES)
    assert len({label["color"] for label in labels}) == len(CATEGORIES)
    root = ElementTree.parse(tmp_path / "annotations.xml").getroot()
    declared = {attribute["name"] for label in labels for attribute in label["attributes"]}
    assert {node.get("name") for node in root.iter("attribute") if node.get("name")} == declared


def test_datumaro_reads_the_masks_of_cvat(tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro")
    images, _ = written(Cvat, tmp_path)
    _same_in_datumaro(datumaro.Dataset.import_from(str(tmp_path), "cvat"), images)


def _cvat_mask(node: ElementTree.Element, image: ExportedImage) -> tuple[str, NDArray[np.bool_]]:
    left, top, width, height = (
        int(node.get(key, "")) for key in ("left", "top", "width", "height")
    )
    runs = [int(count) for count in node.get("rle", "").split(", ")]
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[top : top + height, left : left + width] = values.reshape(height, width)
    return node.get("label", ""), mask


# Datumaro


def test_datumaro_has_a_file_a_split(tmp_path: Path) -> None:
    images, _ = written(Datumaro, tmp_path)
    for split, some in (("train", images[:2]), ("val", images[2:])):
        content = json.loads((tmp_path / f"annotations/{split}.json").read_text(encoding="utf-8"))
        labels = [label["name"] for label in content["categories"]["label"]["labels"]]
        assert labels == list(CATEGORIES)
        for item, image in zip(content["items"], some, strict=True):
            path = tmp_path / "images" / split / item["image"]["path"]
            assert path.read_bytes() == image.data
            assert item["image"]["size"] == [image.height, image.width]
            found = [
                (labels[found["label_id"]], decode_mask(found["rle"]))
                for found in item["annotations"]
            ]
            assert same(found, image)
    assert content["items"][0]["id"] == "熊/point"


def test_datumaro_itself_reads_the_masks(tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro")
    images, _ = written(Datumaro, tmp_path)
    dataset = datumaro.Dataset.import_from(str(tmp_path), "datumaro")
    _same_in_datumaro(dataset, images)
    first = next(item for item in dataset if item.annotations and item.subset == "train")
    assert first.attributes["rank"] == 3
    assert [found.attributes.get("score") for found in first.annotations][:2] == [0.875, 0.5]


def _same_in_datumaro(dataset: Any, images: list[ExportedImage]) -> None:
    labels = [label.name for label in dataset.categories()[_label_type(dataset)].items]
    items = {item.id: item for item in dataset}
    assert len(items) == len(images)
    for image in images:
        item = items[image.name.rpartition(".")[0]]
        assert item.media.size == (image.height, image.width)
        assert item.media.data.shape[:2] == (image.height, image.width)
        found = [(labels[mask.label], np.asarray(mask.image) > 0) for mask in item.annotations]
        assert same(found, image)


def _label_type(dataset: Any) -> Any:
    return next(kind for kind in dataset.categories() if kind.name == "label")
