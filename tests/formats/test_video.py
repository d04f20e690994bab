"""Videos in and out: sizes, times, turned ones, and those that are damaged."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.formats.video import Frame, VideoWriter, is_video, open_video

pytest.importorskip("av")

WIDTH, HEIGHT = 64, 48
LEFT_RED = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
LEFT_RED[:, : WIDTH // 2, 0] = 255
QUARTER = (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # clockwise, as a phone writes it


def write(
    path: Path, count: int = 8, size: tuple[int, int] = (WIDTH, HEIGHT), rate: int = 8
) -> Path:
    """Frames that become brighter one by one."""
    with VideoWriter(path, size, Fraction(rate)) as writer:
        for index in range(count):
            image = Image.new("RGB", size, (25 * index,) * 3)
            writer.add(image, Fraction(index, rate))
    return path


def read(path: Path, every: int = 1) -> tuple[list[Frame], list[tuple[int, str]]]:
    damaged: list[tuple[int, str]] = []
    with open_video(path) as video:
        frames = list(video.frames(every, lambda index, reason: damaged.append((index, reason))))
    return frames, damaged


def test_what_is_written_is_read(tmp_path: Path) -> None:
    frames, damaged = read(write(tmp_path / "a.mp4"))
    assert not damaged
    assert [frame.index for frame in frames] == list(range(8))
    assert [frame.seconds for frame in frames] == [Fraction(index, 8) for index in range(8)]
    levels = [float(np.asarray(frame.image).mean()) for frame in frames]
    assert levels == pytest.approx([25 * index for index in range(8)], abs=4)
    with open_video(tmp_path / "a.mp4") as video:
        assert video.num_frames == 8


def test_only_some_frames(tmp_path: Path) -> None:
    frames, _ = read(write(tmp_path / "a.mp4"), every=3)
    assert [(frame.index, frame.seconds) for frame in frames] == [
        (0, 0),
        (3, Fraction(3, 8)),
        (6, Fraction(6, 8)),
    ]


@pytest.mark.parametrize("size", [(33, 17), (16, 15), (1, 1)])
def test_odd_sizes_get_a_pixel_more(tmp_path: Path, size: tuple[int, int]) -> None:
    frames, _ = read(write(tmp_path / "a.mp4", size=size))
    assert {frame.image.size for frame in frames} == {tuple(side + side % 2 for side in size)}


def test_frames_are_shown_when_they_were_however_unevenly(tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(11, 20)]
    with VideoWriter(tmp_path / "a.mp4", (16, 16), Fraction(10)) as writer:
        for seconds in times:
            writer.add(Image.new("RGB", (16, 16)), seconds)
    frames, _ = read(tmp_path / "a.mp4")
    assert [float(frame.seconds) for frame in frames] == pytest.approx(
        [float(seconds) for seconds in times], abs=1e-4
    )


def test_times_that_go_backwards_and_another_size_are_written(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", (16, 16), Fraction(10)) as writer:
        for seconds in (Fraction(1), Fraction(1), Fraction(0)):
            writer.add(Image.new("RGB", (20, 30)), seconds)
    assert len(read(tmp_path / "a.mp4")[0]) == 3


@pytest.mark.parametrize("turn", [QUARTER, (0, -0x10000, 0, 0x10000, *QUARTER[4:])])
def test_a_turned_video_is_put_upright(tmp_path: Path, turn: tuple[int, ...]) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, (WIDTH, HEIGHT), Fraction(8)) as writer:
        writer.add(Image.fromarray(LEFT_RED), Fraction(0))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(data)
    pixels = np.asarray(read(path)[0][0].image)
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    red = pixels[..., 0] > 128
    # Clockwise the left side comes to the top.
    assert red[: WIDTH // 2 - 2].all() == (turn == QUARTER)
    assert red[WIDTH // 2 + 2 :].all() == (turn != QUARTER)


def test_a_video_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(20):
            noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames, _ = read(path)
    assert 0 < len(frames) < 20


def test_frames_that_cannot_be_decoded_are_told_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for level in range(6):
            pixels = np.full((48, 64, 3), 40 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    third = [at for at in range(len(data)) if data[at : at + 4] == b"\x89PNG"][2]
    data[third + 16 : third + 24] = bytes(8)  # its width and height
    path.write_bytes(data)
    frames, damaged = read(path)
    assert [index for index, _ in damaged] == [2]
    assert damaged[0][1]
    assert [frame.index for frame in frames] == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42"])
def test_what_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"a\.mp4: not a video that can be read"):
        read(path)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(PipelineError, match="no picture"):
        read(path)


def test_names_of_videos() -> None:
    assert is_video(Path("a.MP4"))
    assert not is_video(Path("a.gif"))
