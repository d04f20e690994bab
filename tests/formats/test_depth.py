"""Samples of every depth: a ramp stays a ramp, or the file is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.formats.images import ImageError, load_image
from pipeline.inference.inputs import to_rgb

WIDTH = 64


def ramp(low: float, high: float, dtype: str, *, channels: int = 1) -> np.ndarray:
    """(4, WIDTH) or (4, WIDTH, channels), rising from left to right."""
    values = np.linspace(low, high, WIDTH)
    row = (values if np.dtype(dtype).kind == "f" else np.rint(values)).astype(dtype)
    gray = np.tile(row, (4, 1))
    return gray if channels == 1 else np.stack([gray] * channels, axis=-1)


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits with 1 to 4 channels."""
    height, width, channels = np.atleast_3d(values).shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
        + chunk(b"IEND", b"")
    )


def netpbm(kind: str, values: np.ndarray, maxval: int) -> bytes:
    head = f"{kind}\n# a comment\n{WIDTH} {len(values)}\n{maxval}\n".encode()
    if kind in ("P2", "P3"):
        return head + " ".join(map(str, values.ravel())).encode()
    return head + values.astype(">u2" if maxval > 255 else "u1").tobytes()


def pil(values: np.ndarray, format: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format)
    return buffer.getvalue()


def row(data: bytes) -> list[int]:
    pixels = np.asarray(load_image(data))
    assert (pixels == pixels[:, :, :1]).all()
    assert (pixels == pixels[:1]).all()
    return pixels[0, :, 0].astype(int).tolist()


def assert_ramp(found: list[int], *, low: int = 0, high: int = 255) -> None:
    """Rising evenly from `low` to `high`."""
    np.testing.assert_allclose(found, np.linspace(low, high, WIDTH), atol=3)
    assert found == sorted(found)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_fewer_bits_in_16(bits: int, channels: int) -> None:
    values = ramp(0, 2**bits - 1, "uint16", channels=channels)
    if channels in (2, 4):
        values[..., -1] = 2**bits - 1
    assert_ramp(row(png(values)))
    assert_ramp(row(png(values, chunk(b"sBIT", bytes([bits] * channels)))))


@pytest.mark.parametrize(
    ("bits", "compression", "order", "channels"),
    list(product([10, 12, 14, 16], [None, "zlib"], "<>", [1, 3])),
)
def test_tiff_of_fewer_bits_in_16(
    bits: int, compression: str | None, order: str, channels: int
) -> None:
    values = ramp(0, 2**bits - 1, "uint16", channels=channels)
    kind = "rgb" if channels == 3 else "minisblack"
    data = tiff(values, photometric=kind, compression=compression, byteorder=order)
    assert_ramp(row(data))


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("bits", [12, 16])
def test_tiff_with_a_fourth_channel(bits: int, alpha: str) -> None:
    values = ramp(0, 2**bits - 1, "uint16", channels=4)
    values[..., 3] = 2**bits - 1
    assert_ramp(row(tiff(values, photometric="rgb", extrasamples=[alpha])))


def test_a_stated_depth_wins_over_the_values() -> None:
    dark = ramp(0, 1000, "uint16")
    assert_ramp(row(png(dark)), high=249)  # 10 bits
    assert_ramp(row(png(dark, chunk(b"sBIT", b"\x0c"))), high=62)
    assert_ramp(row(netpbm("P5", dark, 2000)), high=127)
    assert_ramp(row(tiff(dark, extratags=[(281, "H", 1, 4095, True)])), high=62)
    assert_ramp(row(tiff(ramp(0, 10, "float32"), extratags=[(341, "f", 1, 20.0, True)])), high=127)


def test_a_stated_depth_that_the_samples_exceed_is_not_believed() -> None:
    assert_ramp(row(png(ramp(0, 65535, "uint16"), chunk(b"sBIT", b"\x0c"))))
    assert_ramp(row(tiff(ramp(0, 4095, "uint16"), extratags=[(281, "H", 1, 1023, True)])))
    assert_ramp(row(tiff(ramp(0, 90, "float32"), extratags=[(341, "f", 1, 3e38, True)])))


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
@pytest.mark.parametrize("maxval", [15, 100, 1023, 4095, 40000, 65535])
def test_netpbm(kind: str, maxval: int) -> None:
    values = ramp(0, maxval, "uint16", channels=3 if kind in ("P3", "P6") else 1)
    if kind == "P3" and maxval > 255:
        with pytest.raises(ImageError, match=r"^not supported: Netpbm as text"):
            load_image(netpbm(kind, values, maxval))
    else:
        expected = values.reshape(4, WIDTH, -1)[0, :, 0] * (255 / maxval)
        np.testing.assert_allclose(row(netpbm(kind, values, maxval)), expected, atol=1)


