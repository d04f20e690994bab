"""COCO's layout: annotations of every kind, image lists, the shipped entries, what is refused."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from ruamel.yaml import YAML

import pipeline.presets
from pipeline.benchmarks import Benchmark, open_bench
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.predictions import StoredPrediction
from pipeline.formats.rle import RleObject, encode_mask
from pipeline.params.benches import BenchSection, CocoBench, IndexPngBench
from pipeline.params.reading import parse_params
from pipeline.scoring.board import ScoreBoard
from pipeline.scoring.task import ScoringTask
from pipeline.vocabulary.categories import load_category_set
from tests.conftest import encoded_image

BENCHES = Path(pipeline.presets.__file__).parent / "benches"
SIZES = {139: (6, 5), 285: (3, 4), 632: (5, 3), 724: (7, 2)}  # width, height
MODES = {139: "RGB", 285: "L", 632: "CMYK", 724: "RGB"}
# COCO's own integers, 1 to 90 without ten that were named but never annotated, by label id.
NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = dict(enumerate((i for i in range(1, 91) if i not in NEVER_ANNOTATED), start=1))
PERSON, CAT, BED, TABLE, BOOK, BRUSH = 1, 17, 65, 67, 84, 90  # COCO ids


def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """Polygon around the pixels x0 <= x < x1, y0 <= y < y1."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(number: int, image: int, category: int, segmentation: Any, crowd: int = 0) -> dict:
    return {
        "segmentation": segmentation,
        "area": 1.5,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": [0, 0, 1, 1],
        "category_id": category,
        "id": number,
    }


def brush_mask() -> np.ndarray:
    mask = np.zeros((2, 7), np.uint8)
    mask[1, 2:5] = mask[0, 6] = 1
    return mask


def coco_json(file_name: str = "{:012d}.jpg") -> dict[str, Any]:
    """What stands in instances_val2017.json, for four images, not in the order of their ids."""
    brush = coco_mask.encode(np.asfortranarray(brush_mask()))
    brush_code = {"size": [2, 7], "counts": brush["counts"].decode()}
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 1, "name": "some", "url": "http://example.org"}],
        "images": [
            {
                "license": 1,
                "file_name": file_name.format(coco_id),
                "coco_url": "http://example.org",
                "height": SIZES[coco_id][1],
                "width": SIZES[coco_id][0],
                "date_captured": "2013-11-14 17:02:52",
                "id": coco_id,
            }
            for coco_id in (724, 139, 632, 285)
        ],
        "annotations": [
            annotation(11, 139, BOOK, [box(2, 2, 4, 3)]),
            annotation(12, 139, TABLE, [box(1, 1, 6, 5)]),
            annotation(13, 139, PERSON, [box(0, 0, 2, 1), box(4, 0, 6, 2)]),
            annotation(14, 285, CAT, [box(1, 1, 2, 3)]),
            annotation(15, 724, BRUSH, brush_code),
            annotation(16, 285, BED, [box(0, 0, 2, 4)]),
            annotation(900100000285, 285, PERSON, {"counts": [4, 6, 2], "size": [4, 3]}, crowd=1),
        ],
        "categories": [
            {"supercategory": "some", "id": COCO_IDS[label_id], "name": name}
            for label_id, name in enumerate(load_category_set("coco"), start=1)
        ],
    }


SEMANTIC = {
    139: [
        [1, 1, 0, 0, 1, 1],
        [0, 61, 61, 61, 1, 1],
        [0, 61, 74, 74, 61, 61],
        [0, 61, 61, 61, 61, 61],
        [0, 61, 61, 61, 61, 61],
    ],
    285: [[60, 60, 1], [60, 16, 1], [60, 16, 0], [60, 60, 0]],
    632: np.zeros((3, 5)),
    724: [[0, 0, 0, 0, 0, 0, 80], [0, 0, 80, 80, 80, 0, 0]],
}


