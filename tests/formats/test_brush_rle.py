"""Label Studio's code of a brushed mask, against codes written by its description."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest

from pipeline.formats.brush_rle import decode_brush

LENGTHS = (3, 4, 8, 16)  # bits of the lengths of runs, as Label Studio's own encoder has them


def encode(mask: np.ndarray, *, literal: bool = False) -> list[int]:
    """Code of a mask as the alpha of RGBA pixels, of repeated values or of single ones."""
    values = np.repeat(mask.astype(np.uint8)[..., None] * 255, 4, axis=2).ravel().tolist()
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{length - 1:04b}" for length in LENGTHS)
    bits += "".join(literal_runs(values) if literal else repeated_runs(values))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def repeated_runs(values: list[int]) -> Iterator[str]:
    for value, run in groupby(values):
        count = len(list(run))
        kind = next(i for i, length in enumerate(LENGTHS) if count <= 2**length)
        yield f"1{kind:02b}{count - 1:0{LENGTHS[kind]}b}{value:08b}"


def literal_runs(values: list[int]) -> Iterator[str]:
    for start in range(0, len(values), 16):
        run = values[start : start + 16]
        yield f"001{len(run) - 1:04b}" + "".join(f"{value:08b}" for value in run)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (20, 33)])
def test_masks_come_back(shape: tuple[int, int], literal: bool) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        mask = rng.random(shape) < share
        np.testing.assert_array_equal(decode_brush(encode(mask, literal=literal), shape), mask)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="24 values, an image of 2x4 pixels 32"):
        decode_brush(encode(np.ones((2, 3), bool)), (4, 2))


@pytest.mark.parametrize("code", [None, "abc", [1, 256], [1.0], [True] * 8])
def test_what_is_no_code_is_refused(code: object) -> None:
    with pytest.raises(ValueError, match="not a list of bytes"):
        decode_brush(code, (2, 3))


def test_a_code_that_is_cut_short_or_runs_over_is_refused() -> None:
    code = encode(np.eye(6, dtype=bool))
    for end in range(len(code) - 1):
        with pytest.raises(ValueError, match="cut short"):
            decode_brush(code[:end], (6, 6))
    over = (
        f"{4:032b}{7:05b}" + "".join(f"{length - 1:04b}" for length in LENGTHS) + "100111" + "1" * 8
    )
    over += "0" * (-len(over) % 8)
    with pytest.raises(ValueError, match="more values"):
        decode_brush([int(over[i : i + 8], 2) for i in range(0, len(over), 8)], (1, 1))
