"""Schemas of the embedding shards and archives, and what is said of foreign files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PipelineError
from pipeline.formats.tables import (
    ArchiveRow,
    embedding_bytes,
    embedding_matrix,
    embedding_schema,
    encoder_name,
    iter_embedding_rows,
    list_embedding_shards,
    read_archives,
    shard_encoder,
    write_archive_table,
    write_archives,
    write_table,
)

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
            "embedding": embedding_bytes(np.full(dim, 0.5)),
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
        "embedding": "fixed_size_binary[1536]",
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
    shards = list_embedding_shards([tmp_path / "b", tmp_path / "a"])
    batches = list(iter_embedding_rows(shards, columns=["status", "key"], block_rows=10))
    assert [batch["key"].to_pylist() for batch in batches] == [
        ["a/00000"],
        ["a/00001"],
        ["b/00000"],
    ]
    assert [batch.schema.names for batch in batches] == [["status", "key"]] * 3


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_rows_come_in_blocks_whatever_the_row_groups(tmp_path: Path, row_group_size: int) -> None:
    keys = [f"{number}" for number in range(10)]
    pq.write_table(shard(keys), tmp_path / "0.parquet", row_group_size=row_group_size)
    pq.write_table(shard(["x"]), tmp_path / "1.parquet")
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    batches = list(iter_embedding_rows(paths, columns=["key"], block_rows=4))
    assert [key for batch in batches for key in batch["key"].to_pylist()] == [*keys, "x"]
    assert all(1 <= len(batch) <= 4 for batch in batches)


@pytest.mark.parametrize("is_list", [False, True])
def test_embeddings_are_a_matrix_also_those_of_lists(
    tmp_path: Path, rng: np.random.Generator, is_list: bool
) -> None:
    """Lists of float16 are what shards of earlier versions hold."""
    embeddings = rng.normal(size=(7, DIM)).astype(np.float16)
    table = shard([str(number) for number in range(7)])
    if is_list:
        column = pa.array(list(embeddings), pa.list_(pa.float16(), DIM))
    else:
        column = pa.array([embedding_bytes(row) for row in embeddings], pa.binary(2 * DIM))
    table = table.set_column(table.schema.names.index("embedding"), "embedding", column)
    path = tmp_path / "a/0.parquet"
    pq.write_table(table, path.parent.mkdir() or path)
    assert list_embedding_shards([path.parent]) == [path]
    (batch,) = iter_embedding_rows([path], columns=["embedding"], block_rows=100)
    np.testing.assert_array_equal(embedding_matrix(batch["embedding"]), embeddings)
    np.testing.assert_array_equal(embedding_matrix(batch["embedding"][2:5]), embeddings[2:5])
    np.testing.assert_array_equal(embedding_matrix(table["embedding"]), embeddings)
    assert embedding_matrix(batch["embedding"][:0]).shape == (0, DIM)


def test_a_changed_byte_of_an_embedding_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_table(path, shard(["a", "b"]))
    content = path.read_bytes()
    stored = embedding_bytes(np.full(DIM, 0.5))
    assert content.count(stored * 2) == 1
    path.write_bytes(content.replace(stored * 2, stored + b"\0" * len(stored)))
    with pytest.raises(PipelineError, match=r"00000\.parquet: not a readable Parquet file"):
        list(iter_embedding_rows([path], columns=["embedding"], block_rows=10))


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
        list_embedding_shards(sorted(tmp_path.iterdir()))
    with pytest.raises(PipelineError, match=r"a/00000\.parquet: not a readable Parquet file"):
        list(iter_embedding_rows([path], columns=["key"], block_rows=10))


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


def test_archives_that_are_a_table_are_written_alike(tmp_path: Path) -> None:
    rows = [archive_row(), archive_row(rank=2, key="b", member=None, offset=None)]
    write_archives(tmp_path / "rows.parquet", rows)
    halves = [pa.Table.from_pylist([asdict(row)]) for row in rows]
    table = pa.concat_tables(halves, promote_options="permissive")
    write_archive_table(tmp_path / "table.parquet", table.append_column("more", pa.array([1, 2])))
    assert (tmp_path / "table.parquet").read_bytes() == (tmp_path / "rows.parquet").read_bytes()


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
