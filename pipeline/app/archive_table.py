"""The archives' Parquet file, read a page at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.formats.parquet import UNREADABLE
from pipeline.formats.tables import ARCHIVE_SCHEMA, READ_BYTES, ArchiveRow

BLOCK_ROWS = 4096


class ArchiveTable:
    """Rows of the archives by number, the label ids alone in memory.

    Args:
        path: the Parquet file.

    Attributes:
        places: label id -> numbers of its rows.

    Raises:
        PipelineError: the file is damaged or no table of archives.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.places: dict[int, range] = {}
        parts = [block["label_id"].to_numpy() for block in self._blocks(["label_id"])]
        label_ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self._num_rows = len(label_ids)
        starts = np.flatnonzero(np.diff(label_ids, prepend=-1))
        for start, end in pairwise([*starts.tolist(), len(label_ids)]):
            self.places[int(label_ids[start])] = range(start, end)

    def rows(self, numbers: Sequence[int]) -> list[ArchiveRow]:
        """Rows by number, in that order; numbers out of range are left out."""
        known = [number for number in numbers if 0 <= number < self._num_rows]
        wanted = np.unique(np.asarray(known, np.int64))
        found: dict[int, ArchiveRow] = {}
        start = 0
        for block in self._blocks(ARCHIVE_SCHEMA.names):
            first, last = np.searchsorted(wanted, [start, start + len(block)])
            inside = wanted[first:last]
            for number, row in zip(
                inside.tolist(), block.take(pa.array(inside - start)).to_pylist(), strict=True
            ):
                found[number] = ArchiveRow(**row)
            start += len(block)
            if last == len(wanted):
                break
        return [found[number] for number in known]

    def _blocks(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self._path, buffer_size=READ_BYTES) as file:
                missing = set(columns) - set(file.schema_arrow.names)
                if missing:
                    raise PipelineError(
                        f"{self._path}: column {min(missing)!r} is missing; run `pipeline "
                        "retrieve` again"
                    )
                yield from file.iter_batches(BLOCK_ROWS, columns=columns)
        except UNREADABLE as error:
            raise PipelineError(
                f"{self._path}: not a readable Parquet file ({error}); run `pipeline retrieve` "
                "again"
            ) from None
