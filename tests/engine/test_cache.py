"""BlobCache: what survives a kill, a second writer and a damaged file."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.engine.cache import CHUNK_BYTES, CHUNK_ENTRIES, BlobCache, stored_keys

SETTINGS = {"model": "tiny", "threshold": 0.5}


def chunk_paths(cache: BlobCache) -> list[Path]:
    return sorted(cache.dir.glob("*.parquet"))


def test_values_are_found_before_and_after_the_flush(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"one")
        cache.put("empty", b"")
        assert cache.get("a") == b"one"
        assert chunk_paths(cache) == []
    assert cache.get("a") == b"one"
    reopened = BlobCache(tmp_path, SETTINGS)
    assert reopened.get("a") == b"one"
    assert reopened.get("empty") == b""
    assert reopened.get("other") is None
    assert len(reopened) == 2


def test_settings_separate_results_and_their_order_does_not_matter(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"one")
    assert BlobCache(tmp_path, {"threshold": 0.5, "model": "tiny"}).get("a") == b"one"
    assert BlobCache(tmp_path, {**SETTINGS, "threshold": 0.4}).get("a") is None


def test_opening_a_cache_writes_nothing(tmp_path: Path) -> None:
    with BlobCache(tmp_path / "cache", SETTINGS):
        pass
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("count", "size"), [(CHUNK_ENTRIES, 1), (3, CHUNK_BYTES // 3 + 1)])
def test_settling_writes_many_entries_or_large_ones(tmp_path: Path, count: int, size: int) -> None:
    cache = BlobCache(tmp_path, SETTINGS)
    for index in range(count - 1):
        cache.put(f"k{index}", bytes(size))
    cache.settle()
    assert len(BlobCache(tmp_path, SETTINGS)) == 0  # a killed run would lose these
    cache.put("last", bytes(size))
    cache.settle()
    assert len(BlobCache(tmp_path, SETTINGS)) == count
    [chunk] = chunk_paths(cache)
    assert len(pq.read_table(chunk)) == count


def test_entries_are_flushed_when_the_work_fails(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with BlobCache(tmp_path, SETTINGS) as cache:
            cache.put("a", b"one")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert BlobCache(tmp_path, SETTINGS).get("a") == b"one"


def test_the_last_value_put_wins_while_pending(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"one")
        cache.put("a", b"two")
        assert cache.get("a") == b"two"
    assert BlobCache(tmp_path, SETTINGS).get("a") == b"two"


@pytest.mark.parametrize("damage", ["cut", "flip", "flipped key", "empty", "text"])
def test_a_damaged_chunk_is_removed_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"A" * 1000)
        cache.put("a key", b"A" * 1000)
        cache.flush()
        cache.put("b", b"B" * 1000)
    for path in chunk_paths(cache):
        data = path.read_bytes()
        if b"A" * 1000 in data:
            place = data.index(b"A" * 1000) + 500
            damaged = {
                "cut": data[:place],
                "flip": data[:place] + b"!" + data[place + 1 :],
                "flipped key": data.replace(b"a key", b"\xe1 key"),
                "empty": b"",
                "text": b"not parquet",
            }[damage]
            path.write_bytes(damaged)
    assert "b" in stored_keys(cache.dir)
    reopened = BlobCache(tmp_path, SETTINGS)
    assert reopened.get("a") is None
    assert reopened.get("b") == b"B" * 1000
    assert len(chunk_paths(reopened)) == 1
    with reopened:
        reopened.put("a", b"again")
    assert BlobCache(tmp_path, SETTINGS).get("a") == b"again"


def test_a_key_in_two_chunks_survives_the_loss_of_either(tmp_path: Path) -> None:
    writers = [BlobCache(tmp_path, SETTINGS) for _ in range(2)]
    for number, writer in enumerate(writers):
        writer.put("shared", b"same")
        writer.put(f"own{number}", b"x")
        writer.flush()
    reopened = BlobCache(tmp_path, SETTINGS)
    assert len(chunk_paths(reopened)) == 2
    assert [reopened.get(k) for k in ("shared", "own0", "own1")] == [b"same", b"x", b"x"]
    for path in chunk_paths(reopened):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert (BlobCache(tmp_path, SETTINGS).get("shared") == b"same") == (
            len(chunk_paths(reopened)) == 1
        )


def test_a_chunk_deleted_by_someone_else_counts_as_missing(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"one")
    reader = BlobCache(tmp_path, SETTINGS)
    for path in chunk_paths(cache):
        path.unlink()
    assert reader.get("a") is None


def test_equal_contents_give_the_same_file(tmp_path: Path) -> None:
    for root in ("x", "y"):
        with BlobCache(tmp_path / root, SETTINGS) as cache:
            cache.put("a", b"one")
    [first], [second] = (list((tmp_path / root).glob("*/*.parquet")) for root in ("x", "y"))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_half_written_files_of_a_killed_writer_are_ignored(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        cache.put("a", b"one")
    (cache.dir / ".half.tmp.parquet").write_bytes(b"PAR1")
    assert BlobCache(tmp_path, SETTINGS).get("a") == b"one"


def test_more_chunks_than_are_held_open(tmp_path: Path) -> None:
    with BlobCache(tmp_path, SETTINGS) as cache:
        for index in range(20):
            cache.put(str(index), bytes([index]))
            cache.flush()
    reopened = BlobCache(tmp_path, SETTINGS)
    for _ in range(2):
        assert all(reopened.get(str(index)) == bytes([index]) for index in range(20))
