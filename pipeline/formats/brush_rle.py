"""Label Studio's run-length code of a brushed mask: bits of a run-length pack of RGBA pixels.

The code is a list of bytes. Its bits, the highest of a byte first: 32 of the number of values, 5 of
the bits of a value less 1, four times 4 of the bits of a run's length less 1; then runs: a bit that
says whether one value is repeated, 2 that say which of the four lengths follows, the length less 1,
and the value, or as many values as are in the run. (The format is that of `@thi.ng/rle-pack`.)
What is written here has runs of one value only, four equal ones a pixel: 0, or 255 inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN_BITS = (3, 4, 8, 16)
CHANNELS, ALPHA = 4, 3
OPAQUE = 128
INSIDE = 255
VALUE_BITS = 8
LONGEST_RUN = 1 << RUN_BITS[-1]


def encode_brush(mask: NDArray[np.bool_]) -> list[int]:
    """Bytes of the code of a mask (H, W) with at least one pixel in all."""
    values = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    lengths = np.diff(starts, append=values.size) * CHANNELS
    bits = [
        f"{values.size * CHANNELS:032b}{VALUE_BITS - 1:05b}",
        *(f"{size - 1:04b}" for size in RUN_BITS),
    ]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = INSIDE if values[start] else 0
        whole, rest = divmod(length, LONGEST_RUN)
        bits += [_run(LONGEST_RUN, value)] * whole
        if rest:
            bits.append(_run(rest, value))
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _run(length: int, value: int) -> str:
    """Bits of a run of one value, its length in the fewest bits that hold it."""
    which = next(i for i, bits in enumerate(RUN_BITS) if length <= 1 << bits)
    return f"1{which:02b}{length - 1:0{RUN_BITS[which]}b}{value:0{VALUE_BITS}b}"


def decode_brush(code: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Mask (H, W) of a code: the pixels that are more opaque than not.

    Raises:
        ValueError: not such a code, cut short, or of another size.
    """
    if not isinstance(code, list) or not all(type(it) is int and 0 <= it < 256 for it in code):
        raise ValueError("its brush is not a list of bytes")
    bits = _Bits(np.unpackbits(np.array(code, dtype=np.uint8)))
    count, value_bits = bits.number(32), bits.number(5) + 1
    if count != CHANNELS * size[0] * size[1]:
        raise ValueError(
            f"its brush has {count} values, an image of {size[1]}x{size[0]} pixels "
            f"{CHANNELS * size[0] * size[1]}"
        )
    if value_bits != VALUE_BITS:
        raise ValueError(f"its brush has values of {value_bits} bits, not {VALUE_BITS}")
    length_bits = [bits.number(4) + 1 for _ in range(4)]
    values, start = np.zeros(count, dtype=np.uint8), 0
    while start < count:
        is_repeated = bits.number(1)
        end = start + 1 + bits.number(length_bits[bits.number(2)])
        if end > count:
            raise ValueError("its brush has more values than it says")
        values[start:end] = bits.bytes(1 if is_repeated else end - start)
        start = end
    return values.reshape(*size, CHANNELS)[..., ALPHA] >= OPAQUE


class _Bits:
    """Bits that are read from the front."""

    def __init__(self, bits: NDArray[np.uint8]) -> None:
        self._bits = bits
        self._position = 0

    def number(self, length: int) -> int:
        """The next bits as a number, the highest first."""
        return int("".join(map(str, self._take(length).tolist())), 2)

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """The next bytes."""
        return np.packbits(self._take(VALUE_BITS * count))

    def _take(self, length: int) -> NDArray[np.uint8]:
        taken = self._bits[self._position : self._position + length]
        if len(taken) < length:
            raise ValueError("its brush is cut short")
        self._position += length
        return taken