def write_bench(
    root: Path,
    content: Any,
    *,
    annotations: str = "annotations/instances_val2017.json",
    images: str = "val2017",
    file_name: str = "{:012d}.jpg",
) -> Path:
    path = root / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (root / images).mkdir(parents=True, exist_ok=True)
    for coco_id, size in SIZES.items():
        image = Image.new("RGB", size, "green").convert(MODES[coco_id])
        (root / images / file_name.format(coco_id)).write_bytes(encoded_image(image, "JPEG"))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_bench(tmp_path / "coco", coco_json())


def open_coco(root: Path, **changes: Any) -> Benchmark:
    arguments = {
        "format": "coco",
        "root": root,
        "split": "val2017",
        "categories": load_category_set("coco"),
    }
    return open_bench(**(arguments | changes))


def ids(benchmark: Benchmark) -> list[str]:
    return [example.image_id for example in benchmark]


def test_label_maps_are_painted_crowds_first_and_small_objects_last(root: Path) -> None:
    benchmark = open_coco(root)

    assert len(benchmark) == 4
    assert ids(benchmark) == ["000000000139", "000000000285", "000000000632", "000000000724"]
    for example in benchmark:
        semantic = example.semantic()
        assert semantic.dtype == np.int16
        np.testing.assert_array_equal(semantic, SEMANTIC[int(example.image_id)])
        assert example.vocabulary is None
        assert example.void().shape == semantic.shape
        assert not example.void().any()


def test_the_later_of_two_objects_of_one_size_is_on_top(tmp_path: Path) -> None:
    content = coco_json()
    content["annotations"] = [
        annotation(1, 632, CAT, [box(0, 0, 3, 1)]),
        annotation(2, 632, BED, [box(2, 0, 5, 1)]),
    ]
    _, _, third, _ = open_coco(write_bench(tmp_path, content))
    assert third.semantic()[0].tolist() == [16, 16, 60, 60, 60]


def test_every_annotation_is_an_instance(root: Path) -> None:
    first, second, empty, last = open_coco(root)

    book, table, person = first.instances()
    assert [target.label_id for target in (book, table, person)] == [74, 61, 1]
    assert [int(target.mask.sum()) for target in (book, table, person)] == [2, 20, 6]
    np.testing.assert_array_equal(
        person.mask, [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], *[[0] * 6] * 3]
    )
    assert person.mask.dtype == np.bool_

    cat, bed, crowd = second.instances()
    assert [target.label_id for target in (cat, bed, crowd)] == [16, 60, 1]
    assert [target.crowd for target in (cat, bed, crowd)] == [False, False, True]
    np.testing.assert_array_equal(crowd.mask, [[0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0]])

    assert empty.instances() == []
    assert {target.area for target in (book, table, person, cat, bed, crowd)} == {1.5}
    np.testing.assert_array_equal(last.instances()[0].mask, brush_mask())


def test_masks_are_those_of_cocos_own_tool(tmp_path: Path) -> None:
    content = coco_json()
    rough = [0.3, 0.7, 4.9, 0.2, 5.6, 3.4, 2.2, 4.8, 0.1, 2.5]
    content["annotations"].append(annotation(20, 139, CAT, [rough, [4.5, 3.5, 6, 5, 3.2, 5]]))
    write_bench(tmp_path, content)
    published = COCO(str(tmp_path / "annotations/instances_val2017.json"))
    for example in open_coco(tmp_path):
        entries = published.loadAnns(published.getAnnIds(imgIds=[int(example.image_id)]))
        targets = example.instances()
        assert len(targets) == len(entries)
        for target, entry in zip(targets, entries, strict=True):
            np.testing.assert_array_equal(target.mask, published.annToMask(entry))
            assert COCO_IDS[target.label_id] == entry["category_id"]


def test_grey_and_cmyk_images_are_found_in_the_size_of_their_masks(root: Path) -> None:
    for example in open_coco(root):
        with Image.open(example.image_path) as stored:
            assert stored.mode == MODES[int(example.image_id)]
        image = load_image(example.image_path)
        assert image.mode == "RGB"
        assert (image.height, image.width) == example.semantic().shape


