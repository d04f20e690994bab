"""The shipped benchmark entries: valid, and of the categories and splits that papers report on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline import presets
from pipeline.benchmarks import READERS, open_bench
from pipeline.benchmarks.opening import open_truth
from pipeline.benchmarks.voc import VocWriter
from pipeline.params.benches import FORMATS, BenchParams
from pipeline.params.reading import parse_params
from pipeline.vocabulary.categories import load_category_set
from tests.benchmarks.fixtures import (
    COCA_CATEGORIES,
    CONTEXT_CATEGORIES,
    IMAGENET_S_CATEGORIES,
    VOC_CATEGORIES,
    Maps,
    save_jpeg,
    save_png,
    write_coca,
    write_context,
    write_cub,
    write_imagenet_s,
    write_voc,
)

FILES = {path.stem: path for path in Path(presets.__file__).parent.glob("benches/*.yaml")}

# Format, split, number of categories, whether background counts, what is scored.
PROTOCOLS: dict[str, tuple[str, str, int, bool, list[str]]] = {
    "voc": ("voc", "trainval", 20, True, ["semantic", "instance"]),
    "voc_val": ("voc", "val", 20, True, ["semantic", "instance"]),
    "voc20": ("voc", "val", 20, False, ["semantic"]),
    "voc_unseen": ("voc", "val", 20, False, ["semantic"]),
    "context59": ("index_png", "val", 59, False, ["semantic"]),
    "context60": ("index_png", "val", 59, True, ["semantic"]),
    "context_unseen": ("index_png", "val", 59, True, ["semantic"]),
    "coca": ("coca", "val", 80, True, ["semantic"]),
    "imagenet_s50": ("imagenet_s", "validation", 50, True, ["semantic", "size"]),
    "imagenet_s300": ("imagenet_s", "validation", 300, True, ["semantic", "size"]),
    "imagenet_s919": ("imagenet_s", "validation", 919, True, ["semantic", "size"]),
    "imagenet_s50_test": ("imagenet_s", "test", 50, True, ["semantic", "size"]),
    "imagenet_s300_test": ("imagenet_s", "test", 300, True, ["semantic", "size"]),
    "imagenet_s919_test": ("imagenet_s", "test", 919, True, ["semantic", "size"]),
    "cub": ("cub", "test", 1, True, ["semantic"]),
    "cub_breed": ("cub", "test", 1, True, ["semantic"]),
}
# Presets that read a fixture as it is, but for its category list.
WRITERS: dict[str, tuple[Callable[[Path], Maps], list[str]]] = {
    "voc_val": (write_voc, VOC_CATEGORIES),
    "voc20": (write_voc, VOC_CATEGORIES),
    "voc_unseen": (write_voc, VOC_CATEGORIES),
    "context59": (write_context, CONTEXT_CATEGORIES),
    "context60": (write_context, CONTEXT_CATEGORIES),
    "context_unseen": (write_context, CONTEXT_CATEGORIES),
    "coca": (write_coca, COCA_CATEGORIES),
    "imagenet_s300": (write_imagenet_s, IMAGENET_S_CATEGORIES),
    "cub": (write_cub, ["bird"]),
    "cub_breed": (write_cub, ["bird"]),
}


def read_bench(name: str) -> BenchParams:
    content: Any = YAML(typ="safe", pure=True).load(FILES[name].read_text(encoding="utf-8"))
    params = parse_params(
        {"categories": "voc", "index": {"x": {"root": "x"}}, "benches": {name: content}}
    )
    return params.benches[name]


def test_every_format_has_a_reader() -> None:
    assert set(READERS) == set(FORMATS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_entry_is_valid_and_says_in_its_first_line_what_it_is(name: str) -> None:
    first, second, *_ = FILES[name].read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")
    assert second == "#"
    bench = read_bench(name)
    assert not bench.root.is_absolute()
    assert bench.root.parts[:2] == ("data", "raw")
    assert set(bench.unseen) < set(load_category_set(bench.categories))
    assert len(set(bench.unseen)) == len(bench.unseen)
    if bench.format == "index_png" and bench.values:
        assert len(bench.values) == len(load_category_set(bench.categories))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_entry_has_its_papers_protocol(name: str) -> None:
    bench = read_bench(name)
    found = (
        bench.format,
        bench.split,
        len(load_category_set(bench.categories)),
        bench.background,
        list(bench.metrics),
    )
    expected = PROTOCOLS[name]
    assert found[:1] + found[2:] == expected[:1] + expected[2:]
    assert bench.format == "coca" or found[1] == expected[1]


DENSECLIP = {
    "voc20": "voc_denseclip",
    "voc_unseen": "voc_denseclip",
    "context59": "context",
    "context_unseen": "context",
    "coco_stuff": "coco_stuff",
    "stuff_unseen": "coco_stuff",
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_denseclips_benchmarks_alone_follow_its_code(name: str) -> None:
    bench = read_bench(name)
    found = (bench.rounding, bench.corruption_channels)
    assert found == (("half_up", "bgr") if name in DENSECLIP else ("down", "rgb"))
    if name in DENSECLIP:
        assert bench.categories == DENSECLIP[name]


def test_unseen_categories_are_those_of_denseclip() -> None:
    assert read_bench("voc_unseen").unseen == [
        "potted plant",
        "sheep",
        "sofa",
        "train",
        "tv monitor",
    ]
    assert len(read_bench("context_unseen").unseen) == 10


def test_only_large_images_of_imagenet_s_are_shrunk() -> None:
    for name, bench in ((name, read_bench(name)) for name in PROTOCOLS if "imagenet" in name):
        assert (name, bench.max_side, bench.resize_to) == (name, 1024, None)


def test_birds_are_asked_for_by_two_kinds_of_names() -> None:
    assert read_bench("cub").layout() == {"names": "bird"}
    assert read_bench("cub_breed").layout() == {"names": "breed"}


@pytest.mark.parametrize("name", WRITERS)
def test_an_entry_opens_what_the_data_set_looks_like(tmp_path: Path, name: str) -> None:
    write, categories = WRITERS[name]
    expected, bench = write(tmp_path), read_bench(name)
    benchmark = open_bench(
        format=bench.format,
        root=tmp_path,
        split=bench.split,
        categories=categories,
        groups=bench.groups,
        **bench.layout(),
    )
    assert {example.image_id: example.semantic().tolist() for example in benchmark} == {
        image_id: labels.tolist() for image_id, labels in expected.items()
    }


def write_voc_split(root: Path, split: str) -> None:
    """Two masks of palette indices, one of them void; no masks of objects."""
    write_voc(root)
    for path in (root / "SegmentationObject").iterdir():
        path.unlink()
    VocWriter(root).write_split(split, ["2007_000003", "2007_000001"])


def write_context_split(root: Path, split: str) -> None:
    write_context(root)
    path = root / f"ImageSets/SegmentationContext/{split}.txt"
    path.write_text("2010_000004\n2008_000002\n")


def write_stuff_split(root: Path, split: str) -> None:
    for image_id, values in (("000000000009", [[0, 181, 255]]), ("000000000025", [[65, 12]])):
        save_jpeg(root / f"images/{split}/{image_id}.jpg", np.shape(values), "RGB")
        save_png(root / f"annotations/{split}/{image_id}.png", np.array(values, np.uint8))
    save_jpeg(root / "images/val2017/000000000001.jpg", (1, 1), "RGB")
    save_png(root / "annotations/val2017/000000000001.png", np.zeros((1, 1), np.uint8))


VOC_MAPS = [[[2], [0], [0]], [[1, -1, 2, 2, 2, 2], [-1, -1, 2, 2, 2, 2], [0] * 6, [0] * 6]]
CONTEXT_MAPS = [[[3]], [[1, 2, 2, 0], [0, 2, 3, -1]]]
STUFF_MAPS = [[[1, 171, -1]], [[-1, 12]]]


@pytest.mark.parametrize(
    ("name", "split", "write", "expected"),
    [
        *(
            (name, split, write_voc_split, VOC_MAPS)
            for name in ("voc", "voc_val", "voc20", "voc_unseen")
            for split in ("train", "trainaug")
        ),
        *(
            (name, "train", write_context_split, CONTEXT_MAPS)
            for name in ("context59", "context60", "context_unseen")
        ),
        *(
            (name, "train2017", write_stuff_split, STUFF_MAPS)
            for name in ("coco_stuff", "stuff_unseen")
        ),
    ],
)
def test_an_entry_reads_the_images_for_training_by_its_split(
    tmp_path: Path,
    name: str,
    split: str,
    write: Callable[[Path, str], None],
    expected: list[list[list[int]]],
) -> None:
    write(tmp_path, split)
    bench = read_bench(name).model_copy(update={"root": tmp_path, "split": split})
    truth = open_truth(bench, ["background"], field="train.data")
    assert [example.semantic().tolist() for example in truth] == expected
