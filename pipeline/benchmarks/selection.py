"""Some categories of a benchmark: the others are background."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.example import Benchmark, Example, InstanceTarget, MaskHeader
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap


@dataclass(frozen=True)
class SelectedExample:
    """An example whose labels of other categories are background; see `Example`.

    Attributes:
        whole: the example of all categories.
        label_ids: (1 + K + 1,) new label id of each of its own; the last entry is that of void.
    """

    whole: Example
    label_ids: LabelMap

    @property
    def image_id(self) -> str:
        return self.whole.image_id

    @property
    def image_path(self) -> Path:
        return self.whole.image_path

    @property
    def vocabulary(self) -> Sequence[str] | None:
        return self.whole.vocabulary

    def mask_headers(self) -> list[MaskHeader]:
        return self.whole.mask_headers()

    def semantic(self) -> LabelMap:
        return self.label_ids[self.whole.semantic()]

    def instances(self) -> list[InstanceTarget]:
        targets = [
            replace(target, label_id=int(self.label_ids[target.label_id]))
            for target in self.whole.instances()
        ]
        return [target for target in targets if target.label_id != BACKGROUND]

    def void(self) -> NDArray[np.bool_]:
        return self.whole.void()


class SelectedBenchmark:
    """A benchmark of which some categories are scored; see `Benchmark`."""

    def __init__(self, whole: Benchmark, categories: Sequence[str]) -> None:
        """Number the categories anew.

        Args:
            whole: the benchmark of all categories.
            categories: some of them, in the order of their new label ids. Objects of the others
                become background, like what had no label before; void stays void.
        """
        self.categories = list(categories)
        self._whole = whole
        label_ids = {name: label_id for label_id, name in enumerate(self.categories, start=1)}
        self._label_ids = np.array(
            [
                BACKGROUND,
                *(label_ids.get(name, BACKGROUND) for name in whole.categories),
                IGNORE_INDEX,  # the last entry serves IGNORE_INDEX, which is -1
            ],
            dtype=LABEL_TYPE,
        )

    @property
    def groups(self) -> Mapping[str, frozenset[str]]:
        return self._whole.groups

    @property
    def warnings(self) -> Sequence[str]:
        return self._whole.warnings

    def __len__(self) -> int:
        return len(self._whole)

    def __iter__(self) -> Iterator[Example]:
        for example in self._whole:
            yield SelectedExample(example, self._label_ids)
