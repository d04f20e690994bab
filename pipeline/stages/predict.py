"""Segment a user's own images: one overlay each, and one COCO JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from pipeline.engine.batching import batches
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import atomic_path, check_writable, read_json, replace_dir
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.rle import coco_annotation, encode_crop
from pipeline.formats.sources import EXTENSIONS, check_utf8
from pipeline.inference.segmenter import Prediction, Segmenter
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.pictures.overlays import colour_map, grid, overlay_instances, overlay_semantic

OVERLAYS = "overlays"
PREDICTIONS = "predictions.json"
STATS = "stats.json"
SCORE_DIGITS = 6


def run(
    *,
    inputs: Sequence[Path],
    categories: Sequence[str] | None,
    checkpoint_dir: Path,
    out_dir: Path,
    params: EvaluateParams,
    runtime: Runtime,
) -> None:
    """Write `overlays/NAME.png`, `predictions.json` and `stats.json` below `out_dir`.

    `predictions.json` is a COCO file: images (an id from 1, width, height, file_name, and
    `overlay`, the picture's name), annotations (ids from 1, RLE with text counts, box x y width
    height, area, score), categories (ids from 1, in the order asked for), and `skipped`, the images
    that could not be read. The outputs of an earlier run are replaced when everything is done.

    Args:
        inputs: image files, and folders that are searched through all levels.
        categories: any names; None for those of the checkpoint.
        checkpoint_dir: folder that the train stage wrote.
        out_dir: made if absent; pictures that this stage made, here or elsewhere below the
            inputs, are never taken as inputs.
        params: section `evaluate` of params.yaml.
        runtime: device and precision.

    Raises:
        PipelineError: a path that does not exist, no image, none that can be read, a checkpoint or
            category that cannot be used, or an output that would replace something else.
    """
    paths = list_inputs(inputs)
    _check_out(out_dir)
    segmenter = Segmenter.load(
        checkpoint_dir,
        categories=categories,
        settings=PredictionSettings.of(params),
        runtime=runtime,
    )
    with (
        StageRun("predict", stats_path=out_dir / STATS, total=len(paths)) as stage,
        # Left in reverse order: the overlays first, then the file that makes the run complete.
        atomic_path(out_dir / PREDICTIONS) as json_path,
        replace_dir(out_dir / OVERLAYS) as overlay_dir,
        json_path.open("w", encoding="utf-8") as file,
    ):
        output = _CocoWriter(file)
        names = _UniqueNames()
        for batch in batches(_load(paths, stage), params.batch_size):
            predictions = segmenter.predict([image for _, image in batch])
            for (path, image), prediction in zip(batch, predictions, strict=True):
                name = f"{names.take(path.stem)}.png"
                _draw(image, prediction).save(overlay_dir / name)
                output.add(path, image, prediction, overlay=f"{OVERLAYS}/{name}")
                stage.advance()
        if not stage.items:
            raise PipelineError(
                f"{inputs[0]}: none of {len(paths)} images can be read; the first one, "
                f"{stage.skipped[0]['item']}: {stage.skipped[0]['reason']}"
            )
        output.finish(segmenter.categories, stage.skipped)


def list_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The image files that `inputs` stand for, each once, folders in sorted order.

    Of a folder the files with an image's extension count; hidden ones and pictures that this stage
    made, here or elsewhere, do not. A file that is named counts always.

    Raises:
        PipelineError: a path does not exist or is not UTF-8, or there is no image.
    """
    pictures_of = cache(_pictures_of_predict)
    found: dict[Path, Path] = {}
    for path in map(Path, inputs):
        if not path.exists():
            raise PipelineError(f"{path}: no such file or folder")
        files = [path] if path.is_file() else _images_below(path)
        for file in files:
            check_utf8(str(file), file)
            if file is path or file not in pictures_of(file.parent):
                found.setdefault(file.resolve(), file)
    if not found:
        listed = ", ".join(map(str, inputs)) or "no path"
        raise PipelineError(f"{listed}: no image; expected files of {', '.join(EXTENSIONS)}")
    return list(found.values())


