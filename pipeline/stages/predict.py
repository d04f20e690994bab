"""Segment a user's own images: one overlay each, one COCO JSON, and pictures of confidence."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import __version__
from pipeline.engine.batching import batches
from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError, counted
from pipeline.exporters.naming import UniqueNames
from pipeline.exporters.outputs import announced, announcing, check_own
from pipeline.files import (
    atomic_path,
    check_writable,
    file_sha256,
    given_path,
    native_path,
    read_json,
    replace_dir,
    utf8_text,
)
from pipeline.formats.images import EXTENSIONS, ImageError, load_image
from pipeline.formats.labels import Predicted
from pipeline.formats.sources import image_files
from pipeline.inference.coco import category_entries, encode_label_map, object_annotation
from pipeline.inference.confidence import find_name
from pipeline.inference.photos import LabellerOfPhotos, PhotoSegmenter
from pipeline.inference.prediction import Prediction
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.pictures.overlays import colour_map, grid, overlay_instances, overlay_semantic
from pipeline.vocabulary.categories import load_category_set, plain_name

if TYPE_CHECKING:  # torch, without which a network in ONNX's format predicts
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import PseudoLabelParams

OVERLAYS = "overlays"
LABELS = "labels"
CONFIDENCE = "confidence"
PREDICTIONS = "predictions.json"
STATS = "stats.json"
FOLDER_LENGTH = 60


def run(
    *,
    inputs: Sequence[Path],
    categories: Sequence[str] | None,
    checkpoint_dir: Path | None,
    out_dir: Path,
    params: EvaluateParams,
    runtime: Runtime | None,
    labeller: PseudoLabelParams | None = None,
    background: Sequence[str] = ("background",),
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    context: Sequence[str] = (),
    confidence: Sequence[str] = (),
    onnx_path: Path | None = None,
) -> None:
    """Write `overlays/NAME.png`, `labels/NAME.png`, `predictions.json` and `stats.json`.

    `labels/NAME.png` is the label map at the image's size: label ids from 1 in the order asked for,
    0 is background; a palette of up to 254 categories, 16-bit grey beyond.

    `predictions.json` is a COCO file: images (an id from 1, width, height, file_name, and
    `overlay` and `labels`, the pictures' names), annotations (ids from 1, RLE with text counts, box
    x y width height, area, score), categories (ids from 1, in the order asked for), `skipped`, the
    images that could not be read, and `info`: version and checkpoint with the hash of its weights,
    or dense labeller. Pictures of confidence are `confidence/CATEGORY/NAME.png`, grey, at the
    image's size, 255 where the model is sure of the category; an image's `confidence` names them by
    category. `stats.json` counts other files by kind, as `left_out`, and names as
    `never_predicted` the categories without a pixel in any label map. The outputs of
    an earlier run are replaced when everything is done.

    Args:
        inputs: image files, and folders that are searched through all levels.
        categories: any names; None for those of the checkpoint.
        checkpoint_dir: folder that the train stage wrote; None for the dense labeller alone, which
            needs `categories`.
        out_dir: made if absent; pictures that this stage made, here or elsewhere below the
            inputs, are never taken as inputs.
        params: section `evaluate` of params.yaml.
        runtime: device and precision; None with `onnx_path`, which needs no torch.
        labeller: section `pseudo_label`, where there is no checkpoint.
        background: names of label id 0 for it; a checkpoint brings its own.
        texts: what stands for a category in its prompts, see `Names`; a checkpoint brings its own.
        context: names that are asked for too, but drawn black.
        confidence: those of the names asked for whose probability is drawn.
        onnx_path: a network that was exported, in place of a checkpoint; of its names and with its
            own settings, whatever `params` say but for `min_score`.

    Raises:
        PipelineError: a path that does not exist, no image, none that can be read, a checkpoint or
            category that cannot be used, a name of `confidence` that is not asked for, or an output
            that would replace something else.
    """
    left_out: Counter[str] = Counter()
    paths = list_inputs(inputs, left_out)
    replaced = _check_out(out_dir)
    if onnx_path is not None:
        segmenter = _load_onnx(onnx_path, categories, context, params.min_score)
    elif runtime is None:
        raise ValueError("runtime: a checkpoint and a dense labeller need one")
    else:
        segmenter = _load(
            _asked(categories, context, checkpoint_dir, runtime),
            checkpoint_dir=checkpoint_dir,
            labeller=labeller,
            background=background,
            texts=texts,
            settings=PredictionSettings.of(params),
            runtime=runtime,
        )
    places = [find_name(name, segmenter.categories, field="--confidence") for name in confidence]
    drawn = _folder_names([segmenter.categories[place] for place in places])
    context_ids = [1 + find_name(name, segmenter.categories, field="--context") for name in context]
    with (
        StageRun("predict", stats_path=out_dir / STATS, total=len(paths)) as stage,
        # Left in reverse order: the pictures first, then the file that makes the run complete;
        # until then, what was announced tells the next run that the pictures are ours.
        announcing(out_dir) as announce,
        atomic_path(out_dir / PREDICTIONS) as json_path,
        replace_dir(out_dir / OVERLAYS) as overlay_dir,
        replace_dir(out_dir / LABELS) as labels_dir,
        _confidence_dir(out_dir / CONFIDENCE, drawn.values()) as confidence_dir,
        json_path.open("w", encoding="utf-8") as file,
    ):
        stage.left_out.update(left_out)
        output = _CocoWriter(file)
        names = UniqueNames()
        predicted = Predicted(segmenter.categories)
        for batch in batches(_load_images(paths, stage), params.batch_size):
            predictions = segmenter.predict([image for _, image in batch])
            for (path, image), prediction in zip(batch, predictions, strict=True):
                name = f"{names.take(path.stem)}.png"
                _draw(image, prediction, context_ids).save(overlay_dir / native_path(name))
                predicted.add(prediction.semantic)
                data = encode_label_map(prediction)
                (labels_dir / native_path(name)).write_bytes(data)
                for category, folder in drawn.items():
                    picture = _draw_confidence(segmenter.confidence(image, category))
                    picture.save(confidence_dir / native_path(f"{folder}/{name}"))
                maps = {category: f"{CONFIDENCE}/{drawn[category]}/{name}" for category in drawn}
                output.add(path, image, prediction, name=name, confidence=maps)
                stage.advance()
        if not stage.items:
            raise PipelineError(
                f"{inputs[0]}: none of {len(paths)} images can be read; the first one, "
                f"{stage.skipped[0]['item']}: {stage.skipped[0]['reason']}"
            )
        stage.note("never_predicted", predicted.never())
        output.finish(
            segmenter.categories,
            stage.skipped,
            info=_made_by(checkpoint_dir, labeller, runtime, onnx_path),
        )
        announce([*replaced, *(out_dir / native_path(name) for name in output.pictures())])


def _load_onnx(
    path: Path, categories: Sequence[str] | None, context: Sequence[str], min_score: float | None
) -> PhotoSegmenter:
    from pipeline.inference.onnx import OnnxSegmenter

    segmenter = OnnxSegmenter.load(path)
    if min_score is not None:
        of_all = {"min_score": min_score, "min_scores": {}}
        segmenter.settings = segmenter.settings.model_copy(update=of_all)
    asked = segmenter.categories if categories is None else categories
    return segmenter.select(_with_context(asked, context))


def _asked(
    categories: Sequence[str] | None,
    context: Sequence[str],
    checkpoint_dir: Path | None,
    runtime: Runtime,
) -> list[str] | None:
    """The categories, and those names of the context that are none; None for the trained ones."""
    if categories is None and context and checkpoint_dir is not None:
        from pipeline.models.weights.checkpoint import read_checkpoint_config
        from pipeline.models.weights.zoo import resolve_weights

        folder = resolve_weights(checkpoint_dir, runtime.cache_dir)
        categories = read_checkpoint_config(folder).categories
    return None if categories is None else _with_context(categories, context)


def _with_context(categories: Sequence[str], context: Sequence[str]) -> list[str]:
    """The categories, and those names of the context that are none."""
    known = {plain_name(name) for name in categories}
    return [*categories, *(name for name in context if plain_name(name) not in known)]


def _load(
    categories: list[str] | None,
    *,
    checkpoint_dir: Path | None,
    labeller: PseudoLabelParams | None,
    background: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    settings: PredictionSettings,
    runtime: Runtime,
) -> PhotoSegmenter:
    """A checkpoint, or the dense labeller where there is none."""
    from pipeline.inference.labeller import Labeller
    from pipeline.inference.segmenter import Segmenter

    if checkpoint_dir is not None:
        return Segmenter.load(
            checkpoint_dir, categories=categories, settings=settings, runtime=runtime
        )
    if labeller is None or categories is None:
        raise ValueError("without a checkpoint, a dense labeller and its categories are needed")
    return LabellerOfPhotos(
        Labeller.load(
            labeller,
            categories=load_category_set(categories),
            background=background,
            texts=texts,
            settings=settings,
            runtime=runtime,
        )
    )


def _made_by(
    checkpoint_dir: Path | None,
    labeller: PseudoLabelParams | None,
    runtime: Runtime | None,
    onnx_path: Path | None,
) -> dict[str, str]:
    """What predicts, and the version of this package."""
    info = {"version": __version__}
    if onnx_path is not None:
        return info | {"onnx": str(onnx_path), "weights": file_sha256(onnx_path)}
    if checkpoint_dir is not None and runtime is not None:
        from pipeline.models.weights.checkpoint import WEIGHTS_NAME
        from pipeline.models.weights.zoo import resolve_weights

        weights = resolve_weights(checkpoint_dir, runtime.cache_dir) / WEIGHTS_NAME
        return info | {"checkpoint": str(checkpoint_dir), "weights": file_sha256(weights)}
    return info | ({"model": labeller.method} if labeller else {})


def _folder_names(categories: Sequence[str]) -> dict[str, str]:
    """A folder's name for each category, in which it can be recognised."""
    names = UniqueNames()
    return {
        category: names.take(re.sub(r"\W+", "_", category)[:FOLDER_LENGTH].strip("_") or "name")
        for category in dict.fromkeys(categories)
    }


