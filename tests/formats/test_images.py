"""load_image on every odd kind of file, and the formats of the shards."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.images import (
    EXTENSIONS,
    FORMATS,
    ImageError,
    decode_label,
    decode_png,
    encode_jpeg,
    encode_label,
    encode_png,
    is_plain_jpeg,
    load_image,
    resize_nearest,
    shrink_short_side,
    stored_size,
    upright_size,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

ORIENTATION = 0x0112


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = load_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


GRADIENT = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_rgb_is_unchanged(format: str) -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GRADIENT), format)), GRADIENT)


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {})])
def test_lossy_rgb(format: str, options: dict[str, int]) -> None:
    data = encoded(Image.new("RGB", (20, 12), (200, 30, 60)), format, **options)
    assert np.abs(pixels(data).astype(int) - (200, 30, 60)).max() <= 4


def test_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(GRADIENT), "PNG"))
    np.testing.assert_array_equal(np.asarray(load_image(path)), GRADIENT)
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        load_image(tmp_path / "b.png")


def test_one_pixel() -> None:
    assert pixels(encoded(Image.new("L", (1, 1), 77), "PNG")).tolist() == [[[77, 77, 77]]]


def test_cmyk_jpeg() -> None:
    cyan = pixels(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
    assert np.abs(cyan.astype(int) - (0, 255, 255)).max() <= 3


def test_gray_bilevel_and_palette() -> None:
    gray = Image.fromarray(GRADIENT[..., 0])
    np.testing.assert_array_equal(pixels(encoded(gray, "PNG"))[..., 2], GRADIENT[..., 0])
    assert (pixels(encoded(Image.new("1", (3, 2), 1), "PNG")) == 255).all()
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixels(encoded(palette, "PNG"))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_the_high_byte(format: str) -> None:
    values = np.array([[0, 255, 256], [32896, 65535, 4660]], np.uint16)
    found = pixels(encoded(Image.fromarray(values), format))
    assert found[..., 0].tolist() == [[0, 0, 1], [128, 255, 18]]
    assert (found[..., 0] == found[..., 1]).all()


def test_16_bit_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (2, 1), b"\x80\x80\xff\xff")
    assert pixels(encoded(image, "TIFF"))[..., 0].tolist() == [[128, 255]]


def test_16_bit_rgb_png() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 256, 511, 512)
    found = pixels(raw_png(2, 1, depth=16, colour=2, rows=row))
    assert found.tolist() == [[[255, 128, 0], [1, 1, 2]]]


def test_32_bit_integer_and_float_tiff() -> None:
    integers = np.array([[0, 65535, 32768]], np.int32)
    assert pixels(encoded(Image.fromarray(integers), "TIFF"))[0, :, 0].tolist() == [0, 255, 128]
    floats = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(floats), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_alpha_is_laid_on_white() -> None:
    clear_red = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")
    assert (pixels(clear_red) == 255).all()
    half_black = encoded(Image.new("LA", (2, 2), (0, 128)), "PNG")
    assert np.abs(pixels(half_black).astype(int) - 127).max() <= 1
    assert (
        pixels(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "WEBP", lossless=True)) == 255
    ).all()


def test_transparent_palette_entry_is_laid_on_white() -> None:
    image = Image.new("P", (3, 3), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 1)
    found = pixels(encoded(image, "GIF", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 6


def test_multi_picture_jpeg_of_phones() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 3
    assert not is_plain_jpeg(data, load_image(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_exif_rotation(orientation: int, format: str) -> None:
    """The stored pixels are those that a viewer turns into the upright picture."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the top left corner, so that no two orientations look alike
    upright[:8, 24:] = 128
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    assert np.abs(pixels(data).astype(int) - upright).max() <= 8


