"""A sample of unlabelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError, load_image, shrink_short_side
from pipeline.formats.shards import MANIFEST, open_samples
from pipeline.formats.sources import image_files

SHORT_SIDE = 512  # of larger images, as in archives


def image_sample(
    folder: Path, count: int, *, field: str = "pseudo_label.template_choice.images"
) -> Iterator[Tensor]:
    """Images of a folder, evenly spaced in its order.

    Args:
        folder: of mask shards, or of image files at any depth.
        count: how many, at most.
        field: where the folder stands in the params, for messages.

    Yields:
        (1, 3, H, W) float32 in [0, 1].

    Raises:
        PipelineError: there are no images, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise PipelineError(f"{field}: {folder}: no such folder; name one with images")
    if (folder / MANIFEST).exists():
        store = open_samples(folder, members=["jpg"])
        for number in _spaced(len(store), count, folder, field):
            jpeg, name = store.member(number, "jpg"), f"sample {store.keys[number]} of {folder}"
            yield _decoded(jpeg, f"{field}: {name}", fix="run the stage that wrote it again")
        return
    files = list(image_files(folder, Counter()))
    for number in _spaced(len(files), count, folder, field):
        yield _decoded(files[number], f"{field}: {files[number]}", fix="remove it")


def _spaced(total: int, count: int, folder: Path, field: str) -> list[int]:
    if not total:
        raise PipelineError(f"{field}: {folder}: no images in it; name a folder with some")
    count = min(count, total)
    return [number * total // count for number in range(count)]


def _decoded(source: Path | bytes, name: str, *, fix: str) -> Tensor:
    try:
        image = load_image(source)
    except ImageError as error:
        raise PipelineError(f"{name}: {error}; {fix}") from None
    pixels = np.array(shrink_short_side(image, SHORT_SIDE))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
