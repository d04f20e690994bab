"""Images of many sizes through a network that takes those of one size together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from PIL import Image

from pipeline.engine.batching import equal_size_batches
from pipeline.formats.predictions import Segmentation
from pipeline.inference.inputs import ImageInput, to_rgb
from pipeline.inference.kept import kept
from pipeline.inference.prediction import Prediction
from pipeline.params.base import PredictionSettings


class _Sized(Protocol):
    """An array or a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...


Input = TypeVar("Input", bound=_Sized)


def predict_by_size(
    images: Sequence[ImageInput],
    *,
    to_input: Callable[[Image.Image], Input],
    segment: Callable[[Sequence[Input], Sequence[tuple[int, int]]], Iterable[Segmentation]],
    categories: list[str],
    settings: PredictionSettings,
) -> list[Prediction]:
    """What is output of each image, in their order; see `kept`.

    Args:
        images: see `to_rgb`.
        to_input: an RGB image -> the network's input (3, H', W') of it.
        segment: inputs of one shape, and the (H, W) of their images -> what is found in each.
        categories: K names by label id from 1.
        settings: what of it is output.

    Raises:
        ImageError, ValueError: as `to_rgb`.
    """
    pictures = [to_rgb(image) for image in images]
    inputs = [to_input(picture) for picture in pictures]
    predictions: dict[int, Prediction] = {}
    for members in equal_size_batches(
        range(len(inputs)), len(inputs), size_of=lambda index: tuple(inputs[index].shape)
    ):
        sizes = [(pictures[index].height, pictures[index].width) for index in members]
        found = segment([inputs[index] for index in members], sizes)
        for index, everything in zip(members, found, strict=True):
            output = kept(everything, categories, settings)
            predictions[index] = Prediction(output.semantic, output.instances, categories)
    return [predictions[index] for index in range(len(pictures))]
