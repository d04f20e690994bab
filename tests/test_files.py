"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.files import (
    as_location,
    atomic_path,
    check_writable,
    claim,
    digest,
    file_sha256,
    read_json,
    replace_dir,
    resumable_dir,
    write_bytes,
    write_json,
)

# Holds the claim of a path until it is killed.
HOLDER = """
import sys
from pathlib import Path
from pipeline.files import claim
with claim(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""

needs_locks = pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks")


class Interruption(Exception):
    """Stands for whatever stops a stage half-way."""


@pytest.fixture
def umask_027() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_atomic_path_moves_the_finished_file_and_makes_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"content")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_on_an_exception(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_atomic_path_leaves_nothing_where_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(Interruption), atomic_path(tmp_path / "file.bin"):
        raise Interruption
    assert names(tmp_path) == []


@pytest.mark.usefixtures("umask_027")
def test_outputs_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"")
    with replace_dir(tmp_path / "folder"):
        pass
    assert mode(tmp_path / "file") == 0o640
    assert mode(tmp_path / "folder") == 0o750


def test_replace_dir_swaps_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "shards"
    for shards in (["0.tar", "1.tar"], ["0.tar"]):
        with replace_dir(folder) as temporary:
            assert names(temporary) == []
            for name in shards:
                (temporary / name).write_text(f"one of {len(shards)}")
        assert names(folder) == shards
        assert (folder / "0.tar").read_text() == f"one of {len(shards)}"
    assert names(folder.parent) == ["shards"]


def test_replace_dir_keeps_the_old_folder_on_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").write_text("old")

    def write_half() -> None:
        with replace_dir(folder) as temporary:
            (temporary / "0.tar").write_text("new")
            raise Interruption

    with pytest.raises(Interruption):
        write_half()
    assert (folder / "0.tar").read_text() == "old"
    assert names(tmp_path) == ["shards"]


def test_write_json_keeps_order_and_writes_null_for_what_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    value = {
        "miou": float("nan"),
        "ap": float("inf"),
        "all": [-float("inf"), (0.5, float("nan"))],
        "category": "chaussée",
        "count": 2,
    }
    write_json(path, value)

    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "chaussée" in text

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    assert list(json.loads(text, parse_constant=refuse).items()) == [
        ("miou", None),
        ("ap", None),
        ("all", [None, [0.5, None]]),
        ("category", "chaussée"),
        ("count", 2),
    ]
    assert read_json(path) == json.loads(text)


def test_write_json_of_an_unknown_type_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"miou": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"miou": object()})
    assert read_json(path) == {"miou": 0.5}
    assert names(tmp_path) == ["metrics.json"]


def test_read_json_names_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(PipelineError, match=f"{path}: no such file"):
        read_json(path)


@pytest.mark.parametrize("content", [b"", b'{"samples": 3', b"\xff\xfe\x00"])
def test_read_json_names_a_file_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=f"{path}: not valid JSON"):
        read_json(path)


def test_digests_depend_on_content_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_bytes(tmp_path / name, b"abc")
    # The SHA-256 of "abc" as published in FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b") == expected
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1, "b": [2]}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("writer", [atomic_path, replace_dir])
def test_a_failure_removes_the_folders_made_for_it(tmp_path: Path, writer: Any) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(Interruption), writer(tmp_path / "mine" / "a" / "b" / "out"):
        raise Interruption
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


@pytest.mark.parametrize("writer", [atomic_path, replace_dir])
def test_a_full_disk_is_told_of_the_file_that_was_meant(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(OSError, match="No space") as caught, writer(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out")


def test_a_failed_move_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_bytes(tmp_path / "out", b"x")
    assert caught.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "out.json")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "out.json")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)


@pytest.fixture
def lock_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, here one of our own."""
    folder = tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@needs_locks
def test_a_claim_keeps_another_process_out_until_it_is_killed(
    tmp_path: Path, lock_dir: Path
) -> None:
    path = tmp_path / "out" / "masks"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(PipelineError) as caught, claim(path):
            pytest.fail("two claims at once")
        holder.kill()
    assert str(caught.value) == (
        f"{path}: another run is writing it (process {holder.pid} on {socket.gethostname()}); "
        "wait until it has ended, or stop it"
    )
    assert len(names(lock_dir)) == 1  # the killed process could not tidy up
    with claim(path):
        pass
    assert names(lock_dir) == []
    assert names(tmp_path) == ["locks"]


@needs_locks
def test_a_claim_ends_with_its_block_however_that_ends(tmp_path: Path, lock_dir: Path) -> None:
    for error in (Interruption, KeyboardInterrupt, PipelineError):
        with pytest.raises(error), claim(tmp_path / "out"):
            raise error
        assert names(lock_dir) == []
    with claim(tmp_path / "out"):
        assert len(names(lock_dir)) == 1


