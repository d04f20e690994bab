"""Stages whose inputs and outputs lie in an object store that speaks S3, or behind other URLs."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.engine.cache_store import DAY_S, Verdict, collect
from pipeline.engine.remote import fetch, publishing
from pipeline.errors import PipelineError
from pipeline.files import as_location
from pipeline.formats.shards import MANIFEST
from pipeline.formats.sources import list_images, read_image
from pipeline.params.sources import SourceParams
from tests.stages.tiny_workspace import Workspace, content, write_workspace

pytest.importorskip("upath", reason="universal_pathlib is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")
moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")

PARAMS = """
categories: [cat, dog, bird]
k: 4
index:
  pool: {{root: "{root}"}}
embed:
  encoder: {{model: "{model}", pretrained: "{weights}"}}
  shard_size: 8
  batch_size: 4
retrieve: {{templates: name}}
mask: {{weights: "{selfmask}", shard_size: 5}}
pseudo_label:
  encoder: {{model: "{model}", pretrained: "{weights}"}}
  templates: name
"""

# Fetches what lies at a URL and reads it until its standard input ends.
READER = """
import sys
from pathlib import Path
from pipeline.engine.remote import fetch
from pipeline.files import as_location
print(fetch(as_location(sys.argv[1]), Path(sys.argv[2])), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """URL of a bucket on a local server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        as_location("s3://bucket").mkdir()
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def workspace(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> Workspace:
    return write_workspace(tmp_path / "world", tiny_clip, index=20, bench=1)


def upload(folder: Path, url: str) -> None:
    for name, data in content(folder).items():
        target = as_location(f"{url}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def run(workspace: Workspace, root: str, *arguments: str) -> None:
    """A command of the pipeline, with its params and cache in the workspace."""
    params = PARAMS.format(
        root=root,
        model=workspace.encoder.model,
        weights=workspace.encoder.pretrained,
        selfmask=workspace.root / "selfmask.safetensors",
    )
    (workspace.root / "params.yaml").write_text(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        patch.setenv("PIPELINE_CACHE", str(workspace.root / "cache"))
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)


def test_stages_from_store_to_store(workspace: Workspace, store: str, tmp_path: Path) -> None:
    upload(workspace.images, f"{store}/a/images")
    root = f"{store}/a/images"
    run(workspace, root, "embed", "--source", "pool", "--out", f"{store}/a/embeddings/pool")
    archives = f"{store}/a/archives.parquet"
    run(workspace, root, "retrieve", "--embeddings", f"{store}/a/embeddings", "--out", archives)
    run(workspace, root, "mask", "--archives", archives, "--out", f"{store}/a/masks")
    masks, labels = f"{store}/a/masks", f"{store}/a/labels"
    run(workspace, root, "pseudo_label", "--masks", masks, "--out", labels)

    for command in (
        ("embed", "--source", "pool"),
        ("retrieve",),
        ("mask", "--archives", "data/archives.parquet", "--out", "data/masks"),
    ):
        run(workspace, root, *command)
    for name in ("embeddings/pool", "masks"):
        fetched = fetch(as_location(f"{store}/a/{name}"), tmp_path / "other_cache")
        found = {k: v for k, v in content(fetched).items() if not k.startswith(".")}
        assert found == content(workspace.root / "data" / name)
    assert fetch(as_location(labels), tmp_path / "other_cache").joinpath("00000.tar").is_file()


def everything(source: SourceParams) -> list[tuple[Any, bytes]]:
    """What is below a root: names relative to it, and bytes."""
    root = str(source.root)
    return [
        (ref.key, ref.path.removeprefix(root), ref.member, ref.offset, read_image(ref))
        for ref in list_images("pool", source)
    ]


@pytest.mark.parametrize("format", ["folder", "webdataset", "parquet"])
def test_a_source_in_the_store_is_that_of_a_folder(
    workspace: Workspace, store: str, tmp_path: Path, format: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.formats.shard_folders import write_shards

    root = tmp_path / "pool"
    (root / "b/c").mkdir(parents=True)
    pictures = [path.read_bytes() for path in sorted(workspace.images.iterdir())[:6]]
    if format == "folder":
        for number, name in enumerate(("b.png", "b/z.png", "b/c/a.png", "a.jpg", ".x.png")):
            (root / name).write_bytes(pictures[number])
    elif format == "webdataset":
        samples = [{"__key__": f"k{n}", "png": data} for n, data in enumerate(pictures)]
        write_shards(samples, root, shard_size=4)
    else:
        pq.write_table(pa.table({"image": pictures}), root / "a.parquet")
    upload(root, f"{store}/{format}")
    local = everything(SourceParams(root=root, format=format))
    assert len(local) >= 4
    remote = SourceParams(root=f"{store}/{format}", format=format)
    assert everything(remote) == local
    assert everything(SourceParams(root=f"file://{root}", format=format)) != []


def test_only_what_has_changed_is_fetched_again(store: str, tmp_path: Path) -> None:
    folder = as_location(f"{store}/fetched")
    for name in ("a", "b", "sub/c"):
        (folder / name).write_bytes(name.encode())
    copy = fetch(folder, tmp_path)
    before = (copy / "a").stat().st_mtime_ns
    (folder / "b").write_bytes(b"new")
    (folder / "sub/c").unlink()
    assert fetch(folder, tmp_path) == copy
    assert (copy / "a").stat().st_mtime_ns == before
    assert (copy / "b").read_bytes() == b"new"
    assert not (copy / "sub/c").exists()


@contextmanager
def reading(url: str, cache_dir: Path) -> Iterator[Path]:
    """Another process that has fetched what lies at a URL and is at work with it."""
    command = [sys.executable, "-c", READER, url, str(cache_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        yield Path(reader.stdout.readline().strip())
        reader.communicate()


def gc_after(days: float, cache_dir: Path) -> list[Verdict]:
    """What becomes of things that were not used for 30 days, so many days from now."""
    return list(collect(cache_dir, now=time.time() + days * DAY_S, unused_days=30))


def test_a_copy_counts_as_used_when_it_was_asked_for_last_and_stays_while_it_is_read(
    tmp_path: Path,
) -> None:
    url, cache_dir = f"file://{tmp_path}/masks", tmp_path / "cache"
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/00000.tar").write_bytes(b"x")
    with reading(url, cache_dir) as copy:
        pass
    for path in [cache_dir, *cache_dir.rglob("*")]:
        os.utime(path, (time.time() - 31 * DAY_S,) * 2)
    with reading(url, cache_dir) as again:
        assert again == copy
        assert gc_after(0, cache_dir) == []
        [verdict] = gc_after(31, cache_dir)
        assert (verdict.is_removed, verdict.reason) == (False, "in use by a running stage")
        assert (copy / "00000.tar").read_bytes() == b"x"
    assert [verdict.is_removed for verdict in gc_after(31, cache_dir)] == [True]
    assert not copy.exists()


def test_nothing_at_a_url_is_an_error(store: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="s3://bucket/nowhere: no such file or folder"):
        fetch(as_location(f"{store}/nowhere"), tmp_path)


def test_a_failed_stage_sends_nothing(store: str, tmp_path: Path) -> None:
    target = as_location(f"{store}/failed")

    def fail() -> None:
        with publishing(target, tmp_path) as made:
            made.mkdir(parents=True)
            (made / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(target.rglob("*"))


def test_what_is_made_does_not_touch_what_was_fetched(store: str, tmp_path: Path) -> None:
    """A failed send leaves the next reader with what is at the URL."""
    target = as_location(f"{store}/archives.parquet")
    target.write_bytes(b"first")
    copy = fetch(target, tmp_path)
    with publishing(target, tmp_path) as made:
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"never sent")
        assert copy.read_bytes() == b"first"
        made.unlink()
        made.write_bytes(b"other")
    assert fetch(target, tmp_path).read_bytes() == b"other"


def test_other_things_at_a_url_are_not_replaced(store: str, tmp_path: Path) -> None:
    (as_location(f"{store}/run/embeddings/pool") / "00000.parquet").write_bytes(b"x")
    with (
        pytest.raises(PipelineError, match="holds other things too, such as embeddings/pool"),
        publishing(as_location(f"{store}/run"), tmp_path),
    ):
        pass
    assert (as_location(f"{store}/run/embeddings/pool") / "00000.parquet").is_file()


def test_shards_of_somebody_else_are_not_replaced(store: str, tmp_path: Path) -> None:
    target = as_location(f"{store}/laion")
    (target / "00000.tar").write_bytes(b"theirs")
    with (
        pytest.raises(PipelineError, match=r"laion: .* has no _manifest\.json, so no earlier run"),
        publishing(target, tmp_path),
    ):
        pass
    assert (target / "00000.tar").read_bytes() == b"theirs"


def test_a_folder_whose_sending_was_cut_off_is_sent_again(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = as_location(f"{store}/masks")

    def send(numbers: Sequence[int]) -> None:
        with publishing(target, tmp_path) as made:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            for number in numbers:
                (made / f"{number:05}.tar").write_bytes(bytes([number]))
            (made / MANIFEST).write_bytes(b"{}")

    send(range(9))
    put = target.fs.put

    def put_little(sources: list[str], paths: list[str]) -> None:
        if sources[0].endswith("00004.tar"):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        put(sources, paths)

    with monkeypatch.context() as patch:
        patch.setattr(target.fs, "put", put_little)
        with pytest.raises(OSError, match="unreachable"):
            send(range(7))
    assert not (target / MANIFEST).exists()
    send(range(7))
    names = sorted(path.name for path in target.rglob("*") if path.is_file())
    assert names == [*(f"{number:05}.tar" for number in range(7)), MANIFEST]


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    target = as_location(f"file://{tmp_path}/new/masks")
    with publishing(target, tmp_path / "cache") as made:
        made.mkdir(parents=True)
        (made / "00000.tar").write_bytes(b"x")
    assert (tmp_path / "new/masks/00000.tar").read_bytes() == b"x"


def test_a_folder_of_a_manifest_alone_is_made(tmp_path: Path) -> None:
    target = as_location(f"file://{tmp_path}/new/masks")
    with publishing(target, tmp_path / "cache") as made:
        made.mkdir(parents=True)
        (made / MANIFEST).write_bytes(b"{}")
    assert (tmp_path / "new/masks" / MANIFEST).read_bytes() == b"{}"


def test_many_files_of_many_folders_are_sent(store: str, tmp_path: Path) -> None:
    target = as_location(f"{store}/many")
    with publishing(target, tmp_path / "cache") as made:
        for number in range(11):
            path = made / f"{number % 3}/{number}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([number]))
    sent = {path.name: path.read_bytes() for path in target.rglob("*.tar")}
    assert sent == {f"{number}.tar": bytes([number]) for number in range(11)}


def test_unknown_schemes_and_missing_packages_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"foo://b/x: not a URL that fsspec knows"):
        as_location("foo://b/x")
