"""What is scored, and what a scorer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks import Example, InstanceTarget
from pipeline.errors import PipelineError
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap
from pipeline.formats.predictions import StoredPrediction

Part = TypeVar("Part")


@dataclass(frozen=True)
class ScoringTask:
    """The label ids that count.

    Attributes:
        categories: names by label id from 1.
        background: whether label id 0 is scored; if not, its pixels are void.
        unseen: label ids that are scored apart from the others. The background, where it is scored,
            is a seen class: so the papers count (DenseCLIP, Table 1: the means of PASCAL Context
            are those of 50 seen and 10 unseen classes, background included).
    """

    categories: Sequence[str]
    background: bool = True
    unseen: frozenset[int] = frozenset()

    @property
    def num_categories(self) -> int:
        return len(self.categories)

    @property
    def seen(self) -> frozenset[int]:
        """Label ids that count as seen, the background's among them."""
        first = BACKGROUND if self.background else BACKGROUND + 1
        return frozenset(range(first, self.num_categories + 1)) - self.unseen


class Truth:
    """The true masks of one example, read when first asked for and then kept.

    Raises:
        PipelineError: from every property, where the masks have another size than the image.
    """

    def __init__(self, example: Example, task: ScoringTask, *, size: tuple[int, int]) -> None:
        """Args: size: (H, W) of the image."""
        self._example = example
        self._task = task
        self._size = size

    @cached_property
    def semantic(self) -> LabelMap:
        """Label ids (H, W) as they are scored: without background its pixels are void."""
        labels = self._checked(self._example.semantic())
        if self._task.background:
            return labels
        return np.where(labels == BACKGROUND, LABEL_TYPE(IGNORE_INDEX), labels)

    @cached_property
    def void(self) -> NDArray[np.bool_]:
        """Pixels (H, W) that belong to no object and are not scored."""
        return self._checked(self._example.void())

    @cached_property
    def instances(self) -> list[InstanceTarget]:
        """The true objects."""
        targets = self._example.instances()
        for target in targets:
            self._checked(target.mask)
        return targets

    def _checked(self, mask: NDArray[Any]) -> NDArray[Any]:
        if mask.shape != self._size:
            (height, width), path = self._size, self._example.image_path
            raise PipelineError(
                f"{path}: {width}x{height} pixels, but its masks have "
                f"{mask.shape[1]}x{mask.shape[0]}"
            )
        return mask


class Scorer(Protocol[Part]):
    """One way to score: `measure` compares the masks of one image, `add` sums what it returns.

    `measure` is apart from `add` so that what was compared once counts for several sums, such as
    that of all images and that of a group.
    """

    def measure(self, truth: Truth, prediction: StoredPrediction) -> Part:
        """What one image adds."""

    def add(self, part: Part) -> None:
        """Count one image."""

    def compute(self) -> dict[str, float]:
        """Metrics in [0, 1] of all images added, NaN where there was nothing to score."""

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """Columns of the table of classes: metric -> (1 + K,) values by label id, or none."""
