"""Our reader of MATLAB's files beside scipy's writer."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.importers.matlab import read_field

ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.zeros((1, 1), np.uint8),
    np.zeros((0, 4), np.uint8),
    np.arange(24, dtype=np.int16).reshape(2, 3, 4) - 9,
    np.array([[0.5, -1.5]]),
    np.array([[2**40]]),
    np.array([[1.5]], np.float32),
]


def mat(content: dict[str, Any], *, compressed: bool) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_of_structs_are_read(array: np.ndarray, compressed: bool) -> None:
    fields = {"a_much_longer_name": np.ones((5, 5)), "B": array, "text": "words", "C": array + 1}
    content = mat({"other": np.eye(3), "S": fields}, compressed=compressed)
    for name, expected in (("B", array), ("C", array + 1)):
        found = read_field(content, "S", name)
        assert found.shape == expected.shape
        assert (found == expected).all()


def test_a_cell_around_an_array_is_looked_into() -> None:
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = np.array([[7, 8]])
    assert read_field(mat({"S": {"B": cell}}, compressed=True), "S", "B").tolist() == [[7, 8]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"T": {"B": 1}}, "no variable S"),
        ({"S": {"A": 1}}, "no field B"),
        ({"S": np.eye(2)}, "not a struct of one"),
        ({"S": np.array([({1: 2},), ({3: 4},)], dtype=[("B", object)])}, "not a struct of one"),
        ({}, "no variable S"),
    ],
)
def test_what_is_not_there_is_said(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_field(mat(content, compressed=False), "S", "B")


@pytest.mark.parametrize("content", [b"", b"MATLAB", b"MATLAB 7.3 MAT-file".ljust(600), bytes(600)])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a MATLAB file of version 5"):
        read_field(content, "S", "B")


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_of_any_kind_is_an_exception(compressed: bool) -> None:
    whole = mat({"S": {"A": np.eye(2), "B": ARRAYS[0]}}, compressed=compressed)
    rng = random.Random(0)
    for length in range(len(whole)):
        with pytest.raises(ValueError):  # noqa: PT011 any reason
            read_field(whole[:length], "S", "B")
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 14, 15, rng.randrange(256)))
        try:
            found = read_field(bytes(damaged), "S", "B")
        except ValueError:
            continue
        assert isinstance(found, np.ndarray)


def test_data_that_inflate_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.importers.matlab.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="too large"):
        read_field(mat({"S": {"B": np.zeros((50, 50))}}, compressed=True), "S", "B")