def turned(format: str, orientation: int) -> bytes:
    """A file of `GRADIENT`, 20 wide and 12 high, whose EXIF says how to turn it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(Image.fromarray(GRADIENT), format, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_stored_pixels_stay_as_they_are_where_masks_belong_to_them(
    format: str, orientation: int
) -> None:
    data = turned(format, orientation)
    np.testing.assert_array_equal(np.asarray(load_image(data, upright=False)), GRADIENT)
    assert load_image(data).size == ((12, 20) if orientation in (5, 6, 7, 8) else (20, 12))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("format", FORMATS)
def test_the_stored_size_is_that_of_the_pixels_as_they_are_stored(
    tmp_path: Path, format: str, orientation: int
) -> None:
    path = tmp_path / "photo"
    path.write_bytes(turned(format, orientation))
    assert stored_size(path) == (12, 20)
    assert load_image(path, upright=False).size == (20, 12)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("BMP", "GIF", "PPM")])
def test_the_upright_size_is_that_of_the_upright_image(format: str, orientation: int) -> None:
    data = turned(format, orientation)
    expected = (12, 20) if orientation == 6 else (20, 12)
    with Image.open(io.BytesIO(data)) as image:
        assert upright_size(image) == expected
    assert load_image(data).size == expected


def test_the_size_of_what_has_no_header_is_an_image_error(tmp_path: Path) -> None:
    for content in (b"", b"text", encoded(Image.new("RGB", (6, 4)), "PNG")[:20]):
        (tmp_path / "photo").write_bytes(content)
        with pytest.raises(ImageError):
            stored_size(tmp_path / "photo")
    with pytest.raises(ImageError):
        stored_size(tmp_path)


def test_damaged_exif_does_not_spoil_the_pixels() -> None:
    data = encoded(Image.fromarray(GRADIENT), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(pixels(data), GRADIENT)


def noise(format: str) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    return encoded(image, format)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(format: str, share: float) -> None:
    data = noise(format)
    with pytest.raises(ImageError, match=r"^truncated$"):
        load_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("length", [3, 8, 20, 40, 300])
def test_cut_anywhere_is_an_image_error_with_a_repeatable_reason(format: str, length: int) -> None:
    data = noise(format)[:length]
    reasons = set()
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            load_image(data)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_flipped_bytes_raise_nothing_but_image_errors(rng: np.random.Generator) -> None:
    outcomes = set()
    for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        for _ in range(30):
            data = bytearray(noise(format))
            for position in rng.integers(0, min(len(data), 400), 3):
                data[position] = rng.integers(0, 256)
            try:
                outcomes.add(load_image(bytes(data), max_pixels=10_000).mode)
            except ImageError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_not_images() -> None:
    with pytest.raises(ImageError, match=r"^empty file$"):
        load_image(b"")
    for data in (b"hello", b"<svg/>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(ImageError, match=r"^not an image$"):
            load_image(data)


def test_format_outside_the_list_is_refused() -> None:
    with pytest.raises(ImageError, match="not an image"):
        load_image(encoded(Image.new("RGB", (4, 4)), "TGA"))


def test_extensions_are_those_of_the_formats() -> None:
    Image.init()
    known = {name for name, format in Image.registered_extensions().items() if format in FORMATS}
    assert set(EXTENSIONS) == known
    assert len(EXTENSIONS) == len(known)


def test_size_is_refused_before_any_pixel_is_decoded() -> None:
    """The file has no pixel data at all, so only its header can have been looked at."""
    data = raw_png(20_000, 10_000, depth=8, colour=2, rows=b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"^too large: 20000x10000$|^too large: 200000000"):
            load_image(data)
    with pytest.raises(ImageError, match=r"^too large: 20x12$"):
        load_image(encoded(Image.fromarray(GRADIENT), "PNG"), max_pixels=239)
    assert load_image(encoded(Image.fromarray(GRADIENT), "PNG"), max_pixels=240).size == (20, 12)


def test_bomb_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^too large: 2500000000 pixels$"):
        load_image(raw_png(50_000, 50_000, depth=8, colour=2, rows=b""))


def test_bomb_warning_turned_into_an_error_is_an_image_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"^too large: 100000000 pixels$"):
            load_image(raw_png(10_000, 10_000, depth=8, colour=2, rows=b""))


def test_endless_strip_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^too elongated: 1x201$"):
        load_image(encoded(Image.new("RGB", (1, 201)), "PNG"))
    assert load_image(encoded(Image.new("RGB", (200, 1)), "PNG")).size == (200, 1)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((100, 50), 10, (20, 10)),
        ((50, 101), 10, (10, 20)),
        ((7, 5), 5, (7, 5)),
        ((4, 9), 5, (4, 9)),
        ((200, 1), 1, (200, 1)),
    ],
)
def test_shrink_short_side(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert shrink_short_side(Image.new("RGB", size), side).size == expected


def test_is_plain_jpeg() -> None:
    image = Image.fromarray(GRADIENT)
    data = encode_jpeg(image)
    assert is_plain_jpeg(data, image)
    assert not is_plain_jpeg(data, shrink_short_side(image, 4))
    assert not is_plain_jpeg(encoded(image, "PNG"), image)
    assert not is_plain_jpeg(b"no", image)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    turned = encoded(image, "JPEG", exif=exif)
    assert not is_plain_jpeg(turned, load_image(turned))
    cmyk = encoded(image.convert("CMYK"), "JPEG")
    assert not is_plain_jpeg(cmyk, load_image(cmyk))
    gray = encoded(image.convert("L"), "JPEG")
    assert is_plain_jpeg(gray, load_image(gray))


def test_encode_jpeg_is_repeatable_and_close() -> None:
    smooth = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    assert encode_jpeg(smooth) == encode_jpeg(smooth)
    assert np.abs(pixels(encode_jpeg(smooth)).astype(int) - np.asarray(smooth)).max() <= 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(dtype: type, rng: np.random.Generator) -> None:
    array = rng.integers(0, np.iinfo(dtype).max, (5, 7), dtype, endpoint=True)
    found = decode_png(encode_png(array))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_png_of_booleans_and_of_views() -> None:
    mask = np.eye(3, 5, dtype=bool)
    np.testing.assert_array_equal(decode_png(encode_png(mask)), mask * 255)
    np.testing.assert_array_equal(decode_png(encode_png(GRADIENT[::-1, ::2])), GRADIENT[::-1, ::2])
    with pytest.raises(ValueError, match="float64"):
        encode_png(np.zeros((2, 2)))


def test_decode_png_refuses_what_is_not_whole() -> None:
    data = encode_png(GRADIENT)
    for damaged in (b"", b"abc", data[: len(data) // 2], encode_jpeg(Image.fromarray(GRADIENT))):
        with pytest.raises(ImageError):
            decode_png(damaged)


@pytest.mark.parametrize(
    ("num_categories", "mode", "ignore"),
    [(1, "L", 255), (254, "L", 255), (255, "I;16", 65535), (32_767, "I;16", 65535)],
)
def test_label_round_trip(num_categories: int, mode: str, ignore: int) -> None:
    label = np.array([[-1, 0, num_categories], [num_categories, -1, 1]])
    data = encode_label(label, num_categories)
    stored = Image.open(io.BytesIO(data))
    assert stored.mode == mode
    assert stored.getpixel((0, 0)) == ignore
    np.testing.assert_array_equal(decode_label(data), label)


def test_labels_out_of_range_are_refused() -> None:
    for label in ([[0, 3]], [[-2, 0]]):
        with pytest.raises(ValueError, match=r"-1\.\.2"):
            encode_label(np.array(label), 2)
    with pytest.raises(ValueError, match="32768"):
        encode_label(np.zeros((1, 1), int), 32_768)
    with pytest.raises(ImageError, match="not a label"):
        decode_label(encode_png(GRADIENT))
    with pytest.raises(ImageError, match="label id 32768"):
        decode_label(encode_png(np.array([[0, 32_768, 65_535]], np.uint16)))


def test_resize_takes_the_nearest_label() -> None:
    labels = np.array([[1, 2], [3, -1]])
    assert resize_nearest(labels, (2, 4)).tolist() == [[1, 1, 2, 2], [3, 3, -1, -1]]
    assert resize_nearest(labels, (1, 1)).shape == (1, 1)
    assert resize_nearest(labels, (2, 2)).tolist() == labels.tolist()
