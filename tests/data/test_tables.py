"""Schemas of the embedding shards and archives, and what is said of foreign files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tables import (
    ArchiveRow,
    embedding_schema,
    encoder_name,
    iter_embedding_shards,
    list_embedding_shards,
    read_archives,
    shard_encoder,
    write_archives,
    write_table,
)
from pipeline.errors import PipelineError

DIM = 3


def shard(keys: list[str], *, dim: int = DIM, encoder: str = "tiny/random") -> pa.Table:
    rows = [
        {
            "key": key,
            "source": "pool",
            "path": f"{key}.jpg",
            "width": 4,
            "height": 5,
            "bytes": 6,
            "sha256": "0" * 64,
            "status": "ok",
            "embedding": np.full(dim, 0.5, np.float16),
        }
        for key in keys
    ]
    return pa.Table.from_pylist(rows, schema=embedding_schema(dim, encoder))


def archive_row(**changes: object) -> ArchiveRow:
    row = ArchiveRow(
        category="cat",
        label_id=1,
        rank=1,
        key="k",
        similarity=0.25,
        source="pool",
        path="data/0.tar",
        member="猫.jpg",
        offset=512,
        width=30,
        height=20,
        sha256="f" * 64,
    )
    return replace(row, **changes)


def test_embedding_schema_is_the_agreed_one() -> None:
    schema = embedding_schema(768, encoder_name("ViT-L-14", "openai"))
    assert {field.name: str(field.type) for field in schema} == {
        "key": "string",
        "source": "string",
        "path": "string",
        "member": "string",
        "offset": "int64",
        "width": "int32",
        "height": "int32",
        "bytes": "int64",
        "sha256": "string",
        "status": "string",
        "error_message": "string",
        "embedding": "fixed_size_list<item: halffloat>[768]",
    }
    assert schema.metadata == {b"encoder": b"ViT-L-14/openai", b"dim": b"768"}


def test_tables_are_written_alike_each_time_and_whole(tmp_path: Path) -> None:
    table = shard(["a", "b"])
    write_table(tmp_path / "new/1.parquet", table)
    write_table(tmp_path / "new/2.parquet", table)
    first, second = sorted((tmp_path / "new").iterdir())
    assert first.read_bytes() == second.read_bytes()
    assert pq.read_table(first).equals(table)


def test_shards_come_by_source_and_number(tmp_path: Path) -> None:
    for name in ("b/00000", "a/00001", "a/00000", ".a.tmp/00000", "a/.00002"):
        write_table(tmp_path / f"{name}.parquet", shard([name]))
    tables = list(iter_embedding_shards([tmp_path / "b", tmp_path / "a"]))
    assert [table["key"].to_pylist() for table in tables] == [["a/00000"], ["a/00001"], ["b/00000"]]
    narrow = list(
        iter_embedding_shards([tmp_path / "b", tmp_path / "a"], columns=["status", "key"])
    )
    assert [table.column_names for table in narrow] == [["status", "key"]] * 3


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no source"):
        list_embedding_shards([])
    write_table(tmp_path / "a/00000.parquet", shard(["a"]))
    with pytest.raises(PipelineError, match=rf"{tmp_path}/b: no .*`pipeline embed` first"):
        list_embedding_shards([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("other", [{"dim": 4}, {"encoder": "other/random"}])
def test_shards_of_two_encoders_are_an_error(tmp_path: Path, other: dict[str, object]) -> None:
    write_table(tmp_path / "a/00000.parquet", shard(["a"]))
    write_table(tmp_path / "b/00000.parquet", shard(["b"], **other))
    with pytest.raises(PipelineError, match=r"b/00000\.parquet: embedded by .*a/00000\.parquet"):
        list_embedding_shards(sorted(tmp_path.iterdir()))


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a/00000.parquet"
    write_table(path, pa.table({"image_path": ["x"]}))
    with pytest.raises(PipelineError, match=r"a/00000\.parquet: not a shard"):
        shard_encoder(path)
    write_table(path, shard(["a"]).drop_columns(["sha256"]))
    with pytest.raises(PipelineError, match=r"a/00000\.parquet: .*'sha256' of type string"):
        shard_encoder(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(PipelineError, match=r"a/00000\.parquet: not a readable Parquet file"):
        list(iter_embedding_shards(sorted(tmp_path.iterdir())))


def test_archives_round_trip_in_order(tmp_path: Path) -> None:
    path = tmp_path / "archives.parquet"
    rows = [
        archive_row(rank=2, key="b", member=None, offset=None),
        archive_row(label_id=2, category="dog"),
        archive_row(),
        archive_row(label_id=0, category="background"),
    ]
    write_archives(path, rows)
    assert read_archives(path) == [rows[3], rows[2], rows[0], rows[1]]
    assert str(pq.read_schema(path).field("similarity").type) == "float"
    assert str(pq.read_schema(path).field("label_id").type) == "int32"


def test_archives_without_rows(tmp_path: Path) -> None:
    write_archives(tmp_path / "a.parquet", [])
    assert read_archives(tmp_path / "a.parquet") == []


def test_archives_that_are_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"a\.parquet: no such file; run `pipeline retrieve`"):
        read_archives(tmp_path / "a.parquet")
    write_table(tmp_path / "a.parquet", pa.table({"category": ["cat"]}))
    with pytest.raises(PipelineError, match=r"a\.parquet: column 'label_id' is missing"):
        read_archives(tmp_path / "a.parquet")


def test_a_changed_byte_and_a_column_of_another_type_are_named(tmp_path: Path) -> None:
    path = tmp_path / "archives.parquet"
    write_archives(path, [archive_row(rank=rank, key=f"k{rank}") for rank in range(1, 50)])
    content = bytearray(path.read_bytes())
    similarity = pq.ParquetFile(path).metadata.row_group(0).column(4)
    content[similarity.data_page_offset + similarity.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"archives\.parquet: not a readable Parquet file"):
        read_archives(path)

    write_archives(path, [archive_row()])
    table = pq.read_table(path)
    pq.write_table(table.set_column(5, "source", pa.array([3])), path)
    with pytest.raises(PipelineError, match="column 'source' is of type int64, not string"):
        read_archives(path)
