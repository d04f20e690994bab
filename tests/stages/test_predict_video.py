"""Prediction on videos: overlay videos, and one COCO JSON of tracks."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import load_image
from pipeline.formats.video import VideoWriter, open_video
from pipeline.inference.segmenter import Segmenter
from pipeline.inference.tracking import Tracker
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.stages import predict_video
from tests.conftest import encoded_image, noise_image
from tests.processes import killed_after_moves
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint

pytest.importorskip("av")


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "zutis", tiny_clip)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Nine frames of an odd size, the same picture three times each."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, (57, 41), Fraction(10)) as writer:
        for index in range(9):
            writer.add(noise_image(index // 3, 57, 41), Fraction(index, 10))
    return path


@pytest.fixture
def frames_dir(tmp_path: Path) -> Path:
    """Frames whose names sort by number, one damaged, one of another size, beside a note."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (1, 2, 9, 10, 11):
        size = (60, 40) if number == 10 else (40, 56)
        (folder / f"f{number}.png").write_bytes(encoded_image(noise_image(number, *size)))
    (folder / "f9.png").write_bytes(b"\x89PNG broken")
    (folder / "IMG.heic").write_text("no image")
    return folder


def predict(
    out_dir: Path, inputs: list[Path], checkpoint_dir: Path, runtime: Runtime, **options: object
) -> dict:
    arguments = {"categories": None, "params": EvaluateParams(batch_size=2)} | options
    predict_video.run(
        inputs=inputs,
        checkpoint_dir=checkpoint_dir,
        out_dir=out_dir,
        runtime=runtime,
        **arguments,
    )
    return json.loads((out_dir / "predictions.json").read_text())


