"""From an image to label map and objects by a student in an ONNX file. No torch.

What `Segmenter` does with a checkpoint. Letters: K names, Q queries, H W pixels, h w token grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import PipelineError, first_line
from pipeline.formats.labels import BACKGROUND, LabelMap, label_map
from pipeline.formats.onnx_graph import IMAGES, PROPOSALS, SEMANTIC_LOGITS, SIMILARITIES, THRESHOLD
from pipeline.formats.predictions import Instance, Segmentation
from pipeline.inference.by_size import predict_by_size
from pipeline.inference.confidence import find_name
from pipeline.inference.inputs import ImageInput, to_pixels, to_rgb
from pipeline.inference.onnx_file import OnnxInfo, open_onnx, read_onnx
from pipeline.inference.prediction import Prediction
from pipeline.models.layers.bilinear import (
    Taps,
    bilinear_taps,
    interpolate,
    joint_foreground_labels,
    upsample,
    upsampled_labels,
    upsampled_probability,
)
from pipeline.models.layers.regions import majority_of_regions
from pipeline.models.zutis.instances import (
    EPSILON,
    Crop,
    crop_of,
    near,
    occupied,
    suppressed_instances,
)
from pipeline.params.base import PredictionSettings

Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class OnnxNetwork:
    """An opened file.

    Attributes:
        path: of the file, for messages.
        sha256: of its content.
        info: its metadata.
        session: of onnxruntime.
    """

    path: Path
    sha256: str
    info: OnnxInfo
    session: Any

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> OnnxNetwork:
        """Open a file that `pipeline export --to onnx` wrote; `threads` as of `open_onnx`.

        Raises:
            PipelineError: it cannot be read or loaded, or something else wrote it.
        """
        path = Path(path)
        content = read_onnx(path)
        session = open_onnx(content, path, threads)
        info = OnnxInfo.of_props(session.get_modelmeta().custom_metadata_map, path)
        return cls(path, hashlib.sha256(content).hexdigest(), info, session)

    @property
    def finds_objects(self) -> bool:
        """Whether it has proposals."""
        return any(output.name == PROPOSALS for output in self.session.get_outputs())

    def run(self, images: NDArray[np.float32], wanted: Sequence[str], **inputs: float) -> Outputs:
        """Outputs by name of images (B, 3, H', W') in [0, 1].

        Args:
            images: of one size.
            wanted: names of outputs.
            inputs: scalars in place of the file's defaults.

        Raises:
            PipelineError: it takes no images of this size.
        """
        given = {name: np.asarray(value, dtype=np.float32) for name, value in inputs.items()}
        height, width = images.shape[-2:]
        if self.info.size not in (None, [height, width]):
            raise PipelineError(
                f"--onnx {self.path}: takes images of {self.info.size[1]} x {self.info.size[0]} "
                f"pixels alone, not {width} x {height}; resize them, or export without --size"
            )
        try:
            found = self.session.run(list(wanted), {IMAGES: images, **given})
        except Exception as error:  # onnxruntime raises many kinds
            raise PipelineError(
                f"--onnx {self.path}: fails on images of {width} x {height} pixels "
                f"({first_line(error)})"
            ) from None
        return dict(zip(wanted, found, strict=True))


class OnnxSegmenter:
    """A student of an ONNX file with some of its names, see `PhotoSegmenter`.

    Args:
        network: the file.
        categories: K of its names.
        settings: how predictions are made; by default as the file says.

    Raises:
        PipelineError: a name that it does not have, or settings that need more than its outputs.
    """

    def __init__(
        self,
        network: OnnxNetwork,
        *,
        categories: Sequence[str] | None = None,
        settings: PredictionSettings | None = None,
    ) -> None:
        known = network.info.categories
        asked = known if categories is None else categories
        field = f"--onnx {network.path}"
        places = [find_name(name, known, field=field, among="its names") for name in asked]
        self.network = network
        self.categories = list(asked)
        self.settings = settings or network.info.settings
        check_settings(self.settings)
        self._label_ids = [BACKGROUND, *(1 + place for place in places)]
        self._first = 0 if self.settings.background else 1

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        categories: Sequence[str] | None = None,
        settings: PredictionSettings | None = None,
        threads: int | None = None,
    ) -> OnnxSegmenter:
        """Open a file, see `OnnxNetwork.load`."""
        network = OnnxNetwork.load(path, threads=threads)
        return cls(network, categories=categories, settings=settings)

    def select(self, categories: Sequence[str]) -> OnnxSegmenter:
        """A segmenter for some of the file's categories, which shares the network."""
        return OnnxSegmenter(self.network, categories=categories, settings=self.settings)

    @property
    def finds_objects(self) -> bool:
        """Whether predictions have objects."""
        return self.settings.instances and self.network.finds_objects

    def __call__(self, image: ImageInput) -> Prediction:
        """Segment one image: a path, a PIL image, or (H, W, 3) uint8 RGB.

        Raises:
            ImageError: the file cannot be read; the message has its path and the reason.
        """
        return self.predict([image])[0]

    def predict(self, images: Sequence[ImageInput]) -> list[Prediction]:
        """Segment several images; those whose inputs are of one size share a run."""
        return predict_by_size(
            images,
            to_input=self._input,
            segment=self._segment,
            categories=self.categories,
            settings=self.settings,
        )

    def confidence(self, image: ImageInput, name: str) -> NDArray[np.float32]:
        """Probability (H, W) in [0, 1] of a name at each pixel of an image.

        Raises:
            ImageError: as a call.
            PipelineError: it is not among `categories`.
        """
        number = find_name(name, self.categories) + 1 - self._first
        picture = to_rgb(image)
        pixels = self._input(picture)
        outputs = self._run(pixels[None], with_objects=False)
        sizes = [*self.settings.through(pixels.shape[1:]), (picture.height, picture.width)]
        return upsampled_probability(
            self._asked(outputs[SEMANTIC_LOGITS][0]),
            number,
            *sizes,
            scale=self.network.info.logit_scale,
        )

    def _input(self, picture: Image.Image) -> NDArray[np.float32]:
        """(3, H', W') in [0, 1]."""
        pixels = to_pixels(picture, self.settings, patch_size=self.network.info.patch_size)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)

    def _segment(
        self, inputs: Sequence[NDArray[np.float32]], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Segmentation]:
        """All that is found in images of these (H, W), whose inputs are of one size."""
        batch = np.stack(inputs)
        outputs = self._run(batch, with_objects=self.finds_objects)
        for row, size in enumerate(sizes):
            one = {name: values[row] for name, values in outputs.items()}
            semantic = self._label_map(one[SEMANTIC_LOGITS], batch.shape[2:], size)
            yield Segmentation(semantic, self._instances(one, size) if self.finds_objects else [])

    def _run(self, images: NDArray[np.float32], *, with_objects: bool) -> Outputs:
        """Outputs for images (B, 3, H', W'), those of them that are needed."""
        sides = [max(side, self.network.info.smallest) for side in images.shape[2:]]
        if sides != list(images.shape[2:]):  # as the student itself would
            images = upsample(images, sides)
        if not with_objects:
            return self.network.run(images, [SEMANTIC_LOGITS])
        # What is similar depends on what is inside; the temperature comes after.
        wanted = [SEMANTIC_LOGITS, PROPOSALS, SIMILARITIES]
        return self.network.run(images, wanted, **{THRESHOLD: self.settings.threshold})

    def _asked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of logits (labels, h, w) those of the names asked for, from label id `_first` on."""
        return logits[self._label_ids[self._first :]]

    def _label_map(
        self, logits: NDArray[np.float32], input_size: Sequence[int], size: tuple[int, int]
    ) -> LabelMap:
        """Label ids of one image."""
        # As in torch: only a student without objects goes through the size of its input.
        through = [] if self.network.finds_objects else self.settings.through(input_size)
        sizes, asked = [*through, size], self._asked(logits)
        if self.settings.joint_foreground and self._first == 0:
            scale = self.network.info.logit_scale
            numbers = joint_foreground_labels(asked, *sizes, scale=scale)
        else:
            numbers = upsampled_labels(asked, *sizes)
        labels = label_map(numbers, self._first)
        return majority_of_regions(labels) if self.settings.region_majority else labels

    def _instances(self, outputs: Outputs, size: tuple[int, int]) -> list[Instance]:
        """Objects of one image, see `instance_predictions`."""
        settings, proposals = self.settings, outputs[PROPOSALS]
        similarities = outputs[SIMILARITIES][:, self._label_ids]
        labels = similarities.argmax(axis=1)
        inside = proposals > settings.threshold
        area = inside.sum(axis=(1, 2)).astype(np.float32) + np.float32(EPSILON)
        confidence = (proposals * inside).sum(axis=(1, 2)) / area
        scores = confidence * _sigmoid(settings.temperature * similarities.max(axis=1))
        candidates = np.flatnonzero(labels != BACKGROUND)
        return suppressed_instances(
            upsampled_crops(proposals[candidates], size, settings.threshold),
            labels[candidates],
            scores[candidates].astype(np.float64),
            size,
            suppression=settings.suppression,
        )


def check_settings(settings: PredictionSettings) -> None:
    """Refuse settings that need more than the outputs of an ONNX file.

    Raises:
        PipelineError: names the setting.
    """
    refused = {
        "flip: true": settings.flip,
        "pamr": settings.pamr is not None,
        "crop_names": settings.crop_names is not None,
        "others": bool(settings.others),
        "score_resolution: pixel": settings.score_resolution == "pixel",
    }
    for name, is_on in refused.items():
        if is_on:
            raise PipelineError(
                f"evaluate.{name}: not with a network in ONNX's format, whose outputs do not tell; "
                "leave it out, or predict with the checkpoint"
            )


def upsampled_crops(
    proposals: NDArray[np.float32], size: tuple[int, int], threshold: float
) -> list[Crop | None]:
    """Proposals (N, h, w), upsampled to `size` and thresholded; None for an empty mask.

    A pixel can exceed the threshold only next to a token that reaches it, so no other is computed.
    """
    rows, columns = (
        bilinear_taps(cells, pixels)
        for cells, pixels in zip(proposals.shape[1:], size, strict=True)
    )
    reached = proposals >= threshold
    boxes = zip(
        near(occupied(reached, 2), rows.lower, rows.upper),
        near(occupied(reached, 1), columns.lower, columns.upper),
        strict=True,
    )
    return [
        _crop(probs, rows.at(box[0]), columns.at(box[1]), (box[0].start, box[1].start), threshold)
        if is_reached
        else None
        for probs, is_reached, box in zip(proposals, occupied(reached, (1, 2)), boxes, strict=True)
    ]


def _crop(
    probs: NDArray[np.float32],
    rows: Taps,
    columns: Taps,
    corner: tuple[int, int],
    threshold: float,
) -> Crop | None:
    pixels = interpolate(interpolate(probs, columns, -1), rows, -2)
    return crop_of(pixels > threshold, *corner)


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-values)), dtype=np.float32)
