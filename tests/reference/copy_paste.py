"""Copy-paste, with the positions that the published run drew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import numpy as np

from pipeline.formats.labels import IGNORE_INDEX
from pipeline.training.copy_paste import Canvas, Cutout, copy_paste, object_box

from .checks import Parts, Result, equal
from .vectors import Vectors


class ListedRandom(random.Random):
    """Gives the listed integers in turn, and remembers between which ends each was asked for."""

    def __init__(self, values: list[int]) -> None:
        super().__init__(0)
        self.values = values
        self.calls: list[list[int]] = []

    def randint(self, a: int, b: int) -> int:
        """The next listed integer; the lower end once there is none left."""
        index = len(self.calls)
        value = self.values[index] if index < len(self.values) else a
        self.calls.append([a, b, value])
        return value


def pasted(vectors: Vectors) -> Parts:
    """Image, semantic mask and instances of each case."""
    for part in vectors.parts():
        yield part, partial(_case, vectors, part)


def _case(vectors: Vectors, part: str) -> Iterator[Result]:
    name, io, record = (
        f"{vectors.name}/{part}",
        vectors.io.part(part),
        vectors.record["cases"][part],
    )
    background, ignore = vectors.record["background_index"], vectors.record["ignore_index"]
    images, semantics, instances = [], [], []
    for index in range(record["n"]):
        semantic = io[f"semantic.{index}"].numpy().astype(np.int16)
        semantics.append(np.where(semantic == ignore, IGNORE_INDEX, semantic - background))
        images.append(io[f"image.{index}"].permute(1, 2, 0).numpy())
        instances.append(io[f"instance.{index}"].numpy() == index + 1)
        yield equal(f"{name}/instance.{index}", instances[-1], semantics[-1] > 0)
    canvas = Canvas(images[0], semantics[0], instances[0].astype(np.int16), num_instances=1)
    cutouts = [_cutout(*pair) for pair in zip(images[1:], semantics[1:], strict=True)]
    draws = record["randint_calls_low_high_value"]
    listed = ListedRandom([value for _, _, value in draws])
    image, semantic, masks = copy_paste(canvas, cutouts, listed)
    ids = np.arange(1, len(masks) + 1)[:, None, None]
    yield equal(f"{name}/randint_calls_low_high_value", listed.calls, draws)
    yield equal(f"{name}/out.image", image.transpose(2, 0, 1), io["out.image"])
    semantic = np.where(semantic == IGNORE_INDEX, ignore, semantic + background)
    yield equal(f"{name}/out.semantic", semantic, io["out.semantic"])
    yield equal(f"{name}/out.instance", (masks * ids).sum(axis=0), io["out.instance"])
    yield equal(f"{name}/out.instance_onehot", masks, io["out.instance_onehot"])
    yield equal(f"{name}/instance_areas", masks.sum(axis=(1, 2)), record["instance_areas"])


def _cutout(image: np.ndarray, semantic: np.ndarray) -> Cutout | None:
    box = object_box(semantic)
    return None if box is None else Cutout(image[box.slices], semantic[box.slices])
