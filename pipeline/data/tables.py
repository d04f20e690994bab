"""Parquet tables that stages hand to each other: schemas, writing, reading.

Embedding shards: `<source>/00000.parquet`, one row an image, in the order of the source. Archives:
one file, one row per category and image, by label id and rank. C is the embedding's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.files import atomic_path

ENCODER = b"encoder"
DIM = b"dim"
STATUS_OK = "ok"
STATUS_SKIPPED = "skipped"

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

    Args:
        dim: C; the column `embedding` is a list of C float16, null for a skipped image.
        encoder: `encoder_name` of the CLIP model, kept in the metadata.
    """
    embedding = pa.field("embedding", pa.list_(pa.float16(), dim))
    metadata = {ENCODER: encoder.encode(), DIM: str(dim).encode()}
    return pa.schema([*EMBEDDING_FIELDS, embedding], metadata=metadata)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically; the same table gives the same bytes."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def write_archives(path: Path, rows: Iterable[ArchiveRow]) -> None:
    """Write the archives, sorted by label id and rank."""
    ordered = sorted(rows, key=lambda row: (row.label_id, row.rank))
    table = pa.Table.from_pylist([asdict(row) for row in ordered], schema=ARCHIVE_SCHEMA)
    write_table(path, table)


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


def shard_encoder(path: Path) -> tuple[str, int]:
    """Encoder name and dimension C of an embedding shard.

    Raises:
        PipelineError: not Parquet, or not a shard of embeddings: a column is missing or of another
            type.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None
    metadata = schema.metadata or {}
    if ENCODER not in metadata or not metadata.get(DIM, b"").isdigit():
        raise PipelineError(f"{path}: not a shard of embeddings: its metadata names no encoder")
    encoder, dim = metadata[ENCODER].decode(), int(metadata[DIM])
    for field in embedding_schema(dim, encoder):
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise PipelineError(
                f"{path}: not a shard of embeddings: column {field.name!r} of type {field.type} "
                "is missing"
            )
    return encoder, dim


def iter_embedding_shards(
    source_dirs: Sequence[Path], *, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the shards of all sources one at a time; see `list_embedding_shards`.

    Args:
        source_dirs: the folder of shards of each source.
        columns: columns to read; all by default.
    """
    for path in list_embedding_shards(source_dirs):
        yield _read(path, columns)


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: not a readable Parquet file: {error}") from None
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise PipelineError(f"{path}: column {missing[0]!r} is missing")
    return table
