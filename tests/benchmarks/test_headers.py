"""What headers of photos and masks say: sizes that differ are refused, palettes are warned of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.benchmarks.headers import check_headers
from pipeline.benchmarks.voc import voc_palette
from pipeline.errors import PipelineError
from tests.benchmarks.fixtures import (
    COCA_CATEGORIES,
    CONTEXT_CATEGORIES,
    CUB_CATEGORIES,
    IMAGENET_S_CATEGORIES,
    VOC_CATEGORIES,
    save_jpeg,
    write_coca,
    write_context,
    write_cub,
    write_imagenet_s,
    write_voc,
)
from tests.benchmarks.test_coco import coco_json, open_coco, write_bench
from tests.benchmarks.test_index_png import CONTEXT

VOID = 255
LAYOUTS: dict[str, tuple[Callable[[Path], object], dict[str, object], str, str]] = {
    "voc": (
        write_voc,
        {"split": "val", "categories": VOC_CATEGORIES},
        "JPEGImages/2007_000002.jpg",
        "SegmentationClass/2007_000002.png",
    ),
    "index_png": (
        write_context,
        {**CONTEXT, "categories": CONTEXT_CATEGORIES},
        "JPEGImages/2008_000003.jpg",
        "SegmentationClassContext/2008_000003.png",
    ),
    "coca": (
        write_coca,
        {"split": "", "categories": COCA_CATEGORIES},
        "image/Yellow duck/7.jpg",
        "binary/Yellow duck/7.png",
    ),
    "imagenet_s": (
        write_imagenet_s,
        {"split": "validation", "categories": IMAGENET_S_CATEGORIES},
        "validation/n00000300/ILSVRC2012_val_00000011.JPEG",
        "validation-segmentation/n00000300/ILSVRC2012_val_00000011.png",
    ),
    "cub": (
        write_cub,
        {"split": "test", "categories": CUB_CATEGORIES},
        "images/002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg",
        "segmentations/002.Laysan_Albatross/Laysan_Albatross_0002_1027.png",
    ),
    "coco": (
        lambda root: write_bench(root, coco_json()),
        {"split": "val2017", "categories": ["person"]},
        "val2017/000000000285.jpg",
        "annotations/instances_val2017.json",
    ),
}


@pytest.mark.parametrize("form", LAYOUTS)
def test_a_photo_of_another_size_than_its_masks_is_named(tmp_path: Path, form: str) -> None:
    write, layout, photo, masks = LAYOUTS[form]
    write(tmp_path)
    bench = open_bench(**{"format": form, "root": tmp_path, **layout})
    assert check_headers(bench) == []
    save_jpeg(tmp_path / photo, (9, 8), "RGB")
    expected = rf"{photo}: 8x9 pixels, but its masks have \d+x\d+ \({tmp_path / masks}\); 1 of "
    with pytest.raises(PipelineError, match=expected + rf"{len(bench)} images"):
        check_headers(bench)


def test_all_that_differ_are_counted_and_unreadable_photos_left_out(tmp_path: Path) -> None:
    root = write_bench(tmp_path, coco_json())
    for coco_id in (285, 724):
        save_jpeg(root / f"val2017/{coco_id:012d}.jpg", (4, 4), "L")
    (root / "val2017/000000000139.jpg").write_bytes(b"\xff\xd8\xff no photo")
    with pytest.raises(PipelineError, match=r"285\.jpg: 4x4 pixels, but .* have 3x4 .*; 2 of 4"):
        check_headers(open_coco(root))


def test_masks_of_objects_are_compared_where_they_are_scored(tmp_path: Path) -> None:
    write_voc(tmp_path)
    Image.new("P", (6, 5)).save(tmp_path / "SegmentationObject/2007_000001.png")
    with pytest.raises(PipelineError, match=r"have 6x5 \(.*SegmentationObject/2007_000001\.png\)"):
        check_headers(open_voc(tmp_path))
    assert check_headers(open_voc(tmp_path, objects=False)) == []


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "SegmentationClass/2007_000002.png").write_bytes(b"\x89PNG")
    with pytest.raises(PipelineError, match=r"2007_000002\.png: not a readable PNG mask"):
        check_headers(open_voc(tmp_path))


def test_a_mask_of_vocs_with_other_colours_is_warned_of(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for name in ("2007_000002", "2007_000003"):
        renumber(tmp_path / f"SegmentationClass/{name}.png", [0, 2, 1])
    (warning,) = check_headers(open_voc(tmp_path))
    assert warning.startswith("2 of 6 masks have another palette than the layout has, the first ")
    assert f"{tmp_path}/SegmentationClass/2007_000002.png" in warning


@pytest.mark.parametrize("num_colours", [1, 3, 7, 256])
def test_a_palette_cut_or_filled_up_behind_the_label_ids_is_the_same(
    tmp_path: Path, num_colours: int
) -> None:
    write_voc(tmp_path)
    colours = voc_palette()
    colours[len(VOC_CATEGORIES) + 1 : VOID] = 7
    path = tmp_path / "SegmentationClass/2007_000002.png"
    save_indexed(path, np.zeros((4, 6), np.uint8), colours[:num_colours])
    assert check_headers(open_voc(tmp_path)) == []


def test_another_colour_of_void_is_warned_of(tmp_path: Path) -> None:
    write_voc(tmp_path)
    colours = voc_palette()
    colours[VOID] = 0
    path = tmp_path / "SegmentationObject/2007_000003.png"
    save_indexed(path, np.array([[1], [0], [0]], np.uint8), colours)
    (warning,) = check_headers(open_voc(tmp_path))
    assert warning.startswith("1 of 6 masks")
    assert str(path) in warning


def test_gray_masks_have_no_colours(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for path in tmp_path.glob("SegmentationClass/*.png"):
        with Image.open(path) as image:
            values = np.array(image)
        Image.fromarray(values).save(path)
    assert check_headers(open_voc(tmp_path)) == []


@pytest.mark.parametrize("values", [[], [1, 5, 9]])
@pytest.mark.parametrize("odd", [0, 2])
def test_other_index_pngs_are_compared_with_most_of_their_like(
    tmp_path: Path, odd: int, values: list[int]
) -> None:
    write_context(tmp_path)
    paths = sorted(tmp_path.glob("SegmentationClassContext/*.png"))
    own = np.arange(30, 60, dtype=np.uint8).reshape(10, 3)
    for path in paths:
        with Image.open(path) as image:
            save_indexed(path, np.array(image), own)
    bench = open_bench(**{**CONTEXT, "root": tmp_path, "values": values})
    assert check_headers(bench) == []
    with Image.open(paths[odd]) as image:
        save_indexed(paths[odd], np.array(image), own[[0, 3, 2, 1]])
    (warning,) = check_headers(bench)
    assert warning.startswith("1 of 3 masks have another palette than most have, the first ")
    assert str(paths[odd]) in warning


def test_masks_whose_gray_levels_count_may_have_any_palette(tmp_path: Path) -> None:
    write_coca(tmp_path)
    black_and_white = np.array([[255, 255, 255], [0, 0, 0]], np.uint8)
    save_indexed(
        tmp_path / "binary/Yellow duck/7.png", np.ones((3, 2), np.uint8), black_and_white[::-1]
    )
    path = tmp_path / "binary/roller-skating/51499.png"
    save_indexed(path, np.zeros((1, 1), np.uint8), black_and_white)
    layout = {"root": tmp_path, "split": "", "categories": COCA_CATEGORIES}
    assert check_headers(open_bench(format="coca", **layout)) == []


def open_voc(root: Path, **changes: object) -> Benchmark:
    layout = {"format": "voc", "root": root, "split": "val", "categories": VOC_CATEGORIES}
    return open_bench(**(layout | changes))


def renumber(path: Path, order: Sequence[int]) -> None:
    """As an editor does: the indices change, and the colours with them."""
    with Image.open(path) as image:
        image.remap_palette(order).save(path)


def save_indexed(path: Path, indices: np.ndarray, colours: np.ndarray) -> None:
    """A PNG with a palette of (N, 3) colours and no more."""
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    image.save(path)