def test_objects_and_tracks_are_those_of_the_frames(
    clip: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    content = predict(tmp_path / "out", [clip], checkpoint_dir, runtime)
    segmenter = Segmenter.load(
        checkpoint_dir, runtime=runtime, settings=PredictionSettings.of(EvaluateParams())
    )
    tracker, annotations = Tracker(), iter(content["annotations"])
    with open_video(clip) as video:
        frames = list(video.frames(1, lambda *_: pytest.fail("damaged")))
    assert len(content["images"]) == len(frames) == 9
    for frame, image in zip(frames, content["images"], strict=True):
        assert image["frame_index"] == frame.index
        assert image["seconds"] == pytest.approx(float(frame.seconds), abs=1e-5)
        assert (image["video_id"], image["width"], image["height"]) == (1, 58, 42)
        found = segmenter.predict([frame.image])[0].instances
        for instance, track_id in zip(found, tracker.update(found), strict=True):
            annotation = next(annotations)
            assert annotation["image_id"] == image["id"]
            assert annotation["video_id"] == 1
            assert annotation["track_id"] == track_id
            assert annotation["category_id"] == instance.label_id
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            assert (mask != instance.mask).mean() < 0.01
    assert next(annotations, None) is None
    assert content["annotations"]
    assert [item["name"] for item in content["categories"]] == CATEGORIES
    for track in content["tracks"]:
        seen = [item for item in content["annotations"] if item["track_id"] == track["id"]]
        indices = [content["images"][item["image_id"] - 1]["frame_index"] for item in seen]
        assert (track["first_frame"], track["last_frame"]) == (indices[0], indices[-1])
        assert track["frames"] == len(seen)
        assert {item["category_id"] for item in seen} == {track["category_id"]}
    # The same picture has the same objects.
    by_image = [
        [item["track_id"] for item in content["annotations"] if item["image_id"] == image_id]
        for image_id in (1, 2)
    ]
    assert by_image[0] == by_image[1]
    assert COCO(tmp_path / "out" / "predictions.json").getImgIds() == list(range(1, 10))


def test_the_overlay_has_the_frames_of_the_clip_in_its_time(
    clip: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    content = predict(tmp_path / "out", [clip], checkpoint_dir, runtime, every=2)
    assert [image["frame_index"] for image in content["images"]] == [0, 2, 4, 6, 8]
    with open_video(tmp_path / "out" / content["videos"][0]["overlay"]) as video:
        frames = list(video.frames(1, lambda *_: pytest.fail("damaged")))
    assert [float(frame.seconds) for frame in frames] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert frames[0].image.size == (58, 42)
    with open_video(clip) as video:
        original = next(video.frames(1, lambda *_: None))
    assert np.any(np.asarray(frames[0].image) != np.asarray(original.image))


def test_a_folder_of_frames(
    frames_dir: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    content = predict(tmp_path / "out", [frames_dir], checkpoint_dir, runtime, rate=4.0)
    assert [Path(image["file_name"]).name for image in content["images"]] == [
        *("f1.png", "f2.png", "f10.png", "f11.png")
    ]
    assert [image["frame_index"] for image in content["images"]] == [0, 1, 3, 4]
    assert [image["seconds"] for image in content["images"]] == [0, 0.25, 0.75, 1]
    assert content["images"][2]["width"] == 60
    assert [(s["item"].rpartition("/")[2]) for s in content["skipped"]] == ["frames, frame 2"]
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert (stats["items"], stats["skipped"]) == (4, 1)
    assert stats["left_out"] == {".heic": 1}
    assert (tmp_path / "out" / "videos" / "frames.mp4").is_file()
    load_image(frames_dir / "f1.png")  # what was read is left alone


@pytest.mark.parametrize("rate", [29.97, 0.001, 1000.0])
def test_any_rate_that_the_command_takes(
    frames_dir: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime, rate: float
) -> None:
    content = predict(tmp_path / "out", [frames_dir], checkpoint_dir, runtime, rate=rate)
    seconds = [image["seconds"] for image in content["images"]]
    assert seconds == pytest.approx([index / rate for index in (0, 1, 3, 4)], abs=1e-6)
    with open_video(tmp_path / "out/videos/frames.mp4") as video:
        shown = [float(frame.seconds) for frame in video.frames(1, lambda *_: None)]
    assert shown == pytest.approx(seconds, abs=1 / 90_000)


def test_several_clips_have_videos_and_tracks_of_their_own(
    clip: Path, frames_dir: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    other = tmp_path / "deep" / "Clip.mp4"
    other.parent.mkdir()
    other.write_bytes(clip.read_bytes())
    inputs = [clip, other, frames_dir]
    content = predict(tmp_path / "out", inputs, checkpoint_dir, runtime)
    names = [video["overlay"] for video in content["videos"]]
    assert names == ["videos/clip.mp4", "videos/Clip_2.mp4", "videos/frames.mp4"]
    assert [video["id"] for video in content["videos"]] == [1, 2, 3]
    first, second = (
        [{**track, "video_id": 0} for track in content["tracks"] if track["video_id"] == number]
        for number in (1, 2)
    )
    assert first == second
    # Again over its own outputs.
    assert predict(tmp_path / "out", inputs, checkpoint_dir, runtime) == content


def test_a_run_killed_anywhere_can_be_run_again(
    frames_dir: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "1.png").write_bytes((frames_dir / "f1.png").read_bytes())
    moves = 1
    while killed_after_moves(
        lambda: predict(out_dir, [frames_dir], checkpoint_dir, runtime), moves
    ):
        killed_after_moves(lambda: predict(out_dir, [other], checkpoint_dir, runtime), moves)
        moves += 1
    assert moves > 4  # the list, the videos, predictions.json and the stats
    predict(out_dir, [frames_dir], checkpoint_dir, runtime)
    left = [path for path in out_dir.iterdir() if path.suffix not in (".tmp", ".old")]
    assert sorted(path.name for path in left) == ["predictions.json", "stats.json", "videos"]
    assert [path.name for path in (out_dir / "videos").iterdir()] == ["frames.mp4"]


def test_what_was_added_to_the_videos_of_a_killed_run_is_not_replaced(
    frames_dir: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = tmp_path / "out"
    assert killed_after_moves(lambda: predict(out_dir, [frames_dir], checkpoint_dir, runtime), 2)
    (out_dir / "videos/mine.mp4").write_bytes(b"mine")
    with pytest.raises(PipelineError, match=r"videos/mine\.mp4 was not written by"):
        predict(out_dir, [frames_dir], checkpoint_dir, runtime)
    assert (out_dir / "videos/mine.mp4").read_bytes() == b"mine"


def test_what_cannot_be_read_or_would_be_replaced_is_named(
    clip: Path, tmp_path: Path, checkpoint_dir: Path, runtime: Runtime
) -> None:
    out_dir = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG broken")
    for path, message in (
        (tmp_path / "none.mp4", "no such file"),
        (empty, "no image; expected the frames"),
        (checkpoint_dir / "config.json", "not the name of a video"),
        (broken, "no frame can be read"),
    ):
        with pytest.raises(PipelineError, match=message):
            predict(out_dir, [path], checkpoint_dir, runtime)
    assert not (out_dir / "predictions.json").exists()
    out_dir.mkdir(exist_ok=True)
    (out_dir / "predictions.json").write_text('{"images": []}')
    with pytest.raises(PipelineError, match=r"predictions\.json was not written by"):
        predict(out_dir, [clip], checkpoint_dir, runtime)
