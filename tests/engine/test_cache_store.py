"""What is listed of a cache folder, and what `collect` removes, keeps and never touches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.cache import BlobCache
from pipeline.engine.cache_store import DAY_S, CacheEntry, Verdict, collect, list_cache
from pipeline.errors import PipelineError

NOW = time.time()
KILOBYTE = bytes(1000)
ROUNDS = 30
PATIENCE_S = 120

# Holds one folder of the cache open until its standard input ends.
HOLDER = """
import sys
from pathlib import Path
from pipeline.engine.cache import BlobCache
with BlobCache(Path(sys.argv[1]), {"model": sys.argv[2]}):
    print("open", flush=True)
    sys.stdin.read()
"""

# Opens a cache again and again, and fails if something that it has just written is gone.
WRITER = """
import sys
import time
from pathlib import Path
from pipeline.engine.cache import BlobCache
for _ in range(int(sys.argv[2])):
    with BlobCache(Path(sys.argv[1]), {"model": "tiny"}) as cache:
        for key in "ab":
            cache.put(key, b"value")
            cache.flush()
        assert cache.get("a") == cache.get("b") == b"value"
        assert len(list(cache.dir.glob("*.parquet"))) == 2
    time.sleep(0.02)
"""


def fill(root: Path, kind: str, model: str, *, days_ago: float = 0.0, count: int = 1) -> Path:
    """A settings folder with entries, last used so many days ago."""
    with BlobCache(root / kind, {"model": model}) as cache:
        for number in range(count):
            cache.put(f"{number}", KILOBYTE)
            if number % 2 == 1:
                cache.flush()
    age(cache.dir, days_ago)
    return cache.dir


def age(path: Path, days: float) -> None:
    """Set the times of a file, or of a folder and all below it, back."""
    for each in [path, *path.rglob("*")]:
        os.utime(each, (NOW - days * DAY_S,) * 2, follow_symlinks=False)


def gc(root: Path, **options: Any) -> list[Verdict]:
    return list(collect(root, **{"now": NOW, "unused_days": 30, **options}))


def removed(verdicts: list[Verdict]) -> list[Path]:
    return [path for verdict in verdicts if verdict.is_removed for path in verdict.entry.paths]


def tree(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def test_an_entry_tells_its_rows_bytes_time_and_settings(tmp_path: Path) -> None:
    folder = fill(tmp_path, "embed", "tiny", days_ago=3, count=5)
    [entry] = list_cache(tmp_path)
    assert entry == CacheEntry(
        kind="embed",
        name=folder.name,
        paths=(folder,),
        num_rows=5,
        num_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        last_used=(folder / "in_use.lock").stat().st_mtime,
        is_marked=True,
        is_leftover=False,
        settings={"model": "tiny"},
    )
    assert entry.last_used == pytest.approx(NOW - 3 * DAY_S, abs=1)
    assert entry.num_bytes > 5000


def test_listing_changes_nothing_and_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list_cache(tmp_path / "none") == []
    folder = fill(tmp_path, "embed", "tiny", days_ago=3)
    before = {path: path.stat().st_mtime_ns for path in tree(tmp_path)}
    list_cache(tmp_path)
    gc(tmp_path, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in tree(tmp_path)} == before
    assert folder.is_dir()


def test_opening_a_cache_counts_as_use(tmp_path: Path) -> None:
    fill(tmp_path, "embed", "tiny", days_ago=40)
    with BlobCache(tmp_path / "embed", {"model": "tiny"}) as cache:
        assert cache.get("0") == KILOBYTE
    [entry] = list_cache(tmp_path)
    assert entry.last_used > NOW - 60
    assert gc(tmp_path) == []


def test_weights_and_what_describes_them_are_one_entry(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    (weights / "zutis_tiny").mkdir(parents=True)
    (weights / "zutis_tiny" / "model.safetensors").write_bytes(KILOBYTE)
    (weights / "zutis_tiny.json").write_text('{"kind": "zutis"}')
    (weights / "clip_tiny.safetensors").write_bytes(KILOBYTE)
    (weights / "clip_tiny.json").write_text('{"kind": "clip"}')
    age(weights, 2)
    entries = list_cache(tmp_path)
    assert [(entry.name, len(entry.paths)) for entry in entries] == [
        ("clip_tiny", 2),
        ("zutis_tiny", 2),
    ]
    assert [entry.settings for entry in entries] == [{"kind": "clip"}, {"kind": "zutis"}]
    assert [entry.num_bytes for entry in entries] == [1016, 1017]
    assert {entry.num_rows for entry in entries} == {None}
    assert all(entry.last_used == pytest.approx(NOW - 2 * DAY_S, abs=1) for entry in entries)


@pytest.mark.parametrize("content", [b"PAR1", b"", b"not parquet"])
def test_a_damaged_chunk_has_no_rows_and_stays(tmp_path: Path, content: bytes) -> None:
    folder = fill(tmp_path, "embed", "tiny", count=3)
    damaged = sorted(folder.glob("*.parquet"))[0]
    damaged.write_bytes(content)
    (folder / "settings.json").write_bytes(content)
    [entry] = list_cache(tmp_path)
    assert entry.num_rows in (1, 2)
    assert entry.settings == {}
    assert damaged.read_bytes() == content


def test_what_was_not_used_for_long_goes_whole(tmp_path: Path) -> None:
    old = fill(tmp_path, "embed", "old", days_ago=31)
    new = fill(tmp_path, "embed", "new", days_ago=29)
    index = tmp_path / "retrieve" / ("0" * 32)  # a kind whose stage does not mark its use
    index.mkdir(parents=True)
    (index / "index.faiss").write_bytes(KILOBYTE)
    age(index, 50)
    [verdict_index, verdict_old] = gc(tmp_path)
    assert verdict_old.entry.paths == (old,)
    assert (verdict_old.is_removed, verdict_old.reason) == (True, "not used for 31 days")
    assert verdict_index.reason == "not used for 50 days"
    assert list((tmp_path / "embed").iterdir()) == [new]
    assert list((tmp_path / "retrieve").iterdir()) == []


def test_a_dry_run_tells_the_same_and_removes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, "embed", "old", days_ago=31)
    fill(tmp_path, "masks", "old", days_ago=32)
    fill(tmp_path, "masks", "new")
    before = tree(tmp_path)
    dry = gc(tmp_path, max_bytes=0, dry_run=True)
    assert tree(tmp_path) == before
    assert gc(tmp_path, max_bytes=0) == dry
    assert len(removed(dry)) == 3


def test_the_least_recently_used_go_until_the_rest_fits(tmp_path: Path) -> None:
    folders = [fill(tmp_path, "masks", f"{days}", days_ago=days) for days in (5, 1, 9, 3)]
    size = list_cache(tmp_path)[0].num_bytes
    verdicts = gc(tmp_path, max_bytes=2 * size)
    assert removed(verdicts) == [folders[2], folders[0]]
    assert {verdict.reason for verdict in verdicts} == {"least recently used"}
    assert gc(tmp_path, max_bytes=2 * size) == []
    assert removed(gc(tmp_path, max_bytes=2 * size - 1)) == [folders[3]]


def test_a_kind_restricts_what_goes_and_an_unknown_one_names_those_there_are(
    tmp_path: Path,
) -> None:
    masks = fill(tmp_path, "masks", "old", days_ago=50)
    embed = fill(tmp_path, "embed", "old", days_ago=50)
    assert removed(gc(tmp_path, kind="masks", max_bytes=0)) == [masks]
    assert embed.is_dir()
    with pytest.raises(PipelineError, match=r"has no 'mask'; there are: embed$"):
        gc(tmp_path, kind="mask")


def test_what_has_a_name_goes_only_if_its_kind_is_named(tmp_path: Path) -> None:
    """Weights; and all folders of a user who has set the cache to a folder of other things."""
    for name in ("weights/clip.safetensors", "weights/clip.json", "photos/2019/cat.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(KILOBYTE)
    (tmp_path / "weights" / ".clip.safetensors.abcd1234.tmp").write_bytes(KILOBYTE)
    (tmp_path / "notes.txt").write_bytes(KILOBYTE)
    age(tmp_path, 400)
    before = tree(tmp_path)
    assert gc(tmp_path, unused_days=0, max_bytes=0) == []
    assert tree(tmp_path) == before
    assert len(removed(gc(tmp_path, kind="weights"))) == 3
    assert list((tmp_path / "weights").iterdir()) == []
    assert (tmp_path / "photos/2019/cat.jpg").is_file()


def test_what_killed_runs_left_goes_after_an_hour(tmp_path: Path) -> None:
    folder = fill(tmp_path, "embed", "tiny")
    chunk = folder / f".{'0' * 32}.parquet.ab_d1234.tmp"
    index = tmp_path / "retrieve" / f".{'0' * 32}.abcd1234.tmp"
    index.mkdir(parents=True)
    fresh = folder / ".settings.json.ffff1234.tmp"
    for path in (chunk, index / "index.faiss", fresh):
        path.write_bytes(KILOBYTE)
    age(chunk, 2 / 24)
    age(index, 2 / 24)
    verdicts = gc(tmp_path)
    assert removed(verdicts) == [chunk, index]
    assert {verdict.reason for verdict in verdicts} == {"left by a killed run"}
    assert [verdict.entry.num_bytes for verdict in verdicts] == [1000, 1000]
    assert not chunk.exists()
    assert not index.exists()
    assert fresh.exists()
    assert BlobCache(tmp_path / "embed", {"model": "tiny"}).get("0") == KILOBYTE


def test_what_another_process_has_open_is_kept(tmp_path: Path) -> None:
    used = fill(tmp_path, "embed", "used", days_ago=50)
    free = fill(tmp_path, "embed", "free", days_ago=40)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "embed"), "used"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        verdicts = gc(tmp_path, unused_days=0, max_bytes=0)
        assert removed(verdicts) == [free]
        assert [v.reason for v in verdicts if not v.is_removed] == ["in use by a running stage"]
        holder.kill()
    assert removed(gc(tmp_path, unused_days=0)) == [used]


def test_a_cache_that_is_open_loses_nothing_to_gc_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "embed"), str(ROUNDS)]
    give_up = time.monotonic() + PATIENCE_S
    num_removed = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None and time.monotonic() < give_up:
            num_removed += len(removed(gc(tmp_path, unused_days=0)))
        assert writer.stderr is not None
        assert (writer.returncode, writer.stderr.read()) == (0, "")
    assert num_removed > 0


def test_several_may_use_a_folder_and_the_last_one_protects_it(tmp_path: Path) -> None:
    folder = fill(tmp_path, "embed", "tiny")
    with BlobCache(tmp_path / "embed", {"model": "tiny"}):
        with BlobCache(tmp_path / "embed", {"model": "tiny"}):
            assert removed(gc(tmp_path, unused_days=0)) == []
        assert removed(gc(tmp_path, unused_days=0)) == []
    assert removed(gc(tmp_path, unused_days=0)) == [folder]


def test_a_folder_made_by_the_first_flush_is_in_use_from_then_on(tmp_path: Path) -> None:
    with BlobCache(tmp_path / "embed", {"model": "new"}) as cache:
        cache.put("a", KILOBYTE)
        cache.flush()
        assert removed(gc(tmp_path, unused_days=0, max_bytes=0)) == []
        assert cache.get("a") == KILOBYTE


def test_what_is_not_marked_is_kept_for_an_hour(tmp_path: Path) -> None:
    index = tmp_path / "retrieve" / ("0" * 32)
    index.mkdir(parents=True)
    (index / "index.faiss").write_bytes(KILOBYTE)
    [verdict] = gc(tmp_path, unused_days=0, max_bytes=0)
    assert (verdict.is_removed, verdict.reason) == (False, "written within the last hour")
    age(index, 2 / 24)
    assert removed(gc(tmp_path, unused_days=0)) == [index]


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "cache"
    mine = fill(outside, "embed", "mine", days_ago=90)
    folder = fill(root, "masks", "old", days_ago=90)
    (folder / "inner").symlink_to(mine)
    link = root / "masks" / ("1" * 32)
    link.symlink_to(mine)
    (root / "embed").symlink_to(outside / "embed")
    age(root, 90)
    before = {path: path.stat().st_mtime_ns for path in tree(outside)}
    assert sorted(removed(gc(root, unused_days=0, max_bytes=0))) == sorted([link, folder])
    assert list((root / "masks").iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in tree(outside)} == before


def test_a_linked_lock_is_not_opened(tmp_path: Path) -> None:
    folder = fill(tmp_path / "cache", "masks", "old", days_ago=90)
    mine = tmp_path / "mine"
    (folder / "in_use.lock").unlink()
    (folder / "in_use.lock").symlink_to(mine)
    with BlobCache(tmp_path / "cache" / "masks", {"model": "old"}) as cache:
        assert cache.get("0") == KILOBYTE
    assert not mine.exists()