def _images_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _check_out(out_dir: Path) -> None:
    """Refuse a folder in which something would be replaced that no earlier run has written.

    Raises:
        PipelineError: with the name of such a thing.
        OSError: nothing can be written there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise PipelineError(f"--out {out_dir}: is a file; expected a folder")
    check_writable(out_dir / PREDICTIONS)
    ours = _written_by_predict(out_dir)
    for path in (out_dir / PREDICTIONS, out_dir / STATS, *_entries(out_dir / OVERLAYS)):
        if os.path.lexists(path) and path not in ours:
            raise PipelineError(
                f"--out {out_dir}: {path.relative_to(out_dir)} was not written by `pipeline "
                "predict` and would be replaced; choose another folder, or move it away"
            )


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files aside; the path itself if it is none."""
    if not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _written_by_predict(out_dir: Path) -> set[Path]:
    """What an earlier run has written below `out_dir`, as its `predictions.json` lists it."""
    try:
        pictures = [image["overlay"] for image in read_json(out_dir / PREDICTIONS)["images"]]
        return {out_dir / name for name in (PREDICTIONS, STATS, *pictures)}
    except (PipelineError, KeyError, TypeError):  # none, or that of something else
        return set()


def _pictures_of_predict(folder: Path) -> set[Path]:
    """Those pictures in a folder that an earlier run has written."""
    return _written_by_predict(folder.parent) if folder.name == OVERLAYS else set()


def _load(paths: Iterable[Path], stage: StageRun) -> Iterator[tuple[Path, Image.Image]]:
    for path in paths:
        try:
            yield path, load_image(path)
        except ImageError as error:
            stage.skip(str(path), str(error))


def _draw(image: Image.Image, prediction: Prediction) -> Image.Image:
    """Objects and label map side by side."""
    pixels, names = np.asarray(image), prediction.categories
    palette = colour_map(len(names) + 1)
    return grid(
        [
            overlay_instances(pixels, prediction.instances, names=names),
            overlay_semantic(pixels, prediction.semantic, palette, names=names),
        ],
        columns=2,
    )


class _UniqueNames:
    """File names that differ even where upper and lower case are the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, stem: str) -> str:
        """`stem`, or with the first free number from 2."""
        candidates = chain([stem], (f"{stem}_{number}" for number in count(2)))
        name = next(name for name in candidates if name.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return name


class _CocoWriter:
    """Writes a COCO file as predictions come; only the entries of the images are kept."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._images: list[dict[str, Any]] = []
        self._num_annotations = 0
        file.write('{"annotations": [')

    def add(self, path: Path, image: Image.Image, prediction: Prediction, *, overlay: str) -> None:
        """Write the objects of one image."""
        image_id = len(self._images) + 1
        self._images.append(
            {
                "id": image_id,
                "file_name": path.as_posix(),
                "width": image.width,
                "height": image.height,
                "overlay": overlay,
            }
        )
        for instance in prediction.instances:
            self._file.write(",\n" if self._num_annotations else "\n")
            self._num_annotations += 1
            annotation = coco_annotation(
                encode_crop(instance.crop, instance.bbox_xyxy, instance.size),
                annotation_id=self._num_annotations,
                image_id=image_id,
                category_id=instance.label_id,
                score=round(instance.score, SCORE_DIGITS),
            )
            self._file.write(json.dumps(annotation))

    def finish(self, categories: Sequence[str], skipped: Sequence[dict[str, str]]) -> None:
        """Write what is left and close the JSON object."""
        listed = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
        for name, values in (
            ("images", self._images),
            ("categories", listed),
            ("skipped", skipped),
        ):
            lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
            self._file.write(f'\n],\n"{name}": [\n{lines}')
        self._file.write("\n]}\n")