def test_netpbm_of_12_bits_that_says_16() -> None:
    assert_ramp(row(pil(ramp(0, 4095, "uint16"), "PPM")))
    assert_ramp(row(netpbm("P6", ramp(0, 4095, "uint16", channels=3), 65535)))
    with pytest.raises(ImageError, match=r"^truncated$"):
        load_image(netpbm("P6", ramp(0, 4095, "uint16", channels=3), 4095)[:-1])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, "int32"),
        (0, 1000, "int32"),
        (0, 100_000, "int32"),
        (70_000, 90_000, "int32"),
        (-1000, 1000, "int32"),
        (-(2**31), 2**31 - 1, "int32"),
        (0, 4095, "int16"),
        (-1024, 3071, "int16"),
        (-128, 127, "int8"),
        (0, 1, "float32"),
        (0, 255, "float32"),
        (0, 1.01, "float32"),
        (0, 1e-4, "float32"),
        (0, 10_000, "float32"),
        (-5, -1, "float32"),
        (-3e38, 3e38, "float32"),
    ],
)
def test_integers_and_floats(
    low: float, high: float, dtype: str, compression: str | None, order: str
) -> None:
    data = tiff(ramp(low, high, dtype), compression=compression, byteorder=order)
    assert_ramp(row(data))


def test_unsigned_32_bits() -> None:
    assert_ramp(row(tiff(ramp(0, 2**32 - 1, "uint32"))))


def test_values_of_8_bits_stay() -> None:
    for dtype in ("uint8", "uint16", "int32", "float32"):
        assert row(tiff(ramp(20, 200, dtype))) == pytest.approx(np.linspace(20, 200, WIDTH), abs=1)
    assert_ramp(row(tiff(ramp(0, 0.5, "float32"))), high=128)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_white_is_zero(dtype: str) -> None:
    high = 1 if dtype == "float32" else np.iinfo(dtype).max
    found = row(tiff(ramp(0, high, dtype), photometric="miniswhite"))
    assert_ramp(found[::-1])


def test_what_is_no_number_is_black_or_white() -> None:
    values = ramp(0, 10, "float32")
    values[:, 0], values[:, 1], values[:, 2] = np.nan, -np.inf, np.inf
    found = row(tiff(values))
    assert found[:3] == [0, 0, 255]
    assert found[3] < found[30] < found[-1] == 255
    with pytest.raises(ImageError, match=r"^damaged: no sample is a number$"):
        load_image(tiff(np.full((4, 4), np.nan, np.float32)))


def test_a_transparent_value_of_16_bits_is_white() -> None:
    for channels in (1, 3):
        values = ramp(1000, 65535, "uint16", channels=channels)
        found = row(png(values, chunk(b"tRNS", struct.pack(f">{channels}H", *[1000] * channels))))
        assert found[0] == 255
        assert found[1:] == sorted(found[1:])


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (ramp(0, 1, "float64"), {}),
        (ramp(0, 1, "float16"), {}),
        (ramp(0, 1, "float32", channels=3), {"photometric": "rgb"}),
        (ramp(0, 9, "uint16"), {"photometric": "miniswhite", "byteorder": ">"}),
        (
            ramp(0, 65535, "uint16", channels=3).transpose(2, 0, 1),
            {"photometric": "rgb", "planarconfig": "separate"},
        ),
    ],
)
def test_samples_that_cannot_be_read_are_refused(values: np.ndarray, options: dict) -> None:
    with pytest.raises(ImageError, match=r"^not supported: "):
        load_image(tiff(values, **options))


def test_images_in_memory_follow_the_same_rule() -> None:
    for values in (ramp(0, 4095, "uint16"), ramp(0, 10_000, "int32"), ramp(0, 10_000, "float32")):
        assert_ramp(np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].astype(int).tolist())
