"""Follow the objects of a user's videos: an overlay video each, and one COCO JSON of tracks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from pipeline.engine.batching import batches
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.exporters.naming import UniqueNames
from pipeline.exporters.outputs import announced, announcing, check_own
from pipeline.files import (
    atomic_path,
    check_writable,
    given_path,
    native_path,
    read_json,
    replace_dir,
    utf8_text,
)
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.sources import image_files
from pipeline.formats.video import Frame, Video, VideoWriter, import_av, is_video, open_video
from pipeline.inference.coco import category_entries, object_annotation
from pipeline.inference.segmenter import Prediction, Segmenter
from pipeline.inference.tracking import Tracker
from pipeline.methods.students import student_of
from pipeline.models.weights.checkpoint import read_checkpoint_config
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.pictures.tracks import overlay_label_map, overlay_tracks

VIDEOS = "videos"
PREDICTIONS = "predictions.json"
STATS = "stats.json"
NUMBER = re.compile(r"(\d+)")
SECONDS_DIGITS = 6
RATE_PARTS = 100_000  # a fraction of FFmpeg has 32 bits above and below


@dataclass(frozen=True)
class Clip:
    """A video file, or a folder of its frames.

    Attributes:
        path: of it, UTF-8 text.
        frames: the frames' files in their order; empty for a video file.
        left_out: number of a folder's other files by kind.
    """

    path: Path
    frames: Sequence[Path] = ()
    left_out: Counter[str] = field(default_factory=Counter)


def run(
    *,
    inputs: Sequence[Path],
    categories: Sequence[str] | None,
    checkpoint_dir: Path,
    out_dir: Path,
    params: EvaluateParams,
    runtime: Runtime,
    every: int = 1,
    rate: float = 25.0,
) -> None:
    """Write `videos/NAME.mp4`, `predictions.json` and `stats.json`.

    `videos/NAME.mp4` shows a clip's objects in the colours of their tracks, or the label map of a
    network that finds no objects. `predictions.json` is a COCO file: `videos` (ids from 1,
    file_name, width, height, overlay), `images` (ids from 1, video_id, frame_index from 0, seconds,
    width, height, file_name), `annotations` (RLE, box, area, score, video_id, track_id),
    `tracks` (ids from 1 within a video, category_id, first and last frame_index, frames),
    `categories`, and `skipped`, the frames that could not be read. Frames are read one batch after
    the other. The outputs of an earlier run are replaced when everything is done.

    Args:
        inputs: video files, and folders whose images are the frames of one, by the numbers in their
            names.
        categories: any names; None for those of the checkpoint.
        checkpoint_dir: folder that the train stage wrote.
        out_dir: made if absent.
        params: section `evaluate` of params.yaml.
        runtime: device and precision.
        every: only each Nth frame.
        rate: frames a second of a folder, from 0.001 to 1000.

    Raises:
        PipelineError: a path that does not exist or is no video, none of whose frames can be read,
            a checkpoint or category that cannot be used, or an output that would replace something
            else.
    """
    clips = [_find(given_path(Path(path))) for path in inputs]
    import_av()
    replaced = _check_out(out_dir)
    lengths = [_length(clip) for clip in clips]
    folder = resolve_weights(checkpoint_dir, runtime.cache_dir)
    has_objects = student_of(folder, read_checkpoint_config(folder)).gives_objects
    segmenter = Segmenter.load(
        checkpoint_dir,
        categories=categories,
        settings=PredictionSettings.of(params),
        runtime=runtime,
    )
    total = None if None in lengths else sum(-(-(length or 0) // every) for length in lengths)
    with (
        StageRun("predict", stats_path=out_dir / STATS, total=total, unit="frame") as stage,
        # Left in reverse order: the videos first, then the file that makes the run complete;
        # until then, what was announced tells the next run that the videos are ours.
        announcing(out_dir) as announce,
        atomic_path(out_dir / PREDICTIONS) as json_path,
        replace_dir(out_dir / VIDEOS) as video_dir,
        json_path.open("w", encoding="utf-8") as file,
    ):
        output = _CocoVideoWriter(file)
        names = _overlay_names(clips)
        for clip, name in zip(clips, names, strict=True):
            stage.left_out.update(clip.left_out)
            follow = _Follow(segmenter, output, stage, has_objects=has_objects)
            path = video_dir / native_path(name)
            follow(clip, path, every=every, rate=rate, batch_size=params.batch_size)
        output.finish(segmenter.categories, stage.skipped)
        announce([*replaced, *(out_dir / VIDEOS / native_path(name) for name in names)])


class _Follow:
    """The work on a clip."""

    def __init__(
        self,
        segmenter: Segmenter,
        output: _CocoVideoWriter,
        stage: StageRun,
        *,
        has_objects: bool,
    ) -> None:
        self._segmenter = segmenter
        self._output = output
        self._stage = stage
        self._has_objects = has_objects

    def __call__(self, clip: Clip, path: Path, *, every: int, rate: float, batch_size: int) -> None:
        """Predict, link, draw and write frame by frame.

        Raises:
            PipelineError: none can be read.
        """
        tracker, count = Tracker(), 0
        indices: list[int] = []
        with ExitStack() as stack:
            video = stack.enter_context(_open(clip, rate))
            writer: VideoWriter | None = None
            frames = video.frames(every, self._damaged(clip))
            for batch in batches(frames, batch_size):
                predictions = self._segmenter.predict([frame.image for frame in batch])
                for frame, prediction in zip(batch, predictions, strict=True):
                    if writer is None:
                        size = frame.image.size
                        self._output.start(clip.path, size, f"{VIDEOS}/{path.name}")
                        shown = VideoWriter(path, size, video.rate / every)
                        writer = stack.enter_context(shown)
                    track_ids = tracker.update(prediction.instances)
                    writer.add(self._draw(frame, prediction, track_ids), frame.seconds)
                    self._output.add(frame, _file_name(clip, frame), prediction, track_ids)
                    indices.append(frame.index)
                    count += 1
                    self._stage.advance()
        if not count:
            reasons = [entry["reason"] for entry in self._stage.skipped] or ["there is none"]
            raise PipelineError(f"{clip.path}: no frame can be read; the last one: {reasons[-1]}")
        self._output.end(tracker, indices)
        self._stage.count("tracks", len(tracker.tracks))

    def _damaged(self, clip: Clip) -> Callable[[int, str], None]:
        return lambda index, reason: self._stage.skip(f"{clip.path}, frame {index}", reason)

    def _draw(self, frame: Frame, prediction: Prediction, track_ids: Sequence[int]) -> Image.Image:
        pixels = np.asarray(frame.image)
        if not self._has_objects:
            return overlay_label_map(pixels, prediction.semantic)
        names = prediction.categories
        return overlay_tracks(pixels, prediction.instances, track_ids, names=names)


def _find(path: Path) -> Clip:
    """The clip that a path stands for.

    Raises:
        PipelineError: it does not exist, or is a folder without an image or a file that is no
            video.
    """
    if not path.exists():
        raise PipelineError(f"{path}: no such file or folder")
    text = Path(utf8_text(str(path), path))
    if not path.is_dir():
        if not is_video(path):
            raise PipelineError(
                f"{path}: not the name of a video, such as CLIP.mp4; frames lie in a folder"
            )
        return Clip(text)
    left_out: Counter[str] = Counter()
    found = [Path(utf8_text(str(file), file)) for file in image_files(path, left_out)]
    if not found:
        raise PipelineError(f"{path}: no image; expected the frames of a video")
    return Clip(text, sorted(found, key=_numbers), left_out)


def _numbers(path: Path) -> list[tuple[int, str]]:
    """Sort key: of digits what they mean, so that 10 follows 9."""
    parts = NUMBER.split(path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _length(clip: Clip) -> int | None:
    """Number of frames, as far as it is known.

    Raises:
        PipelineError: a video that cannot be opened, before any network is loaded.
    """
    with _open(clip, 1.0) as video:
        return video.num_frames


def _open(clip: Clip, rate: float) -> AbstractContextManager[Video]:
    if not clip.frames:
        return open_video(native_path(clip.path))
    return _open_folder(clip, Fraction(rate).limit_denominator(RATE_PARTS))


@contextmanager
def _open_folder(clip: Clip, rate: Fraction) -> Iterator[Video]:
    def frames(every: int, damaged: Callable[[int, str], None]) -> Iterator[Frame]:
        for index in range(0, len(clip.frames), every):
            try:
                image = load_image(native_path(clip.frames[index]))
            except ImageError as error:
                damaged(index, str(error))
                continue
            yield Frame(index, index / rate, image)

    yield Video(len(clip.frames), rate, frames)


def _file_name(clip: Clip, frame: Frame) -> str:
    """Of the frame's own file, or of the video."""
    return (clip.frames[frame.index] if clip.frames else clip.path).as_posix()


