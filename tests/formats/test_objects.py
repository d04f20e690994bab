from __future__ import annotations

import numpy as np
import pytest

from pipeline.formats.images import ImageError, decode_png, encode_png
from pipeline.formats.objects import decode_objects, encode_objects


def masks(*columns: slice, shape: tuple[int, int] = (3, 8)) -> np.ndarray:
    found = np.zeros((len(columns), *shape), bool)
    for mask, part in zip(found, columns, strict=True):
        mask[:, part] = True
    return found


def test_one_object_or_none_is_the_file_of_its_mask() -> None:
    one, none = masks(slice(2, 5)), masks(slice(0, 0))
    assert encode_objects(one) == encode_png(one[0])
    assert encode_objects(none) == encode_png(none[0])
    # Nothing is left of the others.
    hidden = masks(slice(2, 5), slice(3, 4), slice(0, 0))
    assert encode_objects(hidden) == encode_png(one[0])
    np.testing.assert_array_equal(decode_objects(encode_objects(one)), one[0])
    assert not decode_objects(encode_objects(none)).any()


def test_several_objects_have_numbers_and_the_first_keeps_what_it_shares() -> None:
    data = encode_objects(masks(slice(0, 4), slice(0, 2), slice(3, 7)))
    expected = np.tile(np.array([1, 1, 1, 1, 2, 2, 2, 0], np.uint8), (3, 1))
    np.testing.assert_array_equal(decode_objects(data), expected)
    np.testing.assert_array_equal(decode_png(data), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 2)])
def test_any_size_comes_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, shape)
    numbers.ravel()[: min(2, numbers.size)] = [1, 2][: min(2, numbers.size)]
    stack = numbers == np.arange(1, 4)[:, None, None]
    np.testing.assert_array_equal(decode_objects(encode_objects(stack)), numbers)


def test_masks_of_others_are_one_object() -> None:
    """Such as one with soft edges, whose values are no numbers."""
    soft = np.array([[0, 2, 128, 255]], np.uint8)
    np.testing.assert_array_equal(decode_objects(encode_png(soft)), [[0, 1, 1, 1]])


def test_more_than_three_and_damage_are_errors() -> None:
    with pytest.raises(ValueError, match="4 objects, at most 3"):
        encode_objects(np.ones((4, 2, 2), bool))
    with pytest.raises(ImageError):
        decode_objects(b"no PNG")
