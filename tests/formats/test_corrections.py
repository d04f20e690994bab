"""The folder of corrected masks, and the maps that training makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.formats.corrections import (
    CorrectedObject,
    Correction,
    Corrections,
    fingerprint,
    write_corrections,
)
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.rle import encode_mask

V = IGNORE_INDEX
IDS = {"cat": 1, "dog": 2}
A, B = "a" * 64, "b" * 64


def thing(category: str, rows: list[list[int]]) -> CorrectedObject:
    return CorrectedObject(category, encode_mask(np.array(rows, dtype=bool)))


def correction(sha256: str = A, *objects: CorrectedObject, void: Any = None) -> Correction:
    return Correction(sha256, f"{sha256[0]}.jpg", (2, 3), list(objects), void)


CAT = thing("cat", [[1, 1, 1], [1, 1, 1]])
DOG = thing("dog", [[0, 1, 1], [0, 0, 0]])


class TestMaps:
    def test_of_two_objects_at_a_pixel_the_smaller_one_is_seen(self) -> None:
        for objects in ((CAT, DOG), (DOG, CAT)):
            semantic, numbers = correction(A, *objects).maps(IDS)
            assert semantic.tolist() == [[1, 2, 2], [1, 1, 1]]
            assert numbers.tolist() == [[1, 2, 2], [1, 1, 1]]

    def test_void_and_unknown_names_are_void_and_of_no_object(self) -> None:
        void = encode_mask(np.array([[0, 0, 1], [0, 0, 1]], dtype=bool))
        semantic, numbers = correction(
            A, CAT, thing("tree", [[0, 1, 1], [0, 0, 0]]), void=void
        ).maps(IDS)
        assert semantic.tolist() == [[1, V, V], [1, 1, V]]
        assert numbers.tolist() == [[1, 0, 0], [1, 1, 0]]

    def test_background_is_none_wherever_it_is_smaller(self) -> None:
        hole = thing("background", [[0, 1, 0], [0, 0, 0]])
        semantic, numbers = correction(A, CAT, hole).maps(IDS)
        assert semantic.tolist() == numbers.tolist() == [[1, 0, 1], [1, 1, 1]]
        assert correction(A, hole).is_empty
        assert not correction(A, CAT, hole).is_empty

    def test_an_object_that_a_smaller_size_loses_has_no_number(self) -> None:
        speck = thing("cat", [[1, 0, 0], [0, 0, 0]])
        semantic, numbers = correction(A, speck, DOG).maps(IDS, (1, 1))
        assert (semantic.tolist(), numbers.tolist()) == ([[0]], [[0]])
        semantic, numbers = correction(A, CAT, speck, DOG).maps(IDS, (4, 6))
        assert semantic[:2].tolist() == [[1, 1, 2, 2, 2, 2]] * 2
        assert numbers.max() == 3

    def test_no_object_is_background_all_over(self) -> None:
        semantic, numbers = correction().maps(IDS)
        assert not semantic.any()
        assert not numbers.any()
        assert correction().is_empty


class TestCorrections:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        void = encode_mask(np.array([[0, 0, 1], [0, 0, 1]], dtype=bool))
        first, second = correction(B, CAT, DOG, void=void), correction(A)
        write_corrections(tmp_path / "c", [first])
        write_corrections(tmp_path / "c", [second])
        read = Corrections(tmp_path / "c")
        assert list(read) == [second, first]
        assert (read.get(A), read.get("c" * 64)) == (second, None)

    def test_another_import_replaces_its_images_and_leaves_the_others(self, tmp_path: Path) -> None:
        write_corrections(tmp_path, [correction(A, CAT), correction(B, DOG)])
        before = fingerprint(Corrections(tmp_path))
        write_corrections(tmp_path, [correction(A)])
        assert list(Corrections(tmp_path)) == [correction(A), correction(B, DOG)]
        assert fingerprint(Corrections(tmp_path)) != before

    def test_the_same_corrections_are_the_same_bytes(self, tmp_path: Path) -> None:
        pair = [correction(A, CAT), correction(B, DOG)]
        write_corrections(tmp_path / "a", pair)
        write_corrections(tmp_path / "b", pair[::-1])
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def test_no_folder_and_the_shipped_one_have_none(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for folder in (None, tmp_path / "none", tmp_path / "empty"):
            assert len(Corrections(folder)) == 0

    @pytest.mark.parametrize("content", ["[]", '{"images": {"../x": "a"}}', '{"images": 1}'])
    def test_a_manifest_of_something_else_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(PipelineError, match="manifest of corrections; take it from git"):
            Corrections(tmp_path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        write_corrections(tmp_path, [correction(A, CAT)])
        (tmp_path / f"{A}.json").unlink()
        with pytest.raises(
            PipelineError, match=rf"{A}\.json: listed in manifest.json, but missing"
        ):
            Corrections(tmp_path)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"size": [3, 2]}, "size"),
            ({"size": ["x", 2]}, "invalid literal"),
            (
                {"objects": [{"category": "cat", "mask": {"size": [2, 3], "counts": "05"}}]},
                "add up",
            ),
            (
                {"objects": [{"category": "cat", "mask": {"size": [2, 3], "counts": "6"}}]},
                "without a pixel",
            ),
            ({"objects": [{"mask": CAT.mask}]}, "category"),
            ({"void": 5}, "neither polygons nor"),
        ],
    )
    def test_a_damaged_file_is_refused(
        self, tmp_path: Path, change: dict[str, Any], reason: str
    ) -> None:
        write_corrections(tmp_path, [correction(A, CAT)])
        path = tmp_path / f"{A}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(PipelineError, match=f"not a correction .*({reason})"):
            Corrections(tmp_path)
