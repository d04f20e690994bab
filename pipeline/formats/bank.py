"""The region bank on disk: Parquet shards, one row a region of an image.

`00000.parquet`, ... and `_manifest.json`, as shards of samples (`pipeline.formats.shards`); a bank
without shards is empty. Letters: R regions, D channels of a key, C of a value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.parquet import UNREADABLE
from pipeline.formats.shards import MANIFEST, check_shard, read_manifest
from pipeline.formats.tables import FLOAT16

AGAIN = "run `pipeline bank` again"
HEADER = struct.Struct("<III")
SHARES = np.dtype("<f4")
TEXT_COLUMNS = ("image", "source_sha256")


class RegionRows(NamedTuple):
    """What the bank keeps of the regions of one image.

    Attributes:
        shares: (R,) float32 of the image's pixels.
        keys: (R, D) float16, unit rows but for rounding.
        values: (R, C) float16, likewise.
    """

    shares: NDArray[np.float32]
    keys: NDArray[np.float16]
    values: NDArray[np.float16]


class ImageRegions(NamedTuple):
    """The regions of an image that is known by the SHA-256 of its JPEG and of its source's file."""

    image: str
    source_sha256: str
    rows: RegionRows


@dataclass(frozen=True)
class StoredBank:
    """All regions of a bank, in order.

    Attributes:
        images: (R,) SHA-256 of the JPEG that each is part of.
        keys: (R, D) float32.
        values: (R, C) float32.
        settings: what the stage noted in the manifest.
        sha256: of all shards, by name.
    """

    images: Sequence[str]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    settings: Mapping[str, Any]
    sha256: Mapping[str, str]


def pack_rows(rows: RegionRows) -> bytes:
    """The regions of one image as bytes."""
    header = HEADER.pack(len(rows.shares), rows.keys.shape[1], rows.values.shape[1])
    vectors = [array.astype(FLOAT16).tobytes() for array in (rows.keys, rows.values)]
    return b"".join([header, rows.shares.astype(SHARES).tobytes(), *vectors])


def unpack_rows(blob: bytes) -> RegionRows:
    """What `pack_rows` was given."""
    count, key_dim, value_dim = HEADER.unpack_from(blob)
    shares = np.frombuffer(blob, SHARES, count, HEADER.size)
    offset = HEADER.size + shares.nbytes
    keys = np.frombuffer(blob, FLOAT16, count * key_dim, offset)
    values = np.frombuffer(blob, FLOAT16, count * value_dim, offset + keys.nbytes)
    return RegionRows(shares, keys.reshape(count, key_dim), values.reshape(count, value_dim))


def write_regions(path: Path, images: Iterable[ImageRegions]) -> int:
    """Write one shard to its final place, not atomically; returns its number of regions.

    The same regions give the same bytes. A shard without regions is an empty table.
    """
    found = list(images)
    names = [
        (image.image, image.source_sha256) for image in found for _ in range(len(image.rows.shares))
    ]
    columns = {
        name: pa.array([pair[place] for pair in names], pa.string())
        for place, name in enumerate(TEXT_COLUMNS)
    }
    columns["share"] = pa.array(
        [float(share) for image in found for share in image.rows.shares], pa.float32()
    )
    for name, arrays in (
        ("key", [image.rows.keys for image in found]),
        ("value", [image.rows.values for image in found]),
    ):
        width = FLOAT16.itemsize * (arrays[0].shape[1] if arrays else 1)
        cells = [row.astype(FLOAT16).tobytes() for array in arrays for row in array]
        columns[name] = pa.array(cells, pa.binary(width))
    pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True)
    return len(names)


def read_bank(bank_dir: Path) -> StoredBank:
    """All regions of a bank.

    Raises:
        PipelineError: no bank is there, or an empty one, a shard is missing, changed or damaged,
            or shards differ in the length of their vectors.
    """
    manifest = read_manifest(bank_dir)
    entries = manifest["shards"]
    if not isinstance(manifest.get("bank"), dict):
        raise PipelineError(f"{bank_dir / MANIFEST}: the bank was made with `bank: null`; {AGAIN}")
    if not entries:
        raise PipelineError(
            f"{bank_dir}: not one region is in the bank; lower bank.min_share and {AGAIN}"
        )
    tables = [_read(bank_dir / entry["name"], entry) for entry in entries]
    return StoredBank(
        [image for table in tables for image in table["image"].to_pylist()],
        _stacked(bank_dir, tables, "key"),
        _stacked(bank_dir, tables, "value"),
        manifest["bank"],
        {entry["name"]: entry["sha256"] for entry in entries},
    )


def _read(path: Path, entry: Mapping[str, Any]) -> pa.Table:
    check_shard(path, entry)
    try:
        table = pq.read_table(path)
    except UNREADABLE as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}; {AGAIN}") from None
    if missing := {"image", "key", "value"} - set(table.column_names):
        raise PipelineError(f"{path}: column {min(missing)!r} is missing; {AGAIN}")
    return table


def _stacked(bank_dir: Path, tables: Sequence[pa.Table], name: str) -> NDArray[np.float32]:
    """The vectors of a column over all shards, (R, D)."""
    widths = {table.schema.field(name).type for table in tables}
    if len(widths) > 1 or not pa.types.is_fixed_size_binary(min(widths, key=str)):
        raise PipelineError(f"{bank_dir}: column {name!r} is not of one length; {AGAIN}")
    cells = b"".join(cell for table in tables for cell in table[name].to_pylist())
    num_rows = sum(table.num_rows for table in tables)
    return np.frombuffer(cells, FLOAT16).reshape(num_rows, -1).astype(np.float32)