def test_categories_are_matched_by_name_and_others_left_out(root: Path) -> None:
    first, second, _, last = open_coco(root, categories=["toothbrush", "cat"])
    assert first.instances() == []
    assert not first.semantic().any()
    assert [target.label_id for target in second.instances()] == [2]
    assert last.semantic().max() == 1


def test_the_ids_of_the_file_need_not_be_cocos(tmp_path: Path) -> None:
    content = coco_json()
    content["categories"] = [{"id": 0, "name": "cat"}, {"id": 7, "name": " dog "}]
    content["annotations"] = [annotation(1, 285, 0, [box(0, 0, 1, 1)])]
    benchmark = open_coco(write_bench(tmp_path, content), categories=["dog", "cat"])
    assert [[t.label_id for t in example.instances()] for example in benchmark] == [[], [2], [], []]


def test_an_annotation_without_a_pixel_is_no_object(tmp_path: Path) -> None:
    content = coco_json()
    content["annotations"] = [
        annotation(1, 139, CAT, [[1, 1, 2, 2], box(0, 0, 1, 1)]),
        annotation(2, 139, CAT, []),
        annotation(3, 139, CAT, [[1, 1, 2, 2]]),  # two points, which pycocotools takes for a box
        annotation(4, 139, CAT, [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]),
        annotation(5, 139, CAT, [[1, 1, 2, 2, 3, 3]]),
        annotation(6, 139, CAT, [[]]),
        annotation(7, 139, CAT, [box(-3, -3, -1, -1)]),
        annotation(8, 139, CAT, {"size": [5, 6], "counts": [30]}),
        annotation(9, 139, CAT, {"size": [5, 6], "counts": [30]}, crowd=1),
    ]
    benchmark = open_coco(write_bench(tmp_path, content))
    (warning,) = benchmark.warnings
    assert re.search(r"val2017\.json: 8 of 9 annotations .* first: id 2$", warning)
    first = next(iter(benchmark))
    assert [int(target.mask.sum()) for target in first.instances()] == [1]
    assert (first.semantic() > 0).sum() == 1


@pytest.mark.parametrize("area", [0, 1.5, 1e11])
def test_the_truth_as_prediction_is_perfect(tmp_path: Path, area: float) -> None:
    content = coco_json()
    content["annotations"] += [
        annotation(20, 139, PERSON, [[1, 1]]),
        annotation(21, 285, BED, [box(2, 0, 3, 4)]) | {"area": area},
    ]
    benchmark = open_coco(write_bench(tmp_path, content))
    (warning,) = benchmark.warnings
    assert "1 of 9 annotations" in warning
    board = ScoreBoard(ScoringTask(benchmark.categories), metrics=["instance"], groups={})
    for example in benchmark:
        targets = [target for target in example.instances() if not target.crowd]
        found = [RleObject(each.label_id, encode_mask(each.mask), 0.9) for each in targets]
        labels = example.semantic()
        board.add(example, StoredPrediction(example.image_id, labels=labels, objects=found))
    assert board.compute()["ap"] == 100


@pytest.mark.parametrize("change", [{"image_id": 285}, {"category_id": BED}], ids=str)
def test_ids_of_annotations_are_unique_whether_scored_or_not(
    root: Path, change: dict[str, int]
) -> None:
    (root / "some.txt").write_text("000000000139.jpg\n")
    content = coco_json()
    content["annotations"] += [annotation(20, 139, CAT, [box(0, 0, 1, 1)]) | change] * 2
    write_bench(root, content)
    with pytest.raises(PipelineError, match="annotation 20 is listed twice"):
        open_coco(root, image_list="some.txt", categories=["cat"])


