"""Frames of a video, one at a time: in through any decoder of FFmpeg, out as MP4.

Needs the package `av` (extra `video`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError, first_line, install_command
from pipeline.formats.images import one_line

if TYPE_CHECKING:
    import av

EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv"),
)
MAX_PIXELS = 100_000_000
CODECS = ("libx264", "mpeg4")  # the first that this build of FFmpeg has
QUALITY = {"libx264": {"crf": "20"}, "mpeg4": {"qscale": "3"}}
TICK = Fraction(1, 90_000)
QUARTER_TURN = 90
DEFAULT_RATE = Fraction(25)

OnDamage = Callable[[int, str], None]


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: its number from 0, unreadable frames counted.
        seconds: when it is shown, from the video's start.
        image: RGB, upright.
    """

    index: int
    seconds: Fraction
    image: Image.Image


@dataclass(frozen=True)
class Video:
    """An open video.

    Attributes:
        num_frames: as its header says, which may be wrong; None where it says nothing.
        rate: frames a second on average.
        frames: reads it, every so many frames; `damaged` is told number and reason of what cannot
            be read.
    """

    num_frames: int | None
    rate: Fraction
    frames: Callable[[int, OnDamage], Iterator[Frame]]


def is_video(path: Path) -> bool:
    """Whether the name is that of a video."""
    return path.suffix.lower() in EXTENSIONS


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Open a video file; its sound is not read.

    Raises:
        PipelineError: it is none, or too large; or `av` is not installed.
    """
    av = import_av()
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise PipelineError(f"{path}: not a video that can be read: {_reason(error)}") from None
    with container:
        if not container.streams.video:
            raise PipelineError(f"{path}: has no picture, only sound or data")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise PipelineError(f"{path}: frames of {stream.width}x{stream.height} are too large")
        rate = Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
        yield Video(
            num_frames=stream.frames or None,
            rate=rate,
            frames=lambda every, damaged: _frames(container, stream, rate, every, damaged),
        )


def _frames(
    container: Any, stream: Any, rate: Fraction, every: int, damaged: OnDamage
) -> Iterator[Frame]:
    index = -1
    start: Fraction | None = None
    for decoded in _decoded(container, stream):
        index += 1
        if isinstance(decoded, str):
            damaged(index, decoded)
            continue
        seconds = _seconds(decoded)
        start = seconds if start is None else start
        if decoded.is_corrupt:
            damaged(index, "damaged")
        elif index % every == 0:
            shown = Fraction(index) / rate if seconds is None or start is None else seconds - start
            yield Frame(index, shown, _upright(decoded))


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames as they come, and in place of one that cannot be decoded the reason."""
    av = import_av()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError as error:  # the rest of the file cannot be found
            yield _reason(error)
            return
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            yield _reason(error)


def _seconds(frame: Any) -> Fraction | None:
    if frame.pts is None or frame.time_base is None:
        return None
    return Fraction(frame.pts * frame.time_base)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """RGB image of a frame, turned as its display matrix says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / QUARTER_TURN)  # counterclockwise
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))


class VideoWriter:
    """Writes an MP4 (H.264, or MPEG-4 where FFmpeg lacks it); a context manager.

    Args:
        path: the file.
        size: (width, height) of the frames; of an odd side one more pixel is written.
        rate: frames a second on average, for players.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction) -> None:
        av = import_av()
        self._size = size
        self._last = -1
        codec = next(name for name in CODECS if name in av.codecs_available)
        self._container = av.open(str(path), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=rate, options=QUALITY[codec])
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = TICK

    def add(self, image: Image.Image, seconds: Fraction) -> None:
        """Add a frame that is shown from then on; one of another size is resized."""
        av = import_av()
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        odd = [(0, side % 2) for side in pixels.shape[:2]]
        frame = av.VideoFrame.from_ndarray(np.pad(pixels, [*odd, (0, 0)], mode="edge"))
        self._last = max(self._last + 1, round(seconds / TICK))
        frame.pts, frame.time_base = self._last, TICK
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def import_av() -> Any:
    """The package `av`.

    Raises:
        PipelineError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise PipelineError(
            f"videos need a further package: {install_command('video')} ({error})"
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what is damaged is counted
    return av


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or first_line(error)
    return one_line(text)
