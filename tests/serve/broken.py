"""A network that cannot be loaded, in a module that a worker imports quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class BrokenSource:
    """A `SegmenterSource` without weights."""

    def load(self, threads: int) -> NoReturn:
        del threads
        raise PipelineError("weights: no such file")

    def with_names(self, segmenter: object, names: Sequence[str]) -> NoReturn:
        del segmenter, names
        raise PipelineError("weights: no such file")
