"""Label Studio's run-length code of brushes, which is `rle-pack` of thi.ng/umbrella.

A stream of bits, the highest of a byte first. Head: number of values (32 bits), bits of a value - 1
(5), four bit lengths of runs - 1 (4 each). Then runs: 1, which of the four lengths (2), values - 1
(that many bits), the value. A run whose first bit is 0, of values that differ, is never written
here. The values are the image's RGBA, row by row: four equal ones a pixel, 0 or 255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RUN_BITS = (3, 4, 8, 16)
VALUE_BITS = 8
CHANNELS = 4
LONGEST_RUN = 1 << RUN_BITS[-1]
INSIDE = 255


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
