"""Shards: bytes, manifest, random access, webdataset's view, and every kind of damage."""

from __future__ import annotations

import hashlib
import json
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset

from pipeline.errors import PipelineError
from pipeline.formats.shards import open_samples, read_manifest
from tests.formats.shard_folders import read_shards, write_shards

NUM_SAMPLES = 7
SHARD_SIZE = 3


def samples(count: int = NUM_SAMPLES) -> Iterator[dict[str, object]]:
    for number in range(count):
        yield {
            "__key__": f"{number:020x}_{number + 1}",
            "mask.png": bytes([number]) * 600,
            "jpg": b"j" * number,
            "json": {"rank": number, "category": "größe"},
        }


@pytest.fixture
def shard_dir(tmp_path: Path) -> Path:
    write_shards(samples(), tmp_path / "masks", shard_size=SHARD_SIZE, settings={"source": "x"})
    return tmp_path / "masks"


def test_manifest(shard_dir: Path) -> None:
    manifest = json.loads((shard_dir / "_manifest.json").read_text())
    assert manifest == read_manifest(shard_dir)
    assert [(entry["name"], entry["samples"]) for entry in manifest["shards"]] == [
        ("00000.tar", 3),
        ("00001.tar", 3),
        ("00002.tar", 1),
    ]
    assert manifest["samples"] == NUM_SAMPLES
    assert manifest["source"] == "x"
    assert sorted(path.name for path in shard_dir.iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "_manifest.json",
    ]  # fmt: skip


def test_same_samples_same_bytes(shard_dir: Path, tmp_path: Path) -> None:
    shuffled_members = (dict(sorted(sample.items())) for sample in samples())
    write_shards(
        shuffled_members, tmp_path / "again", shard_size=SHARD_SIZE, settings={"source": "x"}
    )
    for path in shard_dir.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with tarfile.open(shard_dir / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_no_samples(tmp_path: Path) -> None:
    manifest = write_shards([], tmp_path / "x", shard_size=3)
    assert manifest == {"shards": [], "samples": 0}
    assert list(read_shards(tmp_path / "x")) == []
    assert len(open_samples(tmp_path / "x", members={"jpg"})) == 0


def test_webdataset_reads_the_shards(shard_dir: Path) -> None:
    urls = str(shard_dir / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == [s["__key__"] for s in samples()]
    assert found[5]["json"] == {"rank": 5, "category": "größe"}
    raw = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert raw[6]["mask.png"] == bytes([6]) * 600


def test_reading_in_order(shard_dir: Path) -> None:
    for found, written in zip(read_shards(shard_dir), samples(), strict=True):
        assert json.loads(found.pop("json")) == written.pop("json")
        assert found == written


def test_random_access(shard_dir: Path) -> None:
    store = open_samples(shard_dir, members=["jpg", "json"])
    assert len(store) == NUM_SAMPLES
    assert store.keys == [sample["__key__"] for sample in samples()]
    assert store.manifest["source"] == "x"
    for copy in (store, pickle.loads(pickle.dumps(store))):
        for number in (6, 0, 3, 2, 0):
            sample = copy[number]
            assert sample["__key__"] == copy.keys[number]
            assert sample["jpg"] == b"j" * number
            assert copy.member(number, "mask.png") == bytes([number]) * 600
            assert copy.json(number)["rank"] == number
    with pytest.raises(IndexError):
        store[NUM_SAMPLES]
    with pytest.raises(KeyError):
        store.member(0, "npy")


@pytest.mark.parametrize("max_open", [0, 1, 128])
def test_reading_from_threads_and_copies(shard_dir: Path, max_open: int) -> None:
    store = open_samples(shard_dir, max_open=max_open)
    numbers = [number % NUM_SAMPLES for number in range(0, 900, 4)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: store.member(number, "mask.png"), numbers))
    assert found == [bytes([number]) * 600 for number in numbers]
    copy = pickle.loads(pickle.dumps(store))
    assert [copy.json(number)["rank"] for number in numbers] == numbers


@pytest.mark.parametrize("key", ["../../etc/x", "a.b", "a/b", "", "a b", "ü", "a\n"])
def test_keys_that_are_not_plain_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="sample key"):
        write_shards([{"__key__": key, "jpg": b""}], tmp_path / "x", shard_size=3)
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes_of_the_writer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="used twice"):
        write_shards([*samples(2), *samples(1)], tmp_path / "x", shard_size=3)
    with pytest.raises(ValueError, match="'jpg' is str, not bytes"):
        write_shards([{"__key__": "a", "jpg": "text"}], tmp_path / "x", shard_size=2)
    with pytest.raises(ValueError, match="samples"):
        write_shards([], tmp_path / "x", shard_size=2, settings={"samples": 3})