@needs_locks
@pytest.mark.usefixtures("lock_dir")
def test_a_claim_is_of_one_path_by_all_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    with claim(tmp_path / "real" / "out"):
        for same in ("real/out", "link/out", "real/../real/out"):
            with pytest.raises(PipelineError, match=f"^{same}: another run"), claim(Path(same)):
                pytest.fail("two claims at once")
        with claim(tmp_path / "real" / "other"), claim(tmp_path / "real"):
            pass


@needs_locks
def test_a_claim_outlives_what_is_claimed(tmp_path: Path, lock_dir: Path) -> None:
    """DVC removes the outputs of a stage."""
    path = tmp_path / "stats.json"
    path.write_text("{}")
    with claim(path):
        path.unlink()
        with pytest.raises(PipelineError, match="another run"), claim(path):
            pytest.fail("two claims at once")
    assert names(lock_dir) == []


def test_without_a_place_for_its_lock_a_claim_lets_all_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with claim(tmp_path / "out"), claim(tmp_path / "out"):
        assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("ending", ["part", "old"])
def test_what_belongs_to_a_longer_name_is_left_alone(tmp_path: Path, ending: str) -> None:
    other = tmp_path / f".pool.en.{'0' * 16}.{ending}"
    other.mkdir()
    (other / "hours").write_text("of work")
    (tmp_path / "pool").mkdir()
    with resumable_dir(tmp_path / "pool", "1" * 64) as folder:
        (folder / "new").write_text("x")
    assert (other / "hours").exists()
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["new"]


def test_an_interrupted_folder_is_continued_by_its_key_only(tmp_path: Path) -> None:
    def stop(key: str) -> list[str]:
        with resumable_dir(tmp_path / "out", key) as folder:
            found = [path.name for path in folder.iterdir()]
            (folder / key[0]).write_text("x")
            if len(found) < 1:
                raise RuntimeError(str(found))
        return found

    for key in ("a" * 64, "b" * 64):
        with pytest.raises(RuntimeError):
            stop(key)
    assert stop("b" * 64) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FOLDER_WRITERS = [replace_dir, partial(resumable_dir, key="b" * 64)]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("made_by", ["a1b2_c3d", "a" * 16])
@pytest.mark.parametrize("writer", FOLDER_WRITERS)
def test_a_kill_between_the_moves_of_a_folder_loses_nothing(
    tmp_path: Path, writer: Callable, made_by: str, swapped: bool
) -> None:
    retired = tmp_path / f".out.{made_by}.old"
    retired.mkdir()
    (retired / "old").write_text("x")
    os.utime(retired, (0, 0))  # the old content was written long ago
    if swapped:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/newer").write_text("x")
    with pytest.raises(Interruption), writer(tmp_path / "out"):
        raise Interruption
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["newer" if swapped else "old"]


@pytest.mark.parametrize("writer", FOLDER_WRITERS)
def test_what_was_replaced_is_not_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable
) -> None:
    """A kill while it is removed may leave half of it."""
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        for number in range(2):
            with writer(tmp_path / "out") as folder:
                (folder / str(number)).write_text("x")
        assert len(names(tmp_path)) == 2
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Interruption), writer(tmp_path / "out"):
        raise Interruption
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", FOLDER_WRITERS)
def test_a_link_to_a_folder_elsewhere_stays_one(tmp_path: Path, writer: Callable) -> None:
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    for number in range(2):
        with writer(tmp_path / "out") as folder:
            (folder / str(number)).write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk/real").iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_url_that_was_made_a_path_is_refused() -> None:
    for text in ("s3://bucket/x", "gs://bucket/x"):
        with pytest.raises(PipelineError, match="must be a path"):
            check_writable(Path(text))


def test_a_fork_does_not_hold_its_parents_claims(tmp_path: Path) -> None:
    """Orphans of a killed run, such as workers of a data loader, are in nobody's way."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        with claim(tmp_path / "out"):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            os.write(write, child.to_bytes(4, "big"))
            time.sleep(30)
        os._exit(0)
    orphan = int.from_bytes(os.read(read, 4), "big")
    try:
        with pytest.raises(PipelineError), claim(tmp_path / "out"):
            pass
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        with claim(tmp_path / "out"):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("~/photos", "write /home/me/photos"),
        ("~", "write /home/me"),
        ("file:/abs/photos", "write the path alone, /abs/photos"),
        ("file://abs/photos", "write the path alone, /abs/photos"),
        ("s3:/bucket/a", "write s3://bucket/a"),
        ("gs:/bucket", "write gs://bucket"),
        ("C:\\photos", "a path of Windows"),
        ("d:/photos", "a path of Windows"),
        ("\\\\server\\photos", "a path of Windows"),
    ],
)
def test_what_nobody_means_as_a_location_is_told(
    monkeypatch: pytest.MonkeyPatch, text: str, remedy: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(ValueError, match=re.escape(f"{text}: ") + ".*" + re.escape(remedy)):
        as_location(text)


@pytest.mark.parametrize("text", ["~nobody-at-all/x", "./~", "a:b", "./s3:/x", "data/C:", "7:/x"])
def test_odd_names_are_locations(text: str) -> None:
    assert as_location(text) == Path(text)
    assert as_location(as_location(text)) == Path(text)