def _overlay_names(clips: Sequence[Clip]) -> list[str]:
    """`NAME.mp4` of each clip, by which it can be recognised; no two are the same."""
    names = UniqueNames()
    stems = (clip.path.name if clip.frames else clip.path.stem for clip in clips)
    return [f"{names.take(stem or 'video')}.mp4" for stem in stems]


def _check_out(out_dir: Path) -> list[Path]:
    """Refuse a folder in which something would be replaced that no earlier run has written.

    Returns:
        The videos of earlier runs in it.

    Raises:
        PipelineError: with the name of such a thing.
        OSError: nothing can be written there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise PipelineError(f"--out {out_dir}: is a file; expected a folder")
    check_writable(out_dir / PREDICTIONS)
    videos = out_dir / VIDEOS
    inside = sorted(videos.iterdir()) if videos.is_dir() else [videos]
    ours = _written(out_dir)
    replaced = (out_dir / PREDICTIONS, out_dir / STATS, *inside)
    check_own(out_dir, replaced, ours, by="`pipeline predict` of a video")
    return [path for path in inside if path in ours]


def _written(out_dir: Path) -> set[Path]:
    """What earlier runs have written below `out_dir`: in `predictions.json`, or announced."""
    cut_off = announced(out_dir)
    try:
        videos = read_json(out_dir / PREDICTIONS)["videos"]
        names = [video["overlay"] for video in videos]
    except (PipelineError, KeyError, TypeError):  # none, or that of something else
        return cut_off
    return cut_off | {out_dir / native_path(name) for name in (PREDICTIONS, STATS, *names)}


class _CocoVideoWriter:
    """Writes a COCO file as frames come; of these only the entries are kept."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._videos: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._tracks: list[dict[str, Any]] = []
        self._num_annotations = 0
        file.write('{"annotations": [')

    def start(self, path: Path, size: tuple[int, int], overlay: str) -> None:
        """The next video: the file, (width, height) of its first frame, the overlay's name."""
        self._videos.append(
            {
                "id": len(self._videos) + 1,
                "file_name": path.as_posix(),
                "width": size[0],
                "height": size[1],
                "overlay": overlay,
            }
        )

    def add(
        self, frame: Frame, file_name: str, prediction: Prediction, track_ids: Sequence[int]
    ) -> None:
        """A frame of the video, and the objects in it with their tracks."""
        image_id, video_id = len(self._images) + 1, len(self._videos)
        self._images.append(
            {
                "id": image_id,
                "video_id": video_id,
                "frame_index": frame.index,
                "seconds": round(float(frame.seconds), SECONDS_DIGITS),
                "file_name": file_name,
                "width": frame.image.width,
                "height": frame.image.height,
            }
        )
        for instance, track_id in zip(prediction.instances, track_ids, strict=True):
            self._file.write(",\n" if self._num_annotations else "\n")
            self._num_annotations += 1
            annotation = object_annotation(
                instance, annotation_id=self._num_annotations, image_id=image_id
            )
            self._file.write(json.dumps({**annotation, "video_id": video_id, "track_id": track_id}))

    def end(self, tracker: Tracker, indices: Sequence[int]) -> None:
        """The tracks of the video, whose frames had these indices."""
        self._tracks += [
            {
                "id": track.track_id,
                "video_id": len(self._videos),
                "category_id": track.label_id,
                "first_frame": indices[track.first],
                "last_frame": indices[track.last],
                "frames": track.frames,
            }
            for track in tracker.tracks
        ]

    def finish(self, categories: Sequence[str], skipped: Sequence[dict[str, str]]) -> None:
        """Write what is left and close the JSON object."""
        for name, values in (
            ("videos", self._videos),
            ("images", self._images),
            ("tracks", self._tracks),
            ("categories", category_entries(categories)),
            ("skipped", skipped),
        ):
            lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
            self._file.write(f'\n],\n"{name}": [\n{lines}')
        self._file.write("\n]}\n")
