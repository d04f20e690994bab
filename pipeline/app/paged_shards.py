"""Samples of a folder of shards by number, of which a few shards' indexes are in memory at once."""

from __future__ import annotations

import os
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.formats.shards import MANIFEST, StoredSample, index_tar, read_manifest

OPEN_SHARDS = 16
Spans = dict[str, dict[str, tuple[int, int]]]


class PagedShards:
    """Random access that opens a shard when it is asked for.

    Other than `SampleStore` it compares a shard's size with the manifest, not its content, so that
    a folder of any size opens at once.

    Args:
        folder: of shards with a manifest.

    Raises:
        PipelineError: the manifest is missing or describes no shards.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest: dict[str, Any] = read_manifest(folder)
        self._shards = self.manifest["shards"]
        self._ends = list(accumulate(shard["samples"] for shard in self._shards))
        self._index = lru_cache(OPEN_SHARDS)(self._read_index)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, number: int) -> str:
        """Key of a sample."""
        return self._place(number)[1]

    def member(self, number: int, name: str) -> bytes:
        """Bytes of one member; KeyError if the sample has none of that name."""
        path, key, spans = self._place(number)
        return _read(path, *spans[key][name])

    def sample(self, number: int) -> StoredSample:
        """`__key__` and the bytes of all members of a sample."""
        path, key, spans = self._place(number)
        members = {name: _read(path, *span) for name, span in spans[key].items()}
        return {"__key__": key, **members}

    def _place(self, number: int) -> tuple[Path, str, Spans]:
        """Shard, key and the shard's index.

        Raises:
            PipelineError: there is no such sample, or its shard is not what the manifest says.
        """
        if not 0 <= number < len(self):
            raise PipelineError(f"{self._folder}: sample {number} of {len(self)}: there is none")
        shard = bisect_right(self._ends, number)
        keys, spans = self._index(shard)
        place = number - (self._ends[shard - 1] if shard else 0)
        return self._folder / self._shards[shard]["name"], keys[place], spans

    def _read_index(self, shard: int) -> tuple[list[str], Spans]:
        entry = self._shards[shard]
        path = self._folder / entry["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise PipelineError(
                f"{path}: {size or 'no'} bytes, {MANIFEST} says {entry['bytes']}; run the stage "
                "that writes it again"
            )
        spans = index_tar(path)
        return list(spans), spans


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