@contextmanager
def _confidence_dir(path: Path, folders: Collection[str]) -> Iterator[Path]:
    """A folder with these folders in place of `path`; without any, that of an earlier run goes."""
    if not folders:
        yield path
        shutil.rmtree(path, ignore_errors=True)
        return
    with replace_dir(path) as temporary:
        for folder in folders:
            (temporary / native_path(folder)).mkdir()
        yield temporary


def list_inputs(inputs: Sequence[Path], left_out: Counter[str] | None = None) -> list[Path]:
    """The image files that `inputs` stand for, each once, folders in sorted order.

    Of a folder those count that the stage embed would list; pictures that this stage made, here or
    elsewhere, do not. A file that is named counts always.

    Args:
        inputs: files and folders; a leading `~` is expanded.
        left_out: learns how many files of which kind are no images, and how many were seen twice.

    Returns:
        Paths as UTF-8 text; `native_path` opens them under any locale.

    Raises:
        PipelineError: a path does not exist or is not UTF-8, a folder cannot be listed, or there is
            no image.
    """
    left_out = Counter() if left_out is None else left_out
    pictures_of = cache(_pictures_of_predict)
    found: dict[str, Path] = {}
    for path in map(given_path, map(Path, inputs)):
        if not path.exists():
            raise PipelineError(f"{path}: no such file or folder")
        for file in image_files(path, left_out) if path.is_dir() else [path]:
            if file is not path and file in pictures_of(file.parent):
                continue
            text = Path(utf8_text(str(file), file))
            if found.setdefault(os.path.realpath(file), text) is not text:
                left_out["seen twice"] += 1
    if not found:
        listed = ", ".join(map(str, inputs)) or "no path"
        others = f"; left out: {counted(left_out)}" if left_out else ""
        raise PipelineError(
            f"{listed}: no image; expected files of {', '.join(EXTENSIONS)}{others}"
        )
    return list(found.values())