def test_an_image_of_more_pixels_than_can_be_counted_is_refused(tmp_path: Path) -> None:
    content = coco_json()
    content["images"][1] |= {"height": 1 << 16, "width": 1 << 16}
    content["annotations"] = [
        annotation(1, 139, CAT, {"size": [1 << 16] * 2, "counts": [1, (1 << 32) - 1]})
    ]
    with pytest.raises(PipelineError, match="image 139: size 65536x65536: expected at most"):
        open_coco(write_bench(tmp_path, content))


def test_an_annotation_needs_no_id_and_is_named_by_its_place(tmp_path: Path) -> None:
    content = coco_json()
    for entry in content["annotations"]:
        del entry["id"]
    content["annotations"][2]["segmentation"] = []
    benchmark = open_coco(write_bench(tmp_path, content))
    assert len(next(iter(benchmark)).instances()) == 2
    assert benchmark.warnings[0].endswith("The first: annotations[2]")
    content["annotations"][1]["image_id"] = 5
    with pytest.raises(PipelineError, match=r"annotation at annotations\[1\]: image_id 5"):
        open_coco(write_bench(tmp_path, content))


def test_an_image_list_chooses_and_orders(root: Path) -> None:
    (root / "some.txt").write_text(
        "train2014/000000000724.jpg\n\n000000000139.jpg\n 000000000632\n"
    )
    (root / "val2017.txt").write_text("000000000139.jpg\n")
    (root / "val2017/000000000285.jpg").unlink()  # not listed, not needed
    benchmark = open_coco(root, image_list="some.txt", groups={"one": "val2017.txt"})
    assert ids(benchmark) == ["000000000724", "000000000139", "000000000632"]
    assert benchmark.groups == {"one": frozenset({"000000000139"})}
    assert ids(open_coco(root, image_list="{split}.txt")) == ["000000000139"]


def test_images_in_folders(tmp_path: Path) -> None:
    content = coco_json("deep/{:012d}.jpg")
    (tmp_path / "val2017/deep").mkdir(parents=True)
    benchmark = open_coco(write_bench(tmp_path, content, file_name="deep/{:012d}.jpg"))
    assert ids(benchmark)[0] == "000000000139"
    assert all(example.image_path.is_file() for example in benchmark)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": Path("nowhere")}, ["nowhere", "no such folder"]),
        ({"split": "val2018"}, ["instances_val2018.json", "no such file"]),
        ({"images": "images/{split}"}, ["images/val2017", "no such folder"]),
        ({"categories": ["cat", "unicorn"]}, ["unicorn", "its categories: person"]),
        ({"image_list": "none.txt"}, ["none.txt", "no such file"]),
        ({"image_list": "empty.txt"}, ["empty.txt", "empty"]),
        ({"image_list": "twice.txt"}, ["twice.txt", "000000000139.jpg is listed twice"]),
        ({"image_list": "stray.txt"}, ["stray.txt", "1 images", "000000000001.jpg"]),
        (
            {"image_list": "one.txt", "groups": {"rest": "other.txt"}},
            ["'rest'", "other.txt", "000000000285.jpg"],
        ),
    ],
)
def test_what_is_not_there_is_named(root: Path, changes: dict[str, Any], words: list[str]) -> None:
    (root / "empty.txt").write_text("\n")
    (root / "one.txt").write_text("000000000139.jpg\n")
    (root / "other.txt").write_text("000000000285.jpg\n")
    (root / "twice.txt").write_text("000000000139.jpg\nx/000000000139.jpg\n")
    (root / "stray.txt").write_text("000000000139.jpg\n000000000001.jpg\n")
    with pytest.raises(PipelineError) as raised:
        open_coco(**({"root": root} | changes))
    for word in words:
        assert word in str(raised.value)


def test_a_missing_image_is_named_with_the_number_of_all_missing(root: Path) -> None:
    (root / "val2017/000000000632.jpg").unlink()
    (root / "val2017/000000000724.jpg").unlink()
    with pytest.raises(PipelineError, match=r"000000000632\.jpg: no such file.*2 of 4 images"):
        open_coco(root)


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Function that sets `images.0.id` or the like of the JSON's content; `...` removes it."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))

    def change(content: Any) -> None:
        for part in parents:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


