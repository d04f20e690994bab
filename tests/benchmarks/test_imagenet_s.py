"""ImageNet-S: label ids over two channels, one folder a category, test masks held back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.vocabulary.categories import load_category_set
from tests.benchmarks.fixtures import IMAGENET_S_CATEGORIES, save_png, save_text, write_imagenet_s

MASK = "validation-segmentation/n00000001/ILSVRC2012_val_00000293.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_imagenet_s(tmp_path / "ImageNetS300")
    return tmp_path / "ImageNetS300"


def open_imagenet_s(
    root: Path, split: str = "validation", categories: list[str] = IMAGENET_S_CATEGORIES
) -> Benchmark:
    return open_bench(format="imagenet_s", root=root, split=split, categories=categories)


def test_label_ids_are_red_and_256_green(tmp_path: Path) -> None:
    expected = write_imagenet_s(tmp_path)
    bench = open_imagenet_s(tmp_path)
    examples = list(bench)
    assert len(bench) == 3
    assert [example.image_id for example in examples] == list(expected)
    for example in examples:
        labels = example.semantic()
        assert labels.dtype == np.int16
        np.testing.assert_array_equal(labels, expected[example.image_id])
        np.testing.assert_array_equal(example.void(), labels == -1)
        image = load_image(example.image_path)
        assert (image.height, image.width) == labels.shape


def test_the_shipped_names_follow_the_sorted_wordnet_ids() -> None:
    # WordNet ids of ImageNet-S50 that name lists of the data set begin and end with.
    wordnet_ids = {
        "goldfish": "n01443537",
        "tiger shark": "n01491361",
        "goldfinch": "n01531178",
        "tree frog": "n01644373",
        "kuvasz": "n02104029",
        "red fox": "n02119022",
        "lemon": "n07749582",
        "carbonara": "n07831146",
        "agaric": "n12998815",
    }
    for name in ("imagenet_s50", "imagenet_s300", "imagenet_s919"):
        position = {category: index for index, category in enumerate(load_category_set(name))}
        common = [category for category in wordnet_ids if category in position]
        assert len(common) == 9
        assert sorted(common, key=wordnet_ids.__getitem__) == sorted(
            common, key=position.__getitem__
        )


def test_groups_are_lists_of_image_ids(root: Path) -> None:
    save_text(root / "one.txt", "n00000300__ILSVRC2012_val_00000011")
    bench = open_bench(
        format="imagenet_s",
        root=root,
        split="validation",
        categories=IMAGENET_S_CATEGORIES,
        groups={"one": "one.txt"},
    )
    assert bench.groups == {"one": frozenset({"n00000300__ILSVRC2012_val_00000011"})}


@pytest.mark.parametrize("label_id", [301, 999, 1001])
def test_a_label_id_beyond_the_categories_is_named(root: Path, label_id: int) -> None:
    save_png(root / MASK, np.array([[[label_id % 256, label_id // 256, 0]]], np.uint8))
    with pytest.raises(PipelineError, match=rf"00000293\.png: label id {label_id}, .* 300 categ"):
        next(iter(open_imagenet_s(root))).semantic()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_mask_without_three_channels_is_refused(root: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(root / MASK)
    with pytest.raises(PipelineError, match=rf"00000293\.png: a PNG of mode {mode}; .*RGB"):
        next(iter(open_imagenet_s(root))).semantic()


def test_the_categories_must_be_as_many_as_the_folders(root: Path) -> None:
    names = load_category_set("imagenet_s919")
    with pytest.raises(PipelineError, match="300 folders, but the benchmark has 919 categories"):
        open_imagenet_s(root, categories=names)


def test_the_test_split_without_masks_says_who_has_them(root: Path) -> None:
    (root / "validation").rename(root / "test")
    with pytest.raises(PipelineError) as error:
        open_imagenet_s(root, "test")
    message = str(error.value)
    assert "test-segmentation: no such folder" in message
    for hint in ("not public", "https://LUSSeg.github.io", "validation", "pipeline predict"):
        assert hint in message


def test_the_test_split_with_masks_is_read(tmp_path: Path) -> None:
    expected = write_imagenet_s(tmp_path, "test")
    assert [example.image_id for example in open_imagenet_s(tmp_path, "test")] == list(expected)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", "ImageNetS300: no such folder"),
        ("validation", "ImageNetS300/validation: no such folder"),
        ("validation-segmentation", "validation-segmentation: no such folder; .*releases"),
        ("validation-segmentation/n00000007", "validation-segmentation/n00000007: no such folder"),
        (MASK, r"00000293\.png: no such file; it belongs to .*00000293\.JPEG"),
        (
            "validation/n00000300/ILSVRC2012_val_00000011.JPEG",
            r"00000011\.JPEG: no such file; it belongs to .*00000011\.png",
        ),
    ],
)
def test_a_missing_part_is_named(root: Path, part: str, message: str) -> None:
    path = root / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(PipelineError, match=message):
        open_imagenet_s(root)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    for part in ("validation", "validation-segmentation"):
        (tmp_path / part / "n01443537").mkdir(parents=True)
    with pytest.raises(PipelineError, match=r"validation: no \.JPEG file in its folders"):
        open_imagenet_s(tmp_path, categories=["goldfish"])
