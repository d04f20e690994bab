"""CUB-200-2011: four lists, soft masks, the name of the breed as an image's vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.vocabulary.categories import load_category_set
from tests.benchmarks.fixtures import save_text, write_cub

FIRST = "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cub(tmp_path / "CUB_200_2011")
    return tmp_path / "CUB_200_2011"


def open_cub(root: Path, **changes: object) -> Benchmark:
    arguments: dict[str, Any] = {"split": "test", "categories": ["bird"], **changes}
    return open_bench(format="cub", root=root, **arguments)


def test_reads_the_test_images_and_cuts_masks_at_half(tmp_path: Path) -> None:
    expected = write_cub(tmp_path)
    bench = open_cub(tmp_path)
    examples = list(bench)
    assert len(bench) == 3
    assert bench.categories == ["bird"]
    assert [example.image_id for example in examples] == list(expected)
    for example in examples:
        labels = example.semantic()
        assert labels.dtype == np.int16
        np.testing.assert_array_equal(labels, expected[example.image_id])
        assert not example.void().any()
        image = load_image(example.image_path)
        assert (image.height, image.width) == labels.shape
        assert example.vocabulary is not None
        assert list(example.vocabulary) == ["bird"]


def test_the_other_split(root: Path) -> None:
    (example,) = open_cub(root, split="train")
    assert example.semantic().tolist() == [[1, 1]]


def test_breeds_are_asked_for_by_their_words(root: Path) -> None:
    vocabularies = [example.vocabulary for example in open_cub(root, names="breed")]
    assert [list(names or []) for names in vocabularies] == [
        ["Black footed Albatross"],
        ["Laysan Albatross"],
        ["Laysan Albatross"],
    ]
    assert [names[0] for names in vocabularies if names][:1] == load_category_set("cub")[:1]


def test_the_shipped_names_are_in_the_order_of_the_classes() -> None:
    names = load_category_set("cub")
    classes = {1: "Black footed Albatross", 60: "Glaucous winged Gull", 120: "Fox Sparrow"}
    classes |= {145: "Elegant Tern", 180: "Wilson Warbler", 200: "Common Yellowthroat"}
    assert len(names) == 200
    assert {number: names[number - 1] for number in classes} == classes
    # "only 16 out of 200 ... contain 'bird' as a part of its name" (ZUTIS, section 4.3)
    assert sum("bird" in name.lower() for name in names) == 16


def test_groups_are_lists_of_image_ids(root: Path) -> None:
    image_id = "002_Laysan_Albatross__Laysan_Albatross_0002_1027"
    save_text(root / "rare.txt", image_id)
    assert open_cub(root, groups={"rare": "rare.txt"}).groups == {"rare": frozenset({image_id})}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", "CUB_200_2011: no such folder"),
        ("images.txt", r"images\.txt: no such file"),
        ("train_test_split.txt", r"train_test_split\.txt: no such file"),
        ("image_class_labels.txt", r"image_class_labels\.txt: no such file"),
        ("classes.txt", r"classes\.txt: no such file"),
        ("images", "CUB_200_2011/images: no such folder"),
        ("segmentations", r"CUB_200_2011/segmentations: no such folder; .*segmentations\.tgz"),
        ("segmentations/002.Laysan_Albatross", "segmentations/002.Laysan_Albatross: no such fold"),
        (f"images/{FIRST}.jpg", rf"images/{FIRST}\.jpg: no such file"),
        (f"segmentations/{FIRST}.png", rf"segmentations/{FIRST}\.png: no such file"),
    ],
)
def test_a_missing_part_is_named(root: Path, part: str, message: str) -> None:
    path = root / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(PipelineError, match=message):
        open_cub(root, names="breed")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("images.txt", [], r"images\.txt: empty"),
        ("images.txt", ["1"], r"images\.txt: line '1': number 1 has no value"),
        ("images.txt", ["1 a/b.jpg", "1 a/c.jpg"], r"images\.txt: line .* is listed twice"),
        ("images.txt", ["1 ../b.jpg"], r"images\.txt: image 1: '\.\./b\.jpg'; expected FOLDER"),
        ("images.txt", ["1 b.jpg"], r"images\.txt: image 1: 'b\.jpg'; expected FOLDER"),
        ("train_test_split.txt", ["1 0"], r"split\.txt: number 2 is missing"),
        ("train_test_split.txt", [f"{n} 1" for n in range(1, 5)], "no image of split 'test'"),
        ("image_class_labels.txt", ["1 1"], r"labels\.txt: number 3 is missing"),
        ("classes.txt", ["1 001.Albatross"], r"classes\.txt: number 2 is missing"),
    ],
)
def test_lists_that_do_not_fit_are_named(
    root: Path, name: str, lines: list[str], message: str
) -> None:
    save_text(root / name, *lines)
    with pytest.raises(PipelineError, match=message):
        open_cub(root, names="breed")


def test_breeds_are_no_categories(root: Path) -> None:
    with pytest.raises(PipelineError, match=r"200 categories; expected one, \[bird\]"):
        open_cub(root, categories=load_category_set("cub"))


def test_an_unknown_split_is_answered_with_the_known_ones(root: Path) -> None:
    with pytest.raises(PipelineError, match="no split 'val'; expected one of train, test"):
        open_cub(root, split="val")
