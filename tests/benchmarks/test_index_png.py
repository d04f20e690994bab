"""Label maps in index PNGs: PASCAL Context's layout, other values, other kinds of PNG."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks import open_bench
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from tests.benchmarks.fixtures import (
    CONTEXT_CATEGORIES,
    save_jpeg,
    save_png,
    save_text,
    write_context,
)

CONTEXT = {
    "format": "index_png",
    "split": "val",
    "categories": CONTEXT_CATEGORIES,
    "images": "JPEGImages",
    "labels": "SegmentationClassContext",
    "image_list": "ImageSets/SegmentationContext/{split}.txt",
}
LABELS = "SegmentationClassContext/2008_000002.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_context(tmp_path / "VOC2010")
    return tmp_path / "VOC2010"


def open_context(root: Path, **changes: object):
    arguments: dict[str, Any] = {**CONTEXT, "root": root, **changes}
    return open_bench(**arguments)


def first_map(root: Path, **changes: object) -> list[list[int]]:
    return next(iter(open_context(root, **changes))).semantic().tolist()


def test_reads_context_as_mmsegmentation_lays_it_out(tmp_path: Path) -> None:
    expected = write_context(tmp_path)
    bench = open_context(tmp_path, groups={"seen": "train"})
    examples = list(bench)

    assert len(bench) == 3
    assert bench.categories == CONTEXT_CATEGORIES
    assert bench.groups == {"seen": frozenset({"2008_000003"})}
    assert [example.image_id for example in examples] == list(expected)
    for example in examples:
        labels = example.semantic()
        assert labels.dtype == np.int16
        np.testing.assert_array_equal(labels, expected[example.image_id])
        np.testing.assert_array_equal(example.void(), labels == -1)
        image = load_image(example.image_path)
        assert (image.height, image.width) == labels.shape
        assert image.mode == "RGB"
        assert example.vocabulary is None


def test_a_label_map_has_no_objects(root: Path) -> None:
    with pytest.raises(PipelineError, match=r"2008_000002\.png: .*remove `instance`"):
        next(iter(open_context(root))).instances()


def test_values_choose_the_categories_and_the_rest_is_other(root: Path) -> None:
    chosen = {"categories": ["wood", "bag"], "values": [3, 1]}
    assert first_map(root, **chosen) == [[2, 0, 0, 0], [0, 0, 1, -1]]
    assert first_map(root, **chosen, other="void") == [[2, -1, -1, -1], [-1, -1, 1, -1]]


def test_zero_can_be_void_and_void_values_can_be_other(root: Path) -> None:
    assert first_map(root, other="void") == [[1, 2, 2, -1], [-1, 2, 3, -1]]
    assert first_map(root, values=[1, 2, 3], void_values=[]) == [[1, 2, 2, 0], [0, 2, 3, 0]]


def test_zero_can_be_a_category(root: Path) -> None:
    mapped = {"categories": ["ground", "bag"], "values": [0, 1], "other": "void"}
    assert first_map(root, **mapped) == [[2, -1, -1, 1], [1, -1, -1, -1]]


def test_an_unmapped_value_beyond_the_categories_is_named(root: Path) -> None:
    with pytest.raises(PipelineError, match=r"2008_000002\.png: pixel value 3 .* the 2 label ids"):
        first_map(root, categories=["bag", "sky"])
    with pytest.raises(PipelineError, match=r"2008_000002\.png: pixel value 255"):
        first_map(root, void_values=[])


def test_palettes_and_16_bits_are_read_alike(root: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    palette.save(root / LABELS)
    assert first_map(root) == [[0, 1, 2]]

    save_png(root / LABELS, np.array([[0, 300, 65535]], np.uint16))
    wide = {"categories": [str(n) for n in range(1, 401)], "void_values": [65535]}
    assert first_map(root, **wide) == [[0, 300, -1]]


@pytest.mark.parametrize(
    ("depth", "row", "expected"),
    [(1, 0b10100000, [1, 0, 1]), (2, 0b11011000, [3, 1, 2])],
)
def test_greys_of_few_bits_are_not_spread(
    root: Path, depth: int, row: int, expected: list[int]
) -> None:
    (root / LABELS).write_bytes(grey_png(3, depth, bytes([row])))
    assert first_map(root) == [expected]


def grey_png(width: int, depth: int, row: bytes) -> bytes:
    """A gray PNG of one row with `depth` bits a pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def test_a_label_map_in_colours_is_refused(root: Path) -> None:
    Image.new("RGB", (4, 2)).save(root / LABELS)
    with pytest.raises(PipelineError, match=r"2008_000002\.png: a PNG of mode RGB; expected label"):
        first_map(root)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_broken_label_map_is_named(root: Path, content: bytes) -> None:
    (root / LABELS).write_bytes(content)
    with pytest.raises(PipelineError, match=r"2008_000002\.png: not a readable PNG") as error:
        first_map(root)
    assert "0x" not in str(error.value)


def test_without_a_list_every_label_map_counts(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_jpeg(tmp_path / f"images/val/{name}.jpeg", (1, 2), "RGB")
        save_png(tmp_path / f"labels/val/{name}_ids.png", np.array([[1, 0]], np.uint8))
    save_jpeg(tmp_path / "images/val/unlabelled.jpeg", (1, 2), "RGB")
    save_text(tmp_path / "labels/val/._a_ids.png", "a file of macOS")
    save_text(tmp_path / "easy.txt", "b")
    bench = open_bench(
        format="index_png",
        root=tmp_path,
        split="val",
        categories=["bag"],
        groups={"easy": "easy.txt"},
        images="images/{split}",
        labels="labels/{split}",
        image_suffix=".jpeg",
        label_suffix="_ids.png",
    )
    assert [example.image_id for example in bench] == ["a", "b"]
    assert bench.groups == {"easy": frozenset({"b"})}
    assert next(iter(bench)).semantic().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"SegmentationContext/test\.txt: no such file; .*train, val"),
        ({"images": "Images"}, r"/Images: no such folder"),
        ({"labels": "Labels"}, r"/Labels: no such folder"),
        ({"label_suffix": "_x.png"}, r"2008_000002_x\.png: no such file, but .*val\.txt"),
        ({"label_suffix": "_x.png", "image_list": ""}, r"Context: no file ends with '_x\.png'"),
        ({"image_suffix": ".JPEG"}, r"2008_000002\.JPEG: no such file"),
        ({"groups": {"seen": "all"}}, r"all\.txt: no such file"),
        ({"values": [1, 2]}, "values: 2 pixel values for 3 categories"),
        ({"values": [1, 2, 2]}, "pixel value 2 stands for two label ids"),
        ({"values": [1, 2, 255]}, "pixel value 255 stands for two label ids, or for one and void"),
        ({"values": [1, 2, 65536]}, "pixel value 65536: expected 0 to 65535"),
        ({"void_values": [-1]}, "pixel value -1: expected 0 to 65535"),
    ],
)
def test_what_does_not_fit_is_named_at_opening(
    root: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        open_context(root, **changes)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="nowhere: no such folder"):
        open_context(tmp_path / "nowhere")