def _check_out(out_dir: Path) -> list[Path]:
    """Refuse a folder in which something would be replaced that no earlier run has written.

    Returns:
        The pictures of earlier runs in it.

    Raises:
        PipelineError: with the name of such a thing.
        OSError: nothing can be written there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise PipelineError(f"--out {out_dir}: is a file; expected a folder")
    check_writable(out_dir / PREDICTIONS)
    ours = _written_by_predict(out_dir)
    pictures = _entries(out_dir / OVERLAYS) + _entries(out_dir / LABELS)
    for folder in _entries(out_dir / CONFIDENCE):
        pictures += _entries(folder)
    replaced = (out_dir / PREDICTIONS, out_dir / STATS, *pictures)
    check_own(out_dir, replaced, ours, by="`pipeline predict`")
    return [path for path in pictures if path in ours]


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files aside; the path itself if it is none."""
    if not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _written_by_predict(out_dir: Path) -> set[Path]:
    """What earlier runs have written below `out_dir`: in `predictions.json`, or announced."""
    cut_off = announced(out_dir)
    try:
        pictures = _pictures(read_json(out_dir / PREDICTIONS)["images"])
        return cut_off | {out_dir / native_path(name) for name in (PREDICTIONS, STATS, *pictures)}
    except (PipelineError, KeyError, TypeError, AttributeError):  # none, or that of something else
        return cut_off


