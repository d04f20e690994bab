"""Folders of shards made of samples or predictions at hand, and their samples in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import replace_dir
from pipeline.formats.predictions import StoredPrediction, encode_prediction, write_encoded
from pipeline.formats.shards import (
    StoredSample,
    open_samples,
    shard_entry,
    shard_name,
    write_manifest,
    write_tar,
)


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out_dir: Path,
    *,
    shard_size: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write samples to a folder of shards, in place of what it held, and return its manifest."""
    rest, entries = list(samples), []
    with replace_dir(out_dir) as folder:
        for start in range(0, len(rest), shard_size):
            path = folder / shard_name(len(entries))
            count = write_tar(path, rest[start : start + shard_size])
            entries.append(shard_entry(path, count))
        return write_manifest(folder, entries, settings)


def read_shards(shard_dir: Path, *, members: Iterable[str] = ()) -> Iterator[StoredSample]:
    """Yield the samples of a folder in order, each with `__key__` and the bytes of its members."""
    store = open_samples(shard_dir, members=members)
    for index in range(len(store)):
        yield store[index]


def write_predictions(
    out_dir: Path,
    predictions: Iterable[tuple[int, StoredPrediction]],
    *,
    num_categories: int = 2,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a new folder with one shard of predictions, each with its number in the benchmark."""
    out_dir.mkdir()
    path = out_dir / shard_name(0)
    encoded = (
        (number, item.image_id, encode_prediction(item, num_categories))
        for number, item in predictions
    )
    write_manifest(out_dir, [shard_entry(path, write_encoded(path, encoded))], settings)
