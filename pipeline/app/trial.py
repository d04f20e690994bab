"""Photos that are tried: segmented in memory, kept until a few others have come."""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.app.opened import MissingError, not_made
from pipeline.app.pictures import draw_confidence
from pipeline.app.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, encode_jpeg, encode_png, load_image
from pipeline.formats.predictions import Instance
from pipeline.inference.coco import category_entries, encode_label_map, object_annotation
from pipeline.pictures.overlays import (
    colour_map,
    displayed,
    grid,
    overlay_instances,
    overlay_semantic,
)
from pipeline.pictures.report import fit_image
from pipeline.vocabulary.categories import load_category_set

if TYPE_CHECKING:
    from pipeline.inference.prediction import Prediction
    from pipeline.inference.segmenter import Segmenter

MAX_PIXELS = 40_000_000
MAX_SIDE = 1280
MAX_NAMES = 200
KEPT_TRIALS, KEPT_SEGMENTERS = 6, 2


@dataclass(frozen=True)
class Trial:
    """A photo with what was found in it.

    Attributes:
        token: its name in addresses.
        image: RGB, as it was segmented.
        original_size: (width, height) of the photo.
        prediction: label map and objects.
        names: what was asked for.
        version: of the checkpoint.
    """

    token: str
    image: Image.Image
    original_size: tuple[int, int]
    prediction: Prediction
    names: tuple[str, ...]
    version: int


class Trials:
    """Segments photos, one at a time, and remembers the last few.

    Args:
        workspace: whose checkpoint segments.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._working = threading.Lock()
        self._trials: OrderedDict[str, Trial] = OrderedDict()
        self._segmenters: OrderedDict[tuple[str, ...], Segmenter] = OrderedDict()
        self._version = 0

    @property
    def is_trained(self) -> bool:
        """Whether there is a network."""
        return self._weights.is_file()

    @property
    def _weights(self) -> Path:
        from pipeline.models.weights.checkpoint import WEIGHTS_NAME

        return self._workspace.checkpoint / WEIGHTS_NAME

    def segment(self, data: bytes, names: Sequence[str]) -> Trial:
        """Find some names in a photo.

        A photo larger than `MAX_SIDE` is reduced to that first.

        Args:
            data: its file.
            names: any names that the encoder knows; none for those of the training.

        Raises:
            PipelineError: no photo, too large a one, a name that cannot be used, or no checkpoint.
        """
        try:
            photo = load_image(data, max_pixels=MAX_PIXELS)
        except ImageError as error:
            raise PipelineError(
                f"the photo cannot be used: {error}; take a JPEG, PNG or WebP of at most "
                f"{MAX_PIXELS // 10**6} megapixels"
            ) from None
        if len(names) > MAX_NAMES:
            raise PipelineError(f"{len(names)} names, at most {MAX_NAMES}")
        image = fit_image(photo, MAX_SIDE)
        with self._working:
            segmenter = self._segmenter(names)
            prediction = segmenter.predict([image])[0]
            token = secrets.token_urlsafe(12)
            trial = Trial(token, image, photo.size, prediction, tuple(names), self._version)
            self._trials[token] = trial
            while len(self._trials) > KEPT_TRIALS:
                self._trials.popitem(last=False)
        return trial

    def get(self, token: str) -> Trial:
        """A photo of the last few.

        Raises:
            MissingError: it is none of them.
        """
        trial = self._trials.get(token)
        if trial is None:
            raise MissingError("this photo is no longer kept; drop it again")
        return trial

    def confidence(self, trial: Trial, name: str) -> bytes:
        """PNG of the probability of one name at each pixel.

        Raises:
            PipelineError: it is none of the names asked for.
            MissingError: there is another checkpoint since.
        """
        with self._working:
            segmenter = self._segmenter(trial.names)
            if trial.version != self._version:
                raise MissingError("the network was trained anew since; drop the photo again")
            probability = segmenter.confidence(trial.image, name)
        return encode_png(np.asarray(displayed(draw_confidence(probability))))

    def _segmenter(self, names: Sequence[str]) -> Segmenter:
        """The network of the checkpoint in force for some names; the last ones stay loaded."""
        from pipeline.inference.segmenter import Segmenter
        from pipeline.params.base import PredictionSettings

        folder, weights = self._workspace.checkpoint, self._weights
        if not weights.is_file():
            raise not_made(folder, "pipeline train")
        if weights.stat().st_mtime_ns != self._version:
            self._segmenters.clear()
            self._version = weights.stat().st_mtime_ns
        key = tuple(names)
        if key not in self._segmenters:
            self._segmenters[key] = Segmenter.load(
                folder,
                categories=load_category_set(list(names), field="names") if names else None,
                settings=PredictionSettings.of(self._workspace.params.evaluate),
                runtime=self._workspace.runtime(),
            )
        self._segmenters.move_to_end(key)
        while len(self._segmenters) > KEPT_SEGMENTERS:
            self._segmenters.popitem(last=False)
        return self._segmenters[key]


def draw_objects(trial: Trial, threshold: float) -> Image.Image:
    """The objects of this score or more over the photo."""
    objects = _objects(trial, threshold)
    return overlay_instances(np.asarray(trial.image), objects, names=trial.prediction.categories)


def draw_semantic(trial: Trial) -> Image.Image:
    """The label map over the photo, with a legend."""
    names = trial.prediction.categories
    palette = colour_map(len(names) + 1)
    return overlay_semantic(
        np.asarray(trial.image), trial.prediction.semantic, palette, names=names
    )


def overlay_file(trial: Trial, threshold: float) -> bytes:
    """PNG of objects and label map side by side, as `pipeline predict` draws them."""
    picture = grid([draw_objects(trial, threshold), draw_semantic(trial)], columns=2)
    return encode_png(np.asarray(picture))


def labels_file(trial: Trial) -> bytes:
    """PNG of the label map, as `pipeline predict` writes it."""
    return encode_label_map(trial.prediction)


def coco_file(trial: Trial, threshold: float) -> bytes:
    """COCO JSON of the objects of this score or more."""
    size = {"width": trial.image.width, "height": trial.image.height}
    content = {
        "images": [{"id": 1, "file_name": "photo", **size}],
        "annotations": [
            object_annotation(item, annotation_id=place, image_id=1)
            for place, item in enumerate(_objects(trial, threshold), start=1)
        ],
        "categories": category_entries(trial.prediction.categories),
    }
    return json.dumps(content, ensure_ascii=False).encode()


def picture_file(trial: Trial, what: str, threshold: float) -> bytes:
    """JPEG of one of `objects`, `semantic` and `image`."""
    drawn: dict[str, Callable[[], Image.Image]] = {
        "objects": lambda: draw_objects(trial, threshold),
        "semantic": lambda: draw_semantic(trial),
        "image": lambda: displayed(np.asarray(trial.image)),
    }
    return encode_jpeg(drawn[what](), quality=92)


def _objects(trial: Trial, threshold: float) -> list[Instance]:
    """Those of this score or more."""
    return [item for item in trial.prediction.instances if item.score >= threshold]
