"""Labelled sets to score on; `READERS` names every format that can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.benchmarks.coca import CocaBenchmark
from pipeline.benchmarks.coco import CocoBenchmark
from pipeline.benchmarks.cub import CubBenchmark
from pipeline.benchmarks.example import Benchmark, Example, InstanceTarget
from pipeline.benchmarks.imagenet_s import ImageNetSBenchmark
from pipeline.benchmarks.index_png import IndexPngBenchmark
from pipeline.benchmarks.voc import VocBenchmark
from pipeline.errors import PipelineError

__all__ = ["READERS", "Benchmark", "Example", "InstanceTarget", "open_bench"]

READERS: dict[str, Callable[..., Benchmark]] = {
    "voc": VocBenchmark,
    "index_png": IndexPngBenchmark,
    "coco": CocoBenchmark,
    "coca": CocaBenchmark,
    "imagenet_s": ImageNetSBenchmark,
    "cub": CubBenchmark,
}


def open_bench(
    *,
    format: str,
    root: Path,
    split: str,
    categories: list[str],
    groups: Mapping[str, str] | None = None,
    **layout: Any,
) -> Benchmark:
    """Open a benchmark and check that all its parts are there.

    Args:
        format: a key of `READERS`.
        root: folder of the benchmark.
        split: name of the list of images to score on.
        categories: names in the order of the benchmark's label ids, without background.
        groups: name -> list of images, scored apart as well.
        layout: what else the reader of this format takes, see its constructor.

    Raises:
        PipelineError: unknown format, or a folder, list, image or mask is missing.
    """
    if format not in READERS:
        raise PipelineError(f"benchmark format {format!r}: expected one of {', '.join(READERS)}")
    return READERS[format](root, split=split, categories=categories, groups=groups or {}, **layout)
