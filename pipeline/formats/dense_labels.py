"""Dense labels on disk: `label.png` and `confidence.png` under the keys of the mask shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, listing
from pipeline.formats.images import decode_label, decode_png
from pipeline.formats.labels import LabelMap, decode_confidence
from pipeline.formats.shards import MANIFEST, open_samples

LABEL, CONFIDENCE = "label.png", "confidence.png"
STAGES = ("pseudo_label", "relabel")  # that write labels, and name their categories
AGAIN = "run `pipeline pseudo_label` again"


class LabelStore:
    """Labels by sample key; only the samples' places are in memory.

    Attributes:
        categories: names by label id from 1, as the stage that made the labels noted them.

    Raises:
        PipelineError: a shard is missing, changed or cut off, or the manifest names no categories.
    """

    def __init__(self, labels_dir: Path) -> None:
        self._dir = labels_dir
        self._samples = open_samples(labels_dir, members=[LABEL, CONFIDENCE])
        self._places = {key: place for place, key in enumerate(self._samples.keys)}
        try:
            manifest = self._samples.manifest
            stage = next(stage for stage in STAGES if stage in manifest)
            described = manifest[stage]["categories"]
        except (KeyError, TypeError, StopIteration):
            raise PipelineError(f"{labels_dir / MANIFEST}: names no categories; {AGAIN}") from None
        self.categories = [str(category) for category in described]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def check(self, categories: Sequence[str], keys: Collection[str]) -> None:
        """Refuse labels of other categories than these, or that lack one of these samples.

        Raises:
            PipelineError: it is so.
        """
        if self.categories != list(categories):
            raise PipelineError(
                f"{self._dir}: labels of other categories than those of params.yaml: "
                f"{listing(self.categories)}; {AGAIN}"
            )
        if missing := [key for key in keys if key not in self]:
            raise PipelineError(
                f"{self._dir}: no labels of {len(missing)} of {len(keys)} masks, such as "
                f"{missing[0]}; {AGAIN}"
            )

    def get(self, key: str) -> tuple[LabelMap, NDArray[np.float32]]:
        """Label ids (H, W) and confidence (H, W) in [0, 1] of a sample.

        Raises:
            PipelineError: there is none of that key.
            ImageError: one of its files is damaged.
        """
        if key not in self._places:
            raise PipelineError(f"{self._dir}: no labels of {key}; {AGAIN}")
        place = self._places[key]
        confidence = decode_png(self._samples.member(place, CONFIDENCE))
        return decode_label(self._samples.member(place, LABEL)), decode_confidence(confidence)
