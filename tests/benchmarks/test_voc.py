"""Benchmarks in PASCAL VOC's layout: what is read, what is written, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import open_bench
from pipeline.benchmarks.opening import open_benchmark
from pipeline.benchmarks.voc import VocWriter, read_index_png, voc_palette
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.params.benches import VocBench
from tests.benchmarks.fixtures import VOC_CATEGORIES, VOC_OBJECTS, VOC_SEMANTIC, write_voc
from tests.conftest import encoded_image


def maps() -> tuple[np.ndarray, np.ndarray]:
    """4 x 6 pixels: label ids and numbers of the objects of the first image."""
    return np.array(VOC_SEMANTIC), np.array(VOC_OBJECTS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_voc(tmp_path / "voc")
    return tmp_path / "voc"


def open_voc(root: Path, **changes: object):
    arguments = {"format": "voc", "root": root, "split": "val", "categories": VOC_CATEGORIES}
    return open_bench(**(arguments | changes))


def test_reads_what_was_written(root: Path) -> None:
    benchmark = open_voc(root, groups={"seen": "known"})
    first, second, third = benchmark

    assert len(benchmark) == 3
    assert benchmark.categories == VOC_CATEGORIES
    assert benchmark.groups == {"seen": frozenset({"2007_000002"})}
    assert first.image_path.read_bytes().startswith(b"\xff\xd8")
    np.testing.assert_array_equal(first.semantic(), maps()[0])
    np.testing.assert_array_equal(first.void(), maps()[0] == IGNORE_INDEX)
    targets = first.instances()
    assert [target.label_id for target in targets] == [1, 2, 2]
    assert [int(target.mask.sum()) for target in targets] == [1, 4, 4]
    assert targets[1].mask[:2, 2:4].all()
    assert second.instances() == []
    assert not second.void().any()
    assert third.semantic().tolist() == [[2], [0], [0]]
    for example in benchmark:  # RGB, gray and CMYK
        image = load_image(example.image_path)
        assert image.mode == "RGB"
        assert (image.height, image.width) == example.semantic().shape


def test_masks_are_palette_pngs_with_vocs_colours(root: Path) -> None:
    with Image.open(root / "SegmentationClass/2007_000001.png") as image:
        assert image.mode == "P"
        assert image.size == (6, 4)
        assert np.array(image)[0].tolist() == [1, 255, 2, 2, 2, 2]
        # The colours of cat (8), dog (12) and void in VOC's development kit.
        palette = np.array(image.getpalette()).reshape(-1, 3)
    assert palette[[0, 1, 8, 12, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [64, 0, 0],
        [64, 0, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    assert palette.tolist() == voc_palette().tolist()


def test_same_input_same_bytes(root: Path, tmp_path: Path) -> None:
    jpeg = (root / "JPEGImages/2007_000001.jpg").read_bytes()
    VocWriter(tmp_path / "again").add("2007_000001", jpeg, *maps())
    for part in ("SegmentationClass", "SegmentationObject"):
        name = f"{part}/2007_000001.png"
        assert (tmp_path / "again" / name).read_bytes() == (root / name).read_bytes()


def test_grey_masks_and_void_only_images_are_read(root: Path) -> None:
    for part in ("SegmentationClass", "SegmentationObject"):
        Image.fromarray(np.full((4, 6), 255, np.uint8)).save(root / part / "2007_000001.png")
    first = next(iter(open_voc(root)))
    assert (first.semantic() == IGNORE_INDEX).all()
    assert first.void().all()
    assert first.instances() == []


def test_an_object_of_no_category_is_no_target(tmp_path: Path) -> None:
    writer = VocWriter(tmp_path)
    objects = np.array([[1, 2]])
    writer.add("a", b"jpeg", np.array([[0, 1]]), objects)
    writer.write_split("val", ["a"])
    (example,) = open_voc(tmp_path)
    assert [target.label_id for target in example.instances()] == [1]
    np.testing.assert_array_equal(example.objects(), objects)


@pytest.mark.parametrize("part", ["JPEGImages", "SegmentationClass", "SegmentationObject"])
def test_a_missing_file_is_named(root: Path, part: str) -> None:
    (path,) = (root / part).glob("2007_000002.*")
    path.unlink()
    with pytest.raises(PipelineError, match=rf"{part}/2007_000002\.\w+: no such file"):
        open_voc(root)


@pytest.mark.parametrize(
    "part", ["", "JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"]
)
def test_a_missing_folder_is_named(root: Path, part: str) -> None:
    moved = root / part
    moved.rename(root.parent / "moved")
    with pytest.raises(PipelineError, match=f"{moved}: no such folder"):
        open_voc(root)


def test_masks_of_objects_are_not_needed_where_none_are_scored(root: Path) -> None:
    (root / "SegmentationObject").rename(root.parent / "moved")
    entry = VocBench(
        format="voc", root=root, categories=VOC_CATEGORIES, metrics=["semantic", "size"]
    )
    first, *_ = open_benchmark("photos", entry, ["background"])
    np.testing.assert_array_equal(first.semantic(), maps()[0])
    np.testing.assert_array_equal(first.void(), maps()[0] == IGNORE_INDEX)
    entry = entry.model_copy(update={"metrics": ["semantic", "instance"]})
    with pytest.raises(PipelineError, match="SegmentationObject: no such folder"):
        open_benchmark("photos", entry, ["background"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "coco9"}, ["'coco9'", "voc"]),
        ({"split": "train"}, ["train.txt", "known, val"]),
        ({"groups": {"new": "unseen"}}, ["unseen.txt", "no such file"]),
    ],
)
def test_wrong_names_are_answered_with_the_known_ones(
    root: Path, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(PipelineError) as caught:
        open_voc(root, **changes)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("2007_000001\n2007_000001\n", "2007_000001 is listed twice"),
        ("../2007_000001\n", "not an image id"),
    ],
)
def test_bad_splits_are_refused(root: Path, lines: str, message: str) -> None:
    (root / "ImageSets/Segmentation/val.txt").write_text(lines)
    with pytest.raises(PipelineError, match=rf"val\.txt: .*{message}"):
        open_voc(root)


def test_a_group_lies_within_the_split(root: Path) -> None:
    (root / "ImageSets/Segmentation/known.txt").write_text("2007_000002\n2007_000009\n")
    with pytest.raises(PipelineError, match=r"known\.txt: group 'seen'.*2007_000009"):
        open_voc(root, groups={"seen": "known"})


def test_a_label_id_above_the_categories_is_refused(root: Path) -> None:
    first = next(iter(open_voc(root, categories=["cat"])))
    with pytest.raises(PipelineError, match=r"2007_000001\.png: label id 2.* 1 categories"):
        first.semantic()


def test_masks_of_different_sizes_are_refused(root: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "SegmentationObject/2007_000001.png")
    first = next(iter(open_voc(root)))
    with pytest.raises(PipelineError, match=r"SegmentationObject.*5x4 pixels.*6x4"):
        first.instances()


def test_an_object_has_the_category_of_most_of_its_pixels(root: Path) -> None:
    semantic = np.array([[1, 2, 2, 0], [2, 1, 255, 0]], np.uint8)
    objects = np.array([[1, 1, 1, 0], [1, 1, 255, 0]], np.uint8)
    for folder, content in (("SegmentationClass", semantic), ("SegmentationObject", objects)):
        Image.fromarray(content).save(root / folder / "2007_000001.png")
    (target,) = next(iter(open_voc(root))).instances()
    assert target.label_id == 2
    np.testing.assert_array_equal(target.mask, objects == 1)


def test_masks_that_hold_colours_or_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(PipelineError, match="mode RGB; expected label ids as palette indices"):
        read_index_png(path)
    whole = encoded_image(Image.fromarray(np.arange(4096).reshape(64, 64).astype(np.uint8)))
    for content in (b"", b"not a picture", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(PipelineError, match=r"mask\.png: not a readable PNG"):
            read_index_png(path)


def test_values_that_a_palette_cannot_hold_are_refused(tmp_path: Path) -> None:
    writer = VocWriter(tmp_path)
    with pytest.raises(ValueError, match="300"):
        writer.add("a", b"", np.array([[300]]), np.array([[0]]))
    with pytest.raises(ValueError, match="differ"):
        writer.add("a", b"", np.zeros((2, 2), int), np.zeros((2, 3), int))


def test_a_byte_order_mark_is_no_part_of_the_first_id(root: Path) -> None:
    path = root / "ImageSets/Segmentation/val.txt"
    expected = [example.image_id for example in open_voc(root)]
    path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert [example.image_id for example in open_voc(root)] == expected
    path.write_text("", encoding="utf-8-sig")
    with pytest.raises(PipelineError, match=r"val\.txt: empty"):
        open_voc(root)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_split_in_utf_16_says_what_to_save_it_as(root: Path, encoding: str) -> None:
    path = root / "ImageSets/Segmentation/val.txt"
    path.write_text(path.read_text(), encoding=encoding)
    with pytest.raises(
        PipelineError, match=r"val\.txt: not a text file in UTF-8.*save it as UTF-8"
    ):
        open_voc(root)


def test_a_split_that_is_no_text_is_named(root: Path) -> None:
    (root / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match=r"val\.txt: not a text file"):
        open_voc(root)
