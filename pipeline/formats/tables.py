"""Parquet tables that stages hand to each other: schemas, writing, reading.

Embedding shards: `<source>/00000.parquet`, one row an image, in the order of the source. Archives:
one file, one row per category and image, by label id and rank. C is the embedding's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.files import atomic_path
from pipeline.formats.parquet import UNREADABLE
from pipeline.formats.shards import MANIFEST, read_manifest

ENCODER = b"encoder"
DIM = b"dim"
STATUS_OK = "ok"
STATUS_SKIPPED = "skipped"
EMBEDDING = "embedding"
FLOAT16 = np.dtype("<f2")
# What a reader holds of each column of a file; without a bound it would be a whole row group.
READ_BYTES = 2**20
MAX_DIM, MAX_DIGITS = 2**20, 9

EMBEDDING_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("member", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_message", pa.string()),
]

ARCHIVE_SCHEMA = pa.schema(
    [
        pa.field("category", pa.string(), nullable=False),
        pa.field("label_id", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class ArchiveRow:
    """One image of one category's archive; path, member and offset lead to its bytes.

    Attributes:
        category: name; label_id: its integer, 0 for negatives.
        rank: 1 for the most similar image of the category.
        similarity: inner product of image and text embedding.
        key, source, path, member, offset, width, height, sha256: as in the embedding shards.
    """

    category: str
    label_id: int
    rank: int
    key: str
    similarity: float
    source: str
    path: str
    member: str | None
    offset: int | None
    width: int
    height: int
    sha256: str


def encoder_name(model: str, pretrained: str) -> str:
    """Name of a CLIP model with its weights, as the embedding shards carry it."""
    return f"{model}/{pretrained}"


def embedding_schema(dim: int, encoder: str) -> pa.Schema:
    """Schema of an embedding shard.

    A cell of the column `embedding` holds the 2 C bytes of C little-endian float16, or null for a
    skipped image: `np.frombuffer(cell, "<f2")`. As a list of float16, which shards of earlier
    versions hold, Parquet would take four times as long to read it.

    Args:
        dim: C.
        encoder: `encoder_name` of the CLIP model, kept in the metadata.
    """
    embedding = pa.field(EMBEDDING, pa.binary(FLOAT16.itemsize * dim))
    metadata = {ENCODER: encoder.encode(), DIM: str(dim).encode()}
    return pa.schema([*EMBEDDING_FIELDS, embedding], metadata=metadata)


def embedding_bytes(embedding: NDArray[np.floating]) -> bytes:
    """Cell of the column `embedding` for a vector (C,)."""
    return embedding.astype(FLOAT16).tobytes()


def embedding_matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float16]:
    """Embeddings (N, C) float16 of a column `embedding` without nulls; not copied, so not to be
    written to.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        dim, halves = column.type.list_size, column.flatten()
    else:
        dim = column.type.byte_width // FLOAT16.itemsize
        data = column.buffers()[1]
        halves = pa.Array.from_buffers(
            pa.float16(), dim * len(column), [None, data], offset=dim * column.offset
        )
    return torch.from_dlpack(halves).view(-1, dim).numpy()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically; the same table gives the same bytes.

    The column `embedding` is stored as it is, for half floats hardly compress.
    """
    others = [name for name in table.column_names if name != EMBEDDING]
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression={EMBEDDING: "none"} | dict.fromkeys(others, "zstd"),
            use_dictionary=others,
            write_page_checksum=True,
        )


def write_archives(path: Path, rows: Iterable[ArchiveRow]) -> None:
    """Write the archives, sorted by label id and rank."""
    ordered = sorted(rows, key=lambda row: (row.label_id, row.rank))
    table = pa.Table.from_pylist([asdict(row) for row in ordered], schema=ARCHIVE_SCHEMA)
    write_archive_table(path, table)


def write_archive_table(path: Path, table: pa.Table) -> None:
    """Write archives that are a table already.

    Args:
        path: the file.
        table: the columns of `ARCHIVE_SCHEMA`, rows by label id and rank.
    """
    columns = table.select(ARCHIVE_SCHEMA.names)
    write_table(path, columns.cast(ARCHIVE_SCHEMA).combine_chunks())


def read_archives(path: Path) -> list[ArchiveRow]:
    """Rows of the archives by label id and rank.

    Raises:
        PipelineError: the file is missing, not Parquet, damaged, or lacks a column of that type.
    """
    path = Path(path)
    if not path.is_file():
        raise PipelineError(f"{path}: no such file; run `pipeline retrieve` first")
    table = _read(path, [field.name for field in fields(ArchiveRow)])
    for field in ARCHIVE_SCHEMA:
        found = table.schema.field(field.name).type
        if found != field.type:
            raise PipelineError(
                f"{path}: column {field.name!r} is of type {found}, not {field.type}; "
                "run `pipeline retrieve` again"
            )
        if not field.nullable and table[field.name].null_count:
            raise PipelineError(f"{path}: column {field.name!r} has empty cells")
    return [ArchiveRow(**row) for row in table.to_pylist()]


def list_embedding_shards(source_dirs: Sequence[Path]) -> list[Path]:
    """The shards in the folders of all sources, by source and number.

    Raises:
        PipelineError: a source has none, or two shards differ in encoder or dimension.
    """
    paths: list[Path] = []
    for folder in sorted(source_dirs):
        shards = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
        if not shards:
            raise PipelineError(f"{folder}: no embedding shards; run `pipeline embed` first")
        _check_listing(folder, shards)
        paths += shards
    if not paths:
        raise PipelineError("index: no source is named; run `pipeline embed` first")
    first = shard_encoder(paths[0])
    for path in paths[1:]:
        found = shard_encoder(path)
        if found != first:
            raise PipelineError(
                f"{path}: embedded by {found[0]} (dim {found[1]}), but {paths[0]} by {first[0]} "
                f"(dim {first[1]}); run `pipeline embed` again for all sources"
            )
    return paths


def _check_listing(folder: Path, shards: Sequence[Path]) -> None:
    """Compare a folder with its manifest; what is inside of a shard has checksums of its own."""
    if not (folder / MANIFEST).exists():  # of an earlier version
        return
    entries = {entry["name"]: entry["bytes"] for entry in read_manifest(folder)["shards"]}
    found = {path.name: path.stat().st_size for path in shards}
    for name in sorted(entries.keys() | found.keys()):
        if entries.get(name) != found.get(name):
            raise PipelineError(
                f"{folder / name}: {found.get(name, 'no')} bytes, {MANIFEST} says "
                f"{entries.get(name, 'none')}; run `pipeline embed` again"
            )


def shard_encoder(path: Path) -> tuple[str, int]:
    """Encoder name and dimension C of an embedding shard.

    Raises:
        PipelineError: not Parquet, or not a shard of embeddings: a column is missing or of another
            type.
    """
    try:
        schema = pq.read_schema(path)
    except UNREADABLE as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None
    metadata = schema.metadata or {}
    if ENCODER not in metadata or not metadata.get(DIM, b"").isdigit():
        raise PipelineError(f"{path}: not a shard of embeddings: its metadata names no encoder")
    encoder, dim = metadata[ENCODER].decode(errors="replace"), int(metadata[DIM][:MAX_DIGITS])
    if not 0 < dim <= MAX_DIM:
        raise PipelineError(f"{path}: not a shard of embeddings: their length is {dim}")
    for field in embedding_schema(dim, encoder):
        allowed = [field.type, *([pa.list_(pa.float16(), dim)] if field.name == EMBEDDING else [])]
        if field.name not in schema.names or schema.field(field.name).type not in allowed:
            raise PipelineError(
                f"{path}: not a shard of embeddings: column {field.name!r} of type {field.type} "
                "is missing"
            )
    return encoder, dim


def iter_embedding_rows(
    shards: Sequence[Path], *, columns: list[str], block_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of embedding shards in order, at most `block_rows` at a time.

    Memory holds one block, however large a file or its row groups.

    Args:
        shards: see `list_embedding_shards`.
        columns: names of the columns to read.
        block_rows: rows of a block; the last ones of a file or row group may be fewer.

    Raises:
        PipelineError: a file is damaged, or an image of status "ok" has no embedding; the message
            names the file.
    """
    for path in shards:
        try:
            with pq.ParquetFile(
                path, page_checksum_verification=True, buffer_size=READ_BYTES
            ) as file:
                for rows in file.iter_batches(block_rows, columns=columns):
                    _check_embedded(path, rows)
                    yield rows
        except UNREADABLE as error:
            raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None


def _check_embedded(path: Path, rows: pa.RecordBatch) -> None:
    """Refuse an image without an embedding that claims to have one."""
    if {"status", EMBEDDING} <= set(rows.schema.names) and rows[EMBEDDING].null_count:
        is_ok = pc.equal(rows["status"], STATUS_OK)
        if pc.any(pc.and_(is_ok, pc.is_null(rows[EMBEDDING]))).as_py():
            raise PipelineError(
                f"{path}: an image of status {STATUS_OK} has no embedding; "
                "run `pipeline embed` again"
            )


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns)
    except UNREADABLE as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise PipelineError(f"{path}: column {missing[0]!r} is missing")
    return table
