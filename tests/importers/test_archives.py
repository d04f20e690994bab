"""Imports of published archives: what comes out, what the next stage makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.sources import sample_key
from pipeline.methods.masks import SpectralParams
from pipeline.params.base import EncoderParams
from pipeline.params.sources import SourceParams
from pipeline.stages import mask
from tests.formats.shard_folders import read_shards
from tests.importers.helpers import places


def test_published_archives_become_a_table_in_the_order_of_the_params(
    pool: SourceParams, import_archives: Callable
) -> None:
    theirs = "/home/author/datasets/pool"
    rows, stats = import_archives(
        {
            "dog": [f"{theirs}/5.jpg", f"{theirs}/gone.jpg", f"{theirs}/2.jpg"],
            "cat": [f"{theirs}/7.jpg", f"{theirs}/0.jpg"],
        },
        prefixes=[f"{theirs}={pool.root}"],
    )
    assert places(rows) == [
        ("cat", 1, "7.jpg"),
        ("cat", 2, "0.jpg"),
        ("dog", 1, "5.jpg"),
        ("dog", 3, "2.jpg"),
    ]
    assert [row.label_id for row in rows] == [1, 1, 2, 2]
    first = rows[0]
    assert first.key == sample_key("pool", "7.jpg")
    assert (first.source, first.path) == ("pool", str(pool.root / "7.jpg"))
    assert (first.member, first.offset) == (None, None)
    assert (first.width, first.height) == (27, 23)
    assert all(np.isnan(row.similarity) for row in rows)
    assert (stats["items"], stats["skipped"]) == (4, 1)
    assert stats["skipped_items"] == [{"item": f"{theirs}/gone.jpg", "reason": "no such image"}]


def test_only_the_first_k_are_taken_and_duplicates_once(
    pool: SourceParams, import_archives: Callable
) -> None:
    names = [f"{pool.root}/{name}" for name in ("1.jpg", "./1.jpg", "2.jpg", "3.jpg")]
    rows, stats = import_archives({"cat": names, "dog": ["3.jpg"]}, k=3)
    assert places(rows) == [("cat", 1, "1.jpg"), ("cat", 3, "2.jpg"), ("dog", 1, "3.jpg")]
    assert stats["counts"]["duplicates"] == 1


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (
            "all",
            [("cat", 1, "0.jpg"), ("cat", 2, "1.jpg"), ("dog", 1, "1.jpg"), ("dog", 2, "0.jpg")],
        ),
        ("last", [("dog", 1, "1.jpg"), ("dog", 2, "0.jpg")]),
        ("best", [("cat", 1, "0.jpg"), ("dog", 1, "1.jpg")]),
    ],
)
def test_images_of_several_categories_go_by_the_policy(
    import_archives: Callable, overlap: str, expected: list[tuple[str, int, str]]
) -> None:
    content = {"cat": ["0.jpg", "1.jpg"], "dog": ["1.jpg", "0.jpg"]}
    rows, stats = import_archives(content, overlap=overlap)
    assert places(rows) == expected
    assert stats["counts"]["dropped"] == 4 - len(expected)
    assert stats["counts"]["empty_archives"] == (overlap == "last")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"cat": [], "dog": []}, "all lists are empty"),
        (
            {"cat": ["0.jpg"], "cow": [], "sheep": []},
            r"lacks 'dog'; the params lack 'cow', 'sheep'",
        ),
        ({"dog": ["0.jpg"], "cat": [], "background": []}, "the params lack 'background'"),
        ({"dog": ["0.jpg"]}, "the file lacks 'cat'"),
        (["0.jpg"], "expected an object of category -> list of paths, found list"),
        ({"cat": "0.jpg", "dog": []}, "'cat': expected a list of image paths"),
        ({"cat": ["0.jpg", 3], "dog": []}, "'cat': expected a list of image paths"),
        ({"cat": ["/x/0.jpg"], "dog": []}, r"none of its 1 images .* /x/0\.jpg: no such image"),
    ],
)
def test_archives_that_do_not_fit_are_refused(
    tmp_path: Path, import_archives: Callable, content: Any, reason: str
) -> None:
    with pytest.raises(PipelineError, match=rf"category_to_p_images\.json: .*{reason}"):
        import_archives(content)
    assert not (tmp_path / "archives.parquet").exists()


def test_imported_archives_are_masked(
    tmp_path: Path, encoder: EncoderParams, runtime: Runtime, import_archives: Callable
) -> None:
    import_archives({"cat": ["3.jpg", "1.jpg"], "dog": ["0.jpg"]})
    mask.run(
        archives_path=tmp_path / "archives.parquet",
        out_dir=tmp_path / "masks",
        params=SpectralParams(encoder=encoder, clusters=[2], refine=False),
        runtime=runtime,
        stats_path=tmp_path / "mask.json",
    )
    samples = list(read_shards(tmp_path / "masks"))
    origins = [json.loads(sample["json"]) for sample in samples]
    assert [(origin["category"], origin["rank"]) for origin in origins] == [
        ("cat", 1),
        ("cat", 2),
        ("dog", 1),
    ]
    assert json.loads((tmp_path / "mask.json").read_text())["skipped"] == 0
