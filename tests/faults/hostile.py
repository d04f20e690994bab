"""Files that nobody should meet: bombs, forged headers, payloads; and how to watch them fail."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

Result = TypeVar("Result")
TAR_END = bytes(1024)
TIFF_DEFLATE = 8
# For scripts of other processes. Not `ru_maxrss`, which begins at what the parent has had.
PEAK_BYTES = """
def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """The result of `function`, or its exception; fails if neither comes in time."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"nothing after {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def check_reason(error: Exception) -> None:
    """A reason is fit for a table: one short line."""
    assert 0 < len(str(error)) <= 140
    assert str(error).isprintable()


def check_names(error: Exception, path: Path) -> None:
    """A message says which file it is about."""
    assert str(path) in str(error)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def samples() -> dict[str, bytes]:
    """A small photo in every kind of file that `load_image` reads."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize((40, 31))
    words = Image.fromarray(rng.integers(0, 2**16, (31, 40), np.uint16))
    floats = Image.fromarray(np.asarray(words).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    return {
        "jpeg": encoded(image, "JPEG", exif=exif),
        "progressive": encoded(image, "JPEG", progressive=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "png": encoded(image, "PNG"),
        "png 16 bit": encoded(words, "PNG"),
        "png 16 bit colours": png(40, 31, depth=16, pixels=31 * (6 * 40 + 1)),
        "pgm 16 bit": encoded(words, "PPM"),
        "ppm 12 bit": b"P6 20 31 4095 " + (np.asarray(words) >> 4).astype(">u2").tobytes() * 2,
        "pfm": encoded(floats, "PPM"),
        "tiff floats": encoded(floats, "TIFF", compression="tiff_lzw"),
        "avif": encoded(image, "AVIF"),
        "palette": encoded(image.convert("P"), "PNG", transparency=3),
        "alpha": encoded(image.convert("RGBA"), "PNG"),
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encoded(image, "TIFF", compression="jpeg"),
        "gif": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
    }


def cuts(data: bytes) -> list[bytes]:
    """The beginnings of a file, of every class of length."""
    size = len(data)
    lengths = {0, 1, 2, 3, 4, 8, 12, 20, 40, 100, size // 4, size // 2, size - 2, size - 1}
    return [data[:length] for length in sorted(lengths) if length < size]


def flips(data: bytes, count: int, *, seed: str) -> list[bytes]:
    """Copies with 1 to 8 flipped bits; half of these are among the first 100 bytes."""
    generator = random.Random(seed)
    copies = []
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            end = len(copy) if generator.random() < 0.5 else min(100, len(copy))
            copy[generator.randrange(end)] ^= 1 << generator.randrange(8)
        copies.append(bytes(copy))
    return copies


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    *,
    colour: int = 2,
    depth: int = 8,
    extra: bytes = b"",
    pixels: int = 0,
) -> bytes:
    """A PNG: its header, `extra` chunks, and `pixels` bytes of zeros as its content."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(bytes(pixels), 1))
        + png_chunk(b"IEND", b"")
    )


def gray_tiff(width: int, height: int, *, tile: tuple[int, int] | None = None) -> bytes:
    """A TIFF of one compressed strip or tile, almost all of whose content is missing."""
    content = zlib.compress(bytes(1000))
    tags = {256: width, 257: height, 258: 8, 259: TIFF_DEFLATE, 262: 1, 277: 1}
    tags |= {322: tile[0], 323: tile[1], 325: len(content)} if tile else {278: height}
    tags |= {} if tile else {279: len(content)}
    where = 324 if tile else 273
    tags[where] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def wide_gif(width: int, height: int) -> bytes:
    """A GIF of one small frame on a canvas of any size."""
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def wide_webp(width: int, height: int) -> bytes:
    """An animated WebP of small frames on a canvas of any size."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times."""
    whole = encoded(Image.new("RGB", (side, side), (9, 9, 9)), "JPEG", progressive=True)
    head, _, last = whole.removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    return head + (b"\xff\xda" + last) * count + b"\xff\xd9"


def tar_number(value: int) -> bytes:
    """A number of a tar header in base 256, which may be huge or negative."""
    lead = b"\x80" if value >= 0 else b"\xff"
    return lead + (value % (1 << 88)).to_bytes(11, "big")


def tar_header(name: bytes, size: bytes, *, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A header block with a right checksum, whatever it says."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0")
    block += b"00000000000\0" + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def tar_member(name: bytes, data: bytes, *, kind: bytes = b"0", link: bytes = b"") -> bytes:
    header = tar_header(name, b"%011o\0" % len(data), kind=kind, link=link)
    return header + data + bytes(-len(data) % 512)


def pax_header(key: bytes, value: bytes) -> bytes:
    """An extended header with one record for the next member."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return tar_member(b"pax", str(length).encode() + body, kind=b"x")


class Payload:
    """Makes a file when it is unpickled by the usual means."""

    def __init__(self, trap: Path) -> None:
        self._command = f"touch '{trap}'"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


class ScriptPayload(torch.nn.Module):
    """Writes a file when its TorchScript archive is loaded by the usual means."""

    def __init__(self, trap: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.trap = str(trap)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return (self.weight, self.trap, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.trap = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])


def write_payload(form: str, path: Path, trap: Path) -> None:
    """Write a weights file that makes the file `trap` if it is loaded carelessly."""
    content = {"weight": torch.zeros(2), "payload": Payload(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "zip":
        torch.save(content, path)
    else:
        torch.jit.save(torch.jit.script(ScriptPayload(trap)), path)