def _pictures(images: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all pictures of `images` of a `predictions.json`."""
    names: list[str] = []
    for image in images:
        names.append(image["overlay"])
        if "labels" in image:
            names.append(image["labels"])
        names += image.get("confidence", {}).values()
    return names


def _pictures_of_predict(folder: Path) -> set[Path]:
    """Those pictures in a folder that an earlier run has written."""
    if folder.name in (OVERLAYS, LABELS):
        return _written_by_predict(folder.parent)
    if folder.parent.name == CONFIDENCE:
        return _written_by_predict(folder.parent.parent)
    return set()


def _load_images(paths: Iterable[Path], stage: StageRun) -> Iterator[tuple[Path, Image.Image]]:
    for path in paths:
        try:
            yield path, load_image(native_path(path))
        except ImageError as error:
            stage.skip(str(path), str(error))


def _draw(image: Image.Image, prediction: Prediction, context: Collection[int]) -> Image.Image:
    """Objects and label map side by side, the context black."""
    pixels, names = np.asarray(image), prediction.categories
    palette = colour_map(len(names) + 1)
    return grid(
        [
            overlay_instances(pixels, prediction.instances, names=names, context=context),
            overlay_semantic(pixels, prediction.semantic, palette, names=names, context=context),
        ],
        columns=2,
    )


def _draw_confidence(probability: NDArray[np.float32]) -> Image.Image:
    """Grey: black for 0, white for 1."""
    return Image.fromarray((255 * probability).round().astype(np.uint8))


class _CocoWriter:
    """Writes a COCO file as predictions come; only the entries of the images are kept."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._images: list[dict[str, Any]] = []
        self._num_annotations = 0
        file.write('{"annotations": [')

    def add(
        self,
        path: Path,
        image: Image.Image,
        prediction: Prediction,
        *,
        name: str,
        confidence: Mapping[str, str],
    ) -> None:
        """Write the objects of one image, whose pictures have this name."""
        image_id = len(self._images) + 1
        self._images.append(
            {
                "id": image_id,
                "file_name": path.as_posix(),
                "width": image.width,
                "height": image.height,
                "overlay": f"{OVERLAYS}/{name}",
                "labels": f"{LABELS}/{name}",
                **({"confidence": dict(confidence)} if confidence else {}),
            }
        )
        for instance in prediction.instances:
            self._file.write(",\n" if self._num_annotations else "\n")
            self._num_annotations += 1
            annotation = object_annotation(
                instance, annotation_id=self._num_annotations, image_id=image_id
            )
            self._file.write(json.dumps(annotation))

    def pictures(self) -> list[str]:
        """The names of the pictures of all images so far."""
        return _pictures(self._images)

    def finish(
        self,
        categories: Sequence[str],
        skipped: Sequence[dict[str, str]],
        *,
        info: Mapping[str, str],
    ) -> None:
        """Write what is left and close the JSON object."""
        for name, values in (
            ("images", self._images),
            ("categories", category_entries(categories)),
            ("skipped", skipped),
        ):
            lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
            self._file.write(f'\n],\n"{name}": [\n{lines}')
        self._file.write(f'\n],\n"info": {json.dumps(info, ensure_ascii=False)}}}\n')
