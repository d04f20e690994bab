"""Photos a second of trained networks, side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from PIL import Image

from pipeline.inference.segmenter import Segmenter


def rates(segmenters: Mapping[str, Segmenter], paths: Sequence[Path]) -> dict[str, float]:
    """Segment photos, each by all networks in turn, after one photo that is not timed.

    Decoding is not timed; resizing and what follows the network are.

    Args:
        segmenters: by name, loaded.
        paths: photos, two at least.

    Returns:
        Photos a second by name, and as `NAME_ratio` the median over the photos of how many times
        as fast a network is as the first one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in segmenters}
    for path in paths:
        with Image.open(path) as file:
            photo = file.convert("RGB")
        for name, segmenter in segmenters.items():
            start = time.perf_counter()
            segmenter.predict([photo])
            seconds[name].append(time.perf_counter() - start)
    timed = {name: values[1:] for name, values in seconds.items()}
    first, *others = timed
    found = {name: round(len(values) / sum(values), 2) for name, values in timed.items()}
    for name in others:
        shares = [slow / fast for slow, fast in zip(timed[first], timed[name], strict=True)]
        found[f"{name}_ratio"] = round(median(shares), 2)
    return found