LARGE = {"size": [5, 6], "counts": [5, 26]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("images", ...), ["'images' is missing"]),
        (changed("images", []), ["'images' is empty"]),
        (changed("categories", ...), ["'categories' is missing"]),
        (changed("annotations", ...), ["'annotations' is missing"]),
        (changed("annotations", {"id": 1}), ["'annotations' is", "not an array"]),
        (changed("images.0", 5), ["image 5", "expected an object"]),
        (changed("images.0.height", ...), ["image 724", "no 'height'"]),
        (changed("images.0.height", 0), ["image 724", "7x0"]),
        (changed("images.0.height", 10**9), ["image 724", "7x1000000000"]),
        (changed("images.0.height", 2.0), ["image 724", "height is 2.0"]),
        (changed("images.0.id", True), ["image True", "id is True"]),
        (changed("images.0.id", "724"), ["id is '724'", "int"]),
        (changed("images.0.id", 139), ["image 139 is listed twice"]),
        (changed("images.0.file_name", "a/000000000139.jpg"), ["000000000139.jpg", "one name"]),
        (changed("images.0.file_name", "../x.jpg"), ["image 724", "'../x.jpg'"]),
        (changed("images.0.file_name", None), ["file_name is None"]),
        (changed("images.0.file_name", "x" * 256), ["image 724", "file_name"]),
        (changed("images.0.file_name", "x/" * 5000 + "y"), ["x/x/x/", "no such file"]),
        (changed("categories.0.name", " "), ["category 1", "empty"]),
        (changed("categories.0.name", 5), ["category 1", "name is 5"]),
        (changed("categories.1.id", 1), ["category 1 is listed twice"]),
        (changed("annotations.0", 5), ["annotation 5", "annotations[0]"]),
        (changed("annotations.0.id", True), ["annotation True", "id is True"]),
        (changed("annotations.0.id", 12), ["annotation 12 is listed twice"]),
        (changed("annotations.4.segmentation.counts", "P" * 99), ["annotation 15", "digits"]),
        (changed("annotations.0.image_id", 1), ["annotation 11", "image_id 1"]),
        (changed("annotations.0.image_id", "139"), ["annotation 11", "image_id is '139'"]),
        (changed("annotations.0.category_id", True), ["annotation 11", "category_id is True"]),
        (changed("annotations.0.iscrowd", "0"), ["annotation 11", "iscrowd is '0'"]),
        (changed("annotations.0.iscrowd", 2), ["annotation 11", "iscrowd is 2"]),
        (changed("annotations.0.iscrowd", False), ["annotation 11", "iscrowd is False"]),
        (changed("annotations.0.iscrowd", None), ["annotation 11", "iscrowd is None"]),
        (changed("annotations.0.area", -1), ["annotation 11", "area is -1"]),
        (changed("annotations.0.area", None), ["annotation 11", "area is None"]),
        (changed("annotations.0.area", True), ["annotation 11", "area is True"]),
        (changed("categories.0.name", ...), ["category 1", "no 'name'"]),
        (changed("annotations.0.image_id", ...), ["annotation 11", "no 'image_id'"]),
        (changed("annotations.0.category_id", 12), ["annotation 11", "category_id 12"]),
        (changed("annotations.0.segmentation", ...), ["annotation 11", "no 'segmentation'"]),
        (changed("annotations.0.segmentation", None), ["annotation 11", "neither polygons"]),
        (changed("annotations.0.segmentation", [1, 2, 3]), ["annotation 11", "x, y"]),
        (changed("annotations.0.segmentation", [[1, 2, 3, 4, 5, 6, 7]]), ["x, y"]),
        (changed("annotations.0.segmentation", [[1, 2, 3, 4, 5, "a"]]), ["x, y"]),
        (changed("annotations.0.segmentation", [["0", "0", "2", "0", "2", "2"]]), ["x, y"]),
        (changed("annotations.0.segmentation", [[True] * 6]), ["annotation 11", "x, y"]),
        (changed("annotations.0.segmentation", [[[0, 0, 2, 0, 2, 2]]]), ["annotation 11", "x, y"]),
        (changed("annotations.0.segmentation", {}), ["annotation 11", "no 'size'"]),
        (changed("annotations.0.segmentation", [[0, 0, 10**400, 0, 1, 1]]), ["64 bits"]),
        (changed("annotations.0.segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]), ["outside", "6x5"]),
        (
            changed("annotations.0.segmentation", [[0, 0, float("nan"), 0, 1, 1]]),
            ["not valid JSON"],
        ),
        (changed("annotations.0.segmentation", LARGE), ["annotation 11", "31 pixels", "30"]),
        (changed("annotations.0.segmentation", LARGE | {"size": [6, 5]}), ["[6, 5]", "[5, 6]"]),
        (changed("annotations.0.segmentation", LARGE | {"counts": [-1, 31]}), ["whole numbers"]),
        (changed("annotations.0.segmentation", LARGE | {"counts": [True, 29]}), ["whole numbers"]),
        (changed("annotations.0.segmentation", LARGE | {"size": [5.0, 6]}), ["[5.0, 6]"]),
        (changed("annotations.4.segmentation.counts", "5"), ["annotation 15", "5 pixels", "14"]),
        (changed("annotations.4.segmentation.counts", "é"), ["annotation 15", "'é'"]),
        (changed("annotations.4.segmentation.counts", "e"), ["annotation 15", "cut short"]),
    ],
)
def test_a_wrong_entry_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    content = copy.deepcopy(coco_json())
    change(content)
    with pytest.raises(PipelineError) as raised:
        open_coco(write_bench(tmp_path, content))
    for word in ("instances_val2017.json", *words):
        assert word in str(raised.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    text = json.dumps(coco_json())
    for broken, word in (
        (text[:-30], "premature EOF"),
        (text + "]", "trailing garbage"),
        (text.replace('"annotations": [', '"annotations": [,'), "unallowed token"),
        ("", "premature EOF"),
        ('{"images" 1}', "colon"),
        ("{1: 2}", "object key"),
    ):
        with pytest.raises(PipelineError, match="not valid JSON") as raised:
            open_coco(write_bench(tmp_path, broken))
        assert word in str(raised.value)
        assert "instances_val2017.json" in str(raised.value)
    for not_text in (b"\xff\xfe\x00", b'{"images": ["\xff"]}'):
        (tmp_path / "annotations/instances_val2017.json").write_bytes(not_text)
        with pytest.raises(PipelineError, match=r"instances_val2017.json: not valid JSON"):
            open_coco(tmp_path)
    with pytest.raises(PipelineError, match=r"'images' is missing, or is not an array"):
        open_coco(write_bench(tmp_path, "[]"))


@pytest.mark.parametrize("area", ["1e999", "Infinity", "NaN"])
def test_an_area_that_is_not_finite_is_refused(tmp_path: Path, area: str) -> None:
    text = json.dumps(coco_json()).replace('"area": 1.5', f'"area": {area}', 1)
    with pytest.raises(PipelineError, match=r"not valid JSON .* no NaN, Infinity"):
        open_coco(write_bench(tmp_path, text))


def test_annotations_of_images_that_are_not_chosen_are_left_out(tmp_path: Path) -> None:
    content = coco_json()
    content["annotations"].append(annotation(99, 724, CAT, "not looked at"))
    (tmp_path / "some.txt").write_text("000000000139.jpg\n")
    (example,) = open_coco(write_bench(tmp_path, content), image_list="some.txt")
    assert len(example.instances()) == 3


def test_two_categories_of_an_asked_name_are_refused(tmp_path: Path) -> None:
    content = coco_json()
    content["categories"].append({"id": 91, "name": " cat"})
    with pytest.raises(PipelineError, match="categories 17, 91 have one name, 'cat'"):
        open_coco(write_bench(tmp_path, content))


def test_other_categories_may_share_a_name(tmp_path: Path) -> None:
    content = coco_json()
    content["categories"] += [{"id": number, "name": "wing"} for number in (91, 92)]
    assert len(open_coco(write_bench(tmp_path, content))) == 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_an_encoding_other_than_utf_8_is_named(tmp_path: Path, encoding: str) -> None:
    path = write_bench(tmp_path, coco_json()) / "annotations/instances_val2017.json"
    path.write_text(json.dumps(coco_json()), encoding=encoding)
    with pytest.raises(PipelineError, match=f"val2017.json: .*{encoding}; save it as UTF-8"):
        open_coco(tmp_path)
    path.write_text(json.dumps(coco_json()))
    (tmp_path / "some.txt").write_text("000000000139.jpg\n", encoding=encoding)
    with pytest.raises(PipelineError, match=r"some\.txt: not a text file .*UTF-8"):
        open_coco(tmp_path, image_list="some.txt")


def test_an_image_list_may_begin_with_a_byte_order_mark(root: Path) -> None:
    (root / "some.txt").write_text("000000000139.jpg\n", encoding="utf-8-sig")
    assert ids(open_coco(root, image_list="some.txt")) == ["000000000139"]
    with pytest.raises(PipelineError, match="val2017: cannot be read"):
        open_coco(root, image_list="val2017")


def test_a_list_at_the_top_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no object at its top, but a list"):
        open_coco(write_bench(tmp_path, json.dumps([coco_json()])))


@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_read_the_same_however_it_is_written(tmp_path: Path, indent: int | None) -> None:
    """With a byte order mark, keys in another order, and what no benchmark looks at."""
    content = {"n": 1e5, "odd": [{"a": [[], 'é]}"', None, -0.5e-3]}], **coco_json()}
    reverse = dict(reversed(content.items()))
    text = json.dumps(reverse, indent=indent) + "\n"
    write_bench(tmp_path, content)
    expected = [(e.semantic().tolist(), len(e.instances())) for e in open_coco(tmp_path)]
    path = tmp_path / "annotations/instances_val2017.json"
    path.write_text(text, encoding="utf-8-sig")
    found = [(e.semantic().tolist(), len(e.instances())) for e in open_coco(tmp_path)]
    assert found == expected


def test_numbers_keep_their_kinds(tmp_path: Path) -> None:
    content = coco_json()
    areas = [2, 2.0, 0.1, 1e5, 2**53 + 1]
    content["annotations"] = [
        annotation(2**60 + n, 139, CAT, [box(0, 0, 1, 1)]) | {"area": area}
        for n, area in enumerate(areas)
    ]
    (example,) = (e for e in open_coco(write_bench(tmp_path, content)) if e.instances())
    found = [instance.area for instance in example.instances()]
    assert found == areas
    assert list(map(type, found)) == list(map(type, areas))


def test_memory_holds_a_piece_of_the_file(tmp_path: Path) -> None:
    content = coco_json()
    content["annotations"] += [
        annotation(number, 724, CAT, [[1.5] * 2000]) for number in range(1000, 1500)
    ]
    (tmp_path / "some.txt").write_text("000000000139.jpg\n")
    path = write_bench(tmp_path, content) / "annotations/instances_val2017.json"
    tracemalloc.start()
    open_coco(tmp_path, image_list="some.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def shipped(name: str, root: Path) -> BenchSection:
    """An entry of `pipeline/presets/benches`, with another root."""
    entry = YAML(typ="safe", pure=True).load((BENCHES / f"{name}.yaml").read_text("utf-8"))
    assert entry["root"].startswith("data/raw/")
    content = {
        "categories": "coco",
        "index": {"photos": {"root": "images"}},
        "benches": {name: entry | {"root": str(root)}},
    }
    return parse_params(content).benches[name]


def open_entry(bench: BenchSection) -> Benchmark:
    categories = load_category_set(bench.categories)
    assert set(bench.unseen) <= set(categories)
    assert len(set(bench.unseen)) == len(bench.unseen)
    assert isinstance(bench, CocoBench | IndexPngBench)
    return open_bench(
        format=bench.format,
        root=bench.root,
        split=bench.split,
        categories=categories,
        groups=bench.groups,
        **bench.layout(),
    )


def test_shipped_coco(root: Path) -> None:
    bench = shipped("coco", root)
    assert (bench.background, bench.metrics) == (True, ["semantic"])
    for example in open_entry(bench):
        np.testing.assert_array_equal(example.semantic(), SEMANTIC[int(example.image_id)])


@pytest.mark.parametrize(("name", "num_unseen"), [("coco20k", 0), ("coco_unseen", 15)])
def test_shipped_coco20k(tmp_path: Path, name: str, num_unseen: int) -> None:
    file_name = "COCO_train2014_{:012d}.jpg"
    write_bench(
        tmp_path,
        coco_json(file_name),
        annotations="annotations/instances_train2014.json",
        images="train2014",
        file_name=file_name,
    )
    listed = [f"train2014/{file_name.format(coco_id)}\n" for coco_id in (724, 285)]
    (tmp_path / "coco_20k_filenames.txt").write_text("".join(listed))
    bench = shipped(name, tmp_path)
    assert bench.metrics == ["instance"]
    assert len(bench.unseen) == num_unseen
    benchmark = open_entry(bench)
    assert ids(benchmark) == ["COCO_train2014_000000000724", "COCO_train2014_000000000285"]
    assert [len(example.instances()) for example in benchmark] == [1, 3]


def test_seen_and_unseen_categories_are_all_of_coco(tmp_path: Path) -> None:
    seen = load_category_set("coco_seen65")
    unseen = shipped("coco_unseen", tmp_path).unseen
    assert [name for name in load_category_set("coco") if name not in unseen] == seen
    assert len(seen) == 65


# Number and name in cocostuff's labels.txt -> name asked for.
STUFF = {1: "person", 13: "stop sign", 90: "toothbrush", 92: "banner", 96: "building"}
STUFF |= {102: "ceiling", 103: "tile ceiling", 172: "concrete wall", 173: "wall", 182: "wood"}


@pytest.mark.parametrize("name", ["coco_stuff", "stuff_unseen", "coco_object"])
def test_shipped_stuff(tmp_path: Path, name: str) -> None:
    pixels = np.array(
        [[number - 1 for number in STUFF], [11, 25, 90, 255, 182, *[0] * 5]], np.uint8
    )
    for part, suffix in (("images", "jpg"), ("annotations", "png")):
        (tmp_path / part / "val2017").mkdir(parents=True)
        image = Image.fromarray(pixels)
        content = encoded_image(image, "JPEG" if suffix == "jpg" else "PNG")
        (tmp_path / part / f"val2017/000000000139.{suffix}").write_bytes(content)
    bench = shipped(name, tmp_path)
    (example,) = open_entry(bench)
    names = load_category_set(bench.categories)
    top, bottom = example.semantic()
    if name == "coco_object":
        assert bench.background
        assert [names[label_id - 1] for label_id in top[:3]] == [
            "person",
            "stop sign",
            "toothbrush",
        ]
        assert not top[3:].any()
        assert bottom.tolist() == [0, 0, 0, 0, 0, *[1] * 5]
    else:
        assert not bench.background
        assert len(names) == 171
        assert [names[label_id - 1] for label_id in top] == list(STUFF.values())
        assert bottom.tolist() == [*[IGNORE_INDEX] * 5, *[1] * 5]
        assert len(bench.unseen) == (15 if name == "stuff_unseen" else 0)
