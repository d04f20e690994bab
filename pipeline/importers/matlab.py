"""Arrays in structs of MATLAB's files of version 5 (MAT-File Format, chapter 1).

Such files hold arrays and text, no code. `scipy.io.loadmat` reads them too, but a damaged one can
make it bring down the interpreter; here damage of any kind is an exception.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

HEADER_BYTES = 128
BYTE_ORDERS = {b"IM": "<", b"MI": ">"}
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT = 1, 2
MAX_BYTES = 1 << 28

Element = tuple[int, bytes]


def read_field(content: bytes, variable: str, field: str) -> np.ndarray:
    """The array in a field of a variable, a struct of one element.

    Args:
        content: of the file.
        variable: its name.
        field: name of the field; a cell around its array is looked into.

    Returns:
        The array, in the type that it is stored in, which may be smaller than its class.

    Raises:
        ValueError: damaged, of another version, or without such a field.
    """
    try:
        order = BYTE_ORDERS.get(content[HEADER_BYTES - 2 : HEADER_BYTES])
        if order is None:
            raise ValueError("not a MATLAB file of version 5")
        for kind, data in _elements(content[HEADER_BYTES:], order):
            (matrix,) = _elements(_inflate(data), order) if kind == COMPRESSED else ((kind, data),)
            if _name(matrix, order) == variable:
                return _array(_field(matrix, field, order), order)
    except (struct.error, zlib.error, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"damaged: {error}") from None
    raise ValueError(f"no variable {variable}")


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    inflated = inflater.decompress(data, MAX_BYTES)
    if not inflater.eof:
        raise ValueError("compressed data are cut off, or too large")
    return inflated


def _elements(data: bytes, order: str) -> Iterator[Element]:
    """Type and data of one element after the other."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        start, end = place + 8, place + 8 + size
        if kind >> 16:  # up to four bytes lie beside a short type and size
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = place + 4, place + 4 + size
        if end > len(data) or (start == place + 4 and size > 4):
            raise ValueError("cut off")
        yield kind, data[start:end]
        # All but compressed elements end where a multiple of eight bytes does.
        place = end if kind == COMPRESSED else place + 8 * math.ceil((end - place) / 8)


def _parts(matrix: Element, order: str) -> tuple[int, list[Element]]:
    """Class of a matrix, and the elements that it is made of."""
    kind, data = matrix
    if kind != MATRIX:
        raise ValueError(f"an element of type {kind} in place of a matrix")
    flags, *parts = _elements(data, order)
    return int(_numbers(flags, order)[0]) & 0xFF, parts


def _name(matrix: Element, order: str) -> str:
    _, (_, (_, name), *_) = _parts(matrix, order)
    return name.decode("latin-1")


def _field(struct_matrix: Element, field: str, order: str) -> Element:
    kind, parts = _parts(struct_matrix, order)
    if kind != STRUCT or _numbers(parts[0], order).prod() != 1:
        raise ValueError("not a struct of one element")
    _, _, length, (_, text), *values = parts
    size = int(_numbers(length, order)[0])
    names = [text[i : i + size].partition(b"\0")[0] for i in range(0, len(text), size)]
    if field.encode() not in names:
        raise ValueError(f"no field {field}")
    return values[names.index(field.encode())]


def _array(matrix: Element, order: str) -> np.ndarray:
    kind, (dims, _, first, *_) = _parts(matrix, order)
    if kind == CELL:
        return _array(first, order)
    return _numbers(first, order).reshape(_numbers(dims, order), order="F")


def _numbers(element: Element, order: str) -> np.ndarray:
    kind, data = element
    return np.frombuffer(data, dtype=order + NUMBERS[kind])
