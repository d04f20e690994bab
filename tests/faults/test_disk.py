"""Disks that are full, that take no large file, or that cannot be written.

The disks are real: small file systems in a namespace of their own, reached through `/proc`. Where
that is not allowed, the tests with a limit on the size of files remain.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.cli import main
from pipeline.formats.shards import MANIFEST
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, save_selfmask
from tests.conftest import encoded_image, noise_image
from tests.processes import Fork

PAGE = mmap.PAGESIZE  # these disks have no smaller files
NUM_IMAGES = 12

PARAMS = """\
categories: [cat, dog]
k: 5
index: {{pool: {{root: images}}}}
embed: {{encoder: &clip {clip}, batch_size: 4, shard_size: 5, workers: 0}}
mask: {{weights: selfmask.safetensors, short_side: 60, batch_size: 2, shard_size: 4, workers: 0}}
pseudo_label: {{encoder: *clip, batch_size: 2, shard_size: 4, workers: 0}}
"""
# A stage's command, its usual output and its folder of the cache.
STAGES = {
    "embed": (["embed", "--source", "pool"], "data/embeddings/pool", "embed"),
    "mask": (["mask"], "data/masks", "masks"),
    "pseudo_label": (["pseudo_label"], "data/labels", "pseudo_label"),
}


class Workspace:
    """A folder with images, params and the outputs of undisturbed stages.

    Attributes:
        root: the folder.
        expected: files of each stage's output.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "images").mkdir(parents=True)
        for number in range(NUM_IMAGES):
            image = noise_image(number, width=40 + number, height=50 - number)
            (root / "images" / f"{number}.jpg").write_bytes(encoded_image(image, "JPEG"))

    def run(self, *args: str, cache: Path | None = None) -> str:
        """Run `pipeline ARGS` here; the line that it ends with, empty if all went well."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setenv("PIPELINE_CACHE", str(cache or self.root / "cache"))
            patch.setattr(sys, "argv", ["pipeline", *args])
            with pytest.raises(SystemExit) as stop:
                main()
        assert not isinstance(stop.value.code, int) or stop.value.code == 0
        return str(stop.value.code or "")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("disk") / "workspace")
    model, weights = map(str, tiny_clip)
    clip = json.dumps({"model": model, "pretrained": weights})
    (workspace.root / "params.yaml").write_text(PARAMS.format(clip=clip))
    torch.manual_seed(0)
    config = SelfMaskConfig(
        dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=1, mlp_ratio=2, grid=4
    )
    save_selfmask(SelfMask(config), workspace.root / "selfmask.safetensors")
    for command in (["embed", "--source", "pool"], ["retrieve"], ["mask"], ["pseudo_label"]):
        assert workspace.run(*command) == ""
    return workspace


class SmallDisk:
    """A file system of one megabyte in a namespace, which a shell keeps alive.

    Attributes:
        path: its folder, as seen from outside.
    """

    def __init__(self, mount_point: Path, shell: subprocess.Popen[str]) -> None:
        self._mount_point = mount_point
        self._shell = shell
        self.path = Path(f"/proc/{shell.pid}/root{mount_point}")
        self._do(f"mount -t tmpfs -o size=1m tmpfs '{mount_point}'")

    def fill(self, *, but: int = 0) -> None:
        """Leave no more than `but` bytes."""
        stat = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - but))

    def make_space(self) -> None:
        (self.path / "ballast").unlink()

    def protect(self) -> None:
        """Make it read-only, for root too."""
        self._do(f"mount -o remount,ro '{self._mount_point}'")

    def _do(self, command: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{command} && echo done || echo failed\n")
        self._shell.stdin.flush()
        if self._shell.stdout.readline() != "done\n":
            pytest.skip(f"namespaces with file systems of their own are not allowed: {command}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, of Linux")
    (tmp_path / "disk").mkdir()
    with subprocess.Popen(
        ["unshare", "-rm", "sh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        yield SmallDisk(tmp_path / "disk", shell)
        shell.kill()


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def temporary(folder: Path) -> list[Path]:
    """What has not got its name yet, but for the folder of shards that are finished."""
    return [path for path in folder.rglob(".*") if path.suffix != ".part"]


def earlier_output(folder: Path) -> dict[str, bytes]:
    """Something of an earlier run."""
    folder.mkdir(parents=True)
    (folder / "00000.tar").write_bytes(b"earlier")
    (folder / MANIFEST).write_bytes(b"{}")
    return files(folder)


@pytest.mark.parametrize("left", [0, 2 * PAGE])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_keeps_the_earlier_output(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str, left: int
) -> None:
    command, usual, _ = STAGES[stage]
    out = disk.path / "new" / "out"
    earlier = earlier_output(out)
    disk.fill(but=left)
    cache = tmp_path / "cache"
    message = workspace.run(*command, "--out", str(out), cache=cache)
    assert message.startswith(f"error: no space left on the disk ({out}")
    assert files(out) == earlier
    assert temporary(disk.path) == []

    disk.make_space()
    assert workspace.run(*command, "--out", str(out), cache=cache) == ""
    assert files(out) == files(workspace.root / usual)
    assert list(out.parent.glob(".*")) == []


@pytest.mark.parametrize("left", [0, PAGE])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_cache_keeps_what_it_had(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str, left: int
) -> None:
    command, usual, kind = STAGES[stage]
    cache, out = disk.path / "cache", tmp_path / "out"
    earlier = earlier_output(out)
    earlier_cache = earlier_output(cache / kind / ("0" * 32))
    disk.fill(but=left)
    message = workspace.run(*command, "--out", str(out), cache=cache)
    assert message.startswith(f"error: no space left on the disk ({cache / kind}")
    assert files(out) in (earlier, files(workspace.root / usual))  # never a half
    assert files(cache / kind / ("0" * 32)) == earlier_cache
    assert temporary(disk.path) == []
    assert temporary(tmp_path) == []

    disk.make_space()
    assert workspace.run(*command, "--out", str(out), cache=cache) == ""
    assert files(out) == files(workspace.root / usual)
    assert list(out.parent.glob(".*")) == []


def test_gc_makes_space_on_a_full_disk(workspace: Workspace, disk: SmallDisk) -> None:
    command, _, kind = STAGES["embed"]
    cache = disk.path / "cache"
    assert workspace.run(*command, "--out", str(disk.path / "out"), cache=cache) == ""
    disk.fill()
    assert workspace.run("cache", "gc", "--unused-days", "0", cache=cache) == ""
    assert list((cache / kind).iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_counts_that_find_no_space_are_written_by_the_next_run(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str
) -> None:
    command, usual, _ = STAGES[stage]
    stats, out = disk.path / "stats.json", tmp_path / "out"
    stats.write_text("earlier")
    disk.fill()
    arguments = [*command, "--out", str(out), "--stats", str(stats)]
    message = workspace.run(*arguments, cache=tmp_path / "cache")
    assert message.startswith(f"error: no space left on the disk ({stats})")
    assert stats.read_text() == "earlier"
    assert temporary(disk.path) == []
    disk.make_space()
    assert workspace.run(*arguments, cache=tmp_path / "cache") == ""
    assert json.loads(stats.read_text())["stage"] == stage
    assert files(out) == files(workspace.root / usual)


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_output_is_a_mistake(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str
) -> None:
    command, _, _ = STAGES[stage]
    out = disk.path / "out"
    earlier = earlier_output(out)
    disk.protect()
    message = workspace.run(*command, "--out", str(out), cache=tmp_path / "cache")
    read_only = os.strerror(errno.EROFS)
    assert message == f"error: {read_only} ({out}): make it writable or choose another path"
    assert files(disk.path) == {f"out/{name}": content for name, content in earlier.items()}
    assert not (tmp_path / "cache").exists()  # it was known before the work


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_cache_is_read(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str
) -> None:
    command, usual, kind = STAGES[stage]
    cache, out, stats = disk.path / "cache", tmp_path / "out", tmp_path / "stats.json"
    arguments = [*command, "--out", str(out), "--stats", str(stats)]
    shutil.copytree(workspace.root / "cache" / kind, cache / kind)
    disk.protect()
    assert workspace.run(*arguments, cache=cache) == ""
    assert json.loads(stats.read_text())["counts"]["cached"] > 0
    assert files(out) == files(workspace.root / usual)


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_cache_that_lacks_something_is_named(
    workspace: Workspace, disk: SmallDisk, tmp_path: Path, stage: str
) -> None:
    command, usual, kind = STAGES[stage]
    out = tmp_path / "out"
    earlier = earlier_output(out)
    disk.protect()
    message = workspace.run(*command, "--out", str(out), cache=disk.path)
    assert message.startswith(f"error: {os.strerror(errno.EROFS)} ({disk.path / kind}")
    assert files(out) in (earlier, files(workspace.root / usual))
    assert temporary(tmp_path) == []


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_below_a_file_is_a_mistake(
    workspace: Workspace, tmp_path: Path, stage: str
) -> None:
    (tmp_path / "file").write_text("mine")
    message = workspace.run(
        *STAGES[stage][0], "--out", str(tmp_path / "file" / "out"), cache=tmp_path / "cache"
    )
    assert message.startswith("error: ")
    assert message.endswith(f" ({tmp_path}/file): make it writable or choose another path")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="needs limits of POSIX")
@pytest.mark.parametrize("stage", STAGES)
def test_a_limit_on_the_size_of_files_is_told_as_such(
    workspace: Workspace, tmp_path: Path, stage: str
) -> None:
    command, usual, _ = STAGES[stage]
    out, cache = tmp_path / "out", tmp_path / "cache"
    earlier = earlier_output(out)
    arguments = [*command, "--out", str(out), "--stats", str(tmp_path / "stats.json")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        sys.exit(workspace.run(*arguments, cache=cache) or 0)

    process = Fork(limited)
    code, output = process.wait(), process.output()
    assert code == 1
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("error: a file is larger than the disk or `ulimit -f` allows (")
    assert str(tmp_path) in last
    assert files(out) == earlier
    assert temporary(tmp_path) == []
    assert workspace.run(*arguments, cache=cache) == ""
    assert files(out) == files(workspace.root / usual)
