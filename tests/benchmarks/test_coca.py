"""CoCA: binary masks in one folder a category."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from tests.benchmarks.fixtures import COCA_CATEGORIES, save_png, save_text, write_coca

DUCK = "binary/Yellow duck/51499.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_coca(tmp_path / "CoCA")
    return tmp_path / "CoCA"


def open_coca(
    root: Path, categories: list[str] = COCA_CATEGORIES, groups: dict[str, str] | None = None
) -> Benchmark:
    return open_bench(format="coca", root=root, split="val", categories=categories, groups=groups)


def test_the_label_is_that_of_the_folder(tmp_path: Path) -> None:
    expected = write_coca(tmp_path)
    bench = open_coca(tmp_path)
    examples = list(bench)
    assert len(bench) == 3
    assert [example.image_id for example in examples] == list(expected)
    for example in examples:
        labels = example.semantic()
        assert labels.dtype == np.int16
        np.testing.assert_array_equal(labels, expected[example.image_id])
        assert not example.void().any()
        image = load_image(example.image_path)
        assert (image.height, image.width) == labels.shape


def test_label_ids_follow_the_list_of_categories(root: Path) -> None:
    labels = {example.image_id: example for example in open_coca(root, COCA_CATEGORIES[::-1])}
    assert labels["roller-skating__51499"].semantic().tolist() == [[1]]


def test_groups_are_lists_of_image_ids(root: Path) -> None:
    save_text(root / "hard.txt", "Yellow_duck__7")
    assert open_coca(root, groups={"hard": "hard.txt"}).groups == {
        "hard": frozenset({"Yellow_duck__7"})
    }


def test_soft_edges_are_cut_at_half_of_the_levels(root: Path) -> None:
    save_png(root / DUCK, np.array([[0, 127, 128, 255]], np.uint8))
    assert next(iter(open_coca(root))).semantic().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_greys_are_read_however_they_are_stored(root: Path, mode: str) -> None:
    levels = Image.fromarray(np.array([[0, 255, 255]], np.uint8))
    levels.convert("RGB").convert(mode).save(root / DUCK)
    assert next(iter(open_coca(root))).semantic().tolist() == [[0, 1, 1]]


def test_a_mask_of_0_and_1_is_refused(root: Path) -> None:
    save_png(root / DUCK, np.array([[0, 1]], np.uint8))
    with pytest.raises(PipelineError, match=r"51499\.png: the highest pixel value is 1; .*255"):
        next(iter(open_coca(root))).semantic()


def test_a_mask_of_16_bits_is_refused(root: Path) -> None:
    save_png(root / DUCK, np.array([[0, 65535]], np.uint16))
    with pytest.raises(
        PipelineError, match=r"51499\.png: a PNG of mode I;16; expected grey levels"
    ):
        next(iter(open_coca(root))).semantic()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", "CoCA: no such folder"),
        ("image", "CoCA/image: no such folder"),
        ("binary", "CoCA/binary: no such folder"),
        ("image/roller-skating", "image/roller-skating: no such folder"),
        ("binary/roller-skating", "binary/roller-skating: no such folder"),
        (DUCK, r"binary/Yellow duck/51499\.png: no such file; it belongs to .*51499\.jpg"),
        ("image/Yellow duck/7.jpg", r"image/Yellow duck/7\.jpg: no such file; it belongs to"),
    ],
)
def test_a_missing_part_is_named(root: Path, part: str, message: str) -> None:
    path = root / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(PipelineError, match=message):
        open_coca(root)


def test_a_folder_that_is_no_category_is_named(root: Path) -> None:
    with pytest.raises(PipelineError, match="roller-skating: 'roller-skating' is none of the 1"):
        open_coca(root, ["Yellow duck"])


def test_images_whose_ids_would_be_the_same_are_refused(root: Path) -> None:
    for part, suffix in (("image", "jpg"), ("binary", "png")):
        folder = root / part / "Yellow duck"
        for stem in ("a b", "a_b"):
            shutil.copy(folder / f"7.{suffix}", folder / f"{stem}.{suffix}")
    with pytest.raises(PipelineError, match="two images have the id Yellow_duck__a_b"):
        open_coca(root)


def test_files_that_macos_leaves_are_no_images(root: Path) -> None:
    save_text(root / "image/.DS_Store", "x")
    save_text(root / "image/Yellow duck/._51499.jpg", "x")
    (root / "image/.cache").mkdir()
    assert len(open_coca(root)) == 3
