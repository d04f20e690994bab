"""load_image on damaged and malicious files: a proper image or a short reason, never more."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.images import MAX_SCANS, ImageError, decode_label, decode_png, load_image
from tests.faults.hostile import (
    PEAK_BYTES,
    check_reason,
    cuts,
    encoded,
    flips,
    gray_tiff,
    many_scans,
    on_linux,
    png,
    png_chunk,
    samples,
    wide_gif,
    wide_webp,
    within,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

NUM_FLIPS = 300
PATIENCE_S = 20
# What SECURITY.md promises of one image: so many bytes a pixel of its own size, and a constant.
BYTES_PER_PIXEL = 24
OTHER_BYTES = 100_000_000
SIDE = 4000

CHILD = f"""{PEAK_BYTES}
import json, sys, warnings
from pathlib import Path
from pipeline.formats.images import ImageError, load_image
warnings.simplefilter("ignore")
data = Path(sys.argv[1]).read_bytes()
before = peak_bytes()
try:
    outcome = list(load_image(data).size)
except ImageError as error:
    outcome = str(error)
print(json.dumps([outcome, peak_bytes() - before]))
"""


def outcome(data: bytes) -> Image.Image | str:
    """What load_image makes of a file, checked against what its header announces."""
    try:
        image = load_image(data, max_pixels=1_000_000)
    except ImageError as error:
        check_reason(error)
        return str(error)
    with Image.open(io.BytesIO(data)) as header:
        assert image.size in (header.size, header.size[::-1])
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (*image.size[::-1], 3)
    return image


@pytest.mark.parametrize("kind", samples())
def test_a_cut_file_is_an_image_or_a_reason(kind: str) -> None:
    whole = samples()[kind]
    assert isinstance(outcome(whole), Image.Image)
    outcomes = [outcome(data) for data in cuts(whole)]
    # Some formats do without their last byte, none without most of what it shows.
    assert all(isinstance(found, str) for found in outcomes[:-3])
    assert outcomes[0] == "empty file"


@pytest.mark.parametrize("kind", samples())
def test_flipped_bits_give_an_image_or_a_reason(kind: str) -> None:
    outcomes = [outcome(data) for data in flips(samples()[kind], NUM_FLIPS, seed=kind)]
    assert any(isinstance(found, str) for found in outcomes)


def test_flipped_bits_of_our_own_files_are_refused_or_read() -> None:
    """Masks and labels: Pillow raises other exceptions than those of a whole file."""
    whole = encoded(Image.fromarray(np.eye(30, dtype=np.uint8)), "PNG")
    for data in [*cuts(whole), *flips(whole, NUM_FLIPS, seed="label")]:
        for decode in (decode_png, decode_label):
            try:
                assert decode(data).ndim <= 3
            except ImageError as error:
                check_reason(error)


def text_bomb(kind: bytes, head: bytes, *, count: int, size: int) -> Callable[[], bytes]:
    def make() -> bytes:
        body = head + zlib.compress(bytes(size))
        return png(8, 8, extra=png_chunk(kind, body) * count, pixels=8 * 25)

    return make


def huge_exif() -> bytes:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + bytes(30_000_000)
    return encoded(Image.new("RGB", (8, 8)), "PNG", exif=exif)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png of 200 MP": (lambda: png(20_000, 10_000), "too large"),
    "gif of 200 MP": (lambda: wide_gif(20_000, 10_000), "too large"),
    "gif of 4 GP": (lambda: wide_gif(65_535, 65_535), "too large"),
    "webp of 179 MP": (lambda: wide_webp(16_383, 10_900), "too large"),
    "tiff of 200 MP": (lambda: gray_tiff(20_000, 10_000), "too large"),
    "small tiff of a huge tile": (lambda: gray_tiff(10, 10, tile=(30_000, 30_000)), "too large"),
    "zTXt": (text_bomb(b"zTXt", b"k\0\0", count=1, size=1 << 28), "damaged"),
    "iTXt": (text_bomb(b"iTXt", b"k\0\1\0\0\0", count=200, size=1_000_000), "damaged"),
    "iCCP": (text_bomb(b"iCCP", b"k\0\0", count=1, size=1 << 28), "damaged"),
    "exif": (huge_exif, ""),
    "most bytes a pixel": (
        lambda: png(SIDE, SIDE, colour=6, pixels=SIDE * (4 * SIDE + 1)),
        "",
    ),
    "png of 16 bits": (
        lambda: png(SIDE, SIDE, colour=6, depth=16, pixels=SIDE * (8 * SIDE + 1)),
        "",
    ),
    "ppm of 16 bits": (lambda: b"P6 %d %d 999 " % (SIDE, SIDE) + bytes(6 * SIDE * SIDE), ""),
    "tiff of floats": (lambda: encoded(Image.new("F", (SIDE, SIDE), 1e9), "TIFF"), ""),
    "avif": (lambda: encoded(Image.new("RGB", (SIDE, SIDE)), "AVIF", speed=10), ""),
    "webp canvas": (lambda: wide_webp(SIDE, SIDE), ""),
}


@on_linux
@pytest.mark.parametrize("name", BOMBS)
def test_the_memory_of_one_image_is_bounded(tmp_path: Path, name: str) -> None:
    """Peak memory of a process that decodes nothing else."""
    make, reason = BOMBS[name]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    found, taken = json.loads(done.stdout)
    assert found.startswith(reason) if reason else not isinstance(found, str)
    num_pixels = 0 if reason else found[0] * found[1]
    assert taken <= BYTES_PER_PIXEL * num_pixels + OTHER_BYTES


def test_a_jpeg_of_endless_scans_is_refused_at_once() -> None:
    """Each scan costs a pass over all pixels: a megabyte of them takes minutes."""
    data = many_scans(2000, 20_000)
    assert len(data) < 1_500_000
    with pytest.raises(ImageError, match=r"^too large: 20\d+ scans$"):
        within(PATIENCE_S, lambda: load_image(data))
    assert load_image(many_scans(64, MAX_SCANS // 2)).size == (64, 64)


def test_marks_of_scans_outside_the_picture_do_not_count() -> None:
    """Thumbnails in EXIF data, and what phones append to a photo."""
    scans = b"\xff\xda" * (2 * MAX_SCANS)
    whole = encoded(Image.new("RGB", (16, 16)), "JPEG", exif=b"Exif\0\0" + scans)
    assert load_image(whole + scans).size == (16, 16)
