"""Benchmarks of which some categories are scored, in each layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmarks.opening import open_benchmark
from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.params.reading import parse_bench
from tests.benchmarks.fixtures import (
    COCA_CATEGORIES,
    CONTEXT_CATEGORIES,
    CUB_CATEGORIES,
    IMAGENET_S_CATEGORIES,
    VOC_CATEGORIES,
    Maps,
    write_coca,
    write_context,
    write_cub,
    write_imagenet_s,
    write_voc,
)

CONTEXT = {
    "format": "index_png",
    "images": "JPEGImages",
    "labels": "SegmentationClassContext",
    "image_list": "ImageSets/SegmentationContext/{split}.txt",
}


@pytest.mark.parametrize(
    ("write", "layout", "categories", "scored"),
    [
        (write_voc, {"format": "voc"}, VOC_CATEGORIES, ["dog"]),
        (write_voc, {"format": "voc"}, VOC_CATEGORIES, ["dog", "cat"]),
        (write_context, CONTEXT, CONTEXT_CATEGORIES, ["wood", "bag"]),
        (write_coca, {"format": "coca"}, COCA_CATEGORIES, COCA_CATEGORIES[1:]),
        (
            write_imagenet_s,
            {"format": "imagenet_s"},
            IMAGENET_S_CATEGORIES,
            ["category 257", "category 300", "category 2"],
        ),
        (write_cub, {"format": "cub"}, CUB_CATEGORIES, CUB_CATEGORIES),
    ],
)
def test_labels_of_other_categories_are_background(
    tmp_path: Path,
    write: Callable[[Path], Maps],
    layout: dict[str, Any],
    categories: list[str],
    scored: list[str],
) -> None:
    maps = write(tmp_path)
    entry = {**layout, "root": str(tmp_path), "categories": categories, "scored": scored}
    benchmark = open_benchmark("some", parse_bench(entry, "some", name="some.yaml"), ())
    assert benchmark.categories == scored
    assert len(benchmark) == len(maps)
    for example in benchmark:
        whole = maps[example.image_id]
        expected = np.zeros_like(whole)
        for label_id, name in enumerate(scored, start=1):
            expected[whole == 1 + categories.index(name)] = label_id
        expected[whole == IGNORE_INDEX] = IGNORE_INDEX
        found = example.semantic()
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == whole.dtype


def test_objects_of_other_categories_are_none(tmp_path: Path) -> None:
    write_voc(tmp_path)
    entry = {
        "format": "voc",
        "root": str(tmp_path),
        "categories": VOC_CATEGORIES,
        "scored": ["dog"],
        "groups": {"seen": "known"},
    }
    benchmark = open_benchmark("some", parse_bench(entry, "some", name="some.yaml"), ())
    first, second, third = benchmark
    assert benchmark.groups == {"seen": frozenset({"2007_000002"})}
    assert [target.label_id for target in first.instances()] == [1, 1]  # the cat is gone
    assert second.instances() == []
    assert [target.label_id for target in third.instances()] == [1]
    assert first.void().sum() == 3  # void beside the cat stays void
    assert first.image_path.is_file()


def test_a_list_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    entry = {"format": "voc", "root": str(tmp_path), "scored": "cat"}
    with pytest.raises(PipelineError, match=r"some.yaml: benches.some.scored: .*got 'cat'"):
        parse_bench(entry, "some", name="some.yaml")