def test_a_sample_of_two_shards_is_named(tmp_path: Path) -> None:
    write_shards([*samples(2), *samples(1)], tmp_path / "x", shard_size=2)
    with pytest.raises(PipelineError, match=r"sample 0{20}_1 is there twice"):
        open_samples(tmp_path / "x")


def test_unfinished_folder(shard_dir: Path) -> None:
    (shard_dir / "_manifest.json").write_text("[]")
    with pytest.raises(PipelineError, match=r"manifest\.json: not a manifest"):
        open_samples(shard_dir)
    (shard_dir / "_manifest.json").unlink()
    with pytest.raises(PipelineError, match=r"manifest\.json: no such file"):
        open_samples(shard_dir)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut in a member":
        path.write_bytes(data[:1500])
    elif how == "cut between members":
        with tarfile.open(path) as tar:
            path.write_bytes(data[: tar.getmembers()[3].offset])
    elif how == "changed":
        path.write_bytes(data.replace(b"jj", b"jk", 1))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing"),
        ("cut in a member", "1500 bytes, _manifest.json says"),
        ("cut between members", "bytes, _manifest.json says"),
        ("changed", "SHA-256"),
    ],
)
def test_damaged_shard_is_named(shard_dir: Path, how: str, message: str) -> None:
    damage(shard_dir / "00001.tar", how)
    for read in (open_samples, lambda folder: list(read_shards(folder))):
        with pytest.raises(PipelineError, match=rf"00001\.tar: .*{message}.*again"):
            read(shard_dir)


def test_cut_shard_with_a_matching_manifest_is_named(shard_dir: Path) -> None:
    """The tar itself tells that it was cut, also where that falls between two members."""
    path = shard_dir / "00000.tar"
    damage(path, "cut between members")
    manifest = read_manifest(shard_dir)
    manifest["shards"][0]["bytes"] = path.stat().st_size
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (shard_dir / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PipelineError, match=r"00000\.tar: not a whole tar: cut off"):
        open_samples(shard_dir)


def test_sample_without_a_required_member_is_named(tmp_path: Path) -> None:
    parts = [{"__key__": "a", "jpg": b"1", "json": b"{}"}, {"__key__": "b", "jpg": b"2"}]
    write_shards(parts, tmp_path / "x", shard_size=5)
    with pytest.raises(PipelineError, match=r"00000\.tar: sample b lacks json"):
        list(read_shards(tmp_path / "x", members={"jpg", "json"}))
    with pytest.raises(PipelineError, match="sample b lacks json"):
        open_samples(tmp_path / "x")
    assert len(open_samples(tmp_path / "x", members={"jpg"})) == 2


@pytest.mark.parametrize("entry", ["x", {"name": "00000.tar"}, {"nam": 1}])
def test_a_manifest_with_foreign_entries_is_named(shard_dir: Path, entry: object) -> None:
    (shard_dir / "_manifest.json").write_text(json.dumps({"shards": [entry], "samples": 1}))
    with pytest.raises(PipelineError, match=r"manifest\.json: not a manifest of shards"):
        open_samples(shard_dir)
