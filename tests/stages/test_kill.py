"""Batch stages that are killed at any moment, again and again: nothing is lost, no byte differs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.formats.shards import MANIFEST
from tests.processes import Fork
from tests.stages.tiny_workspace import SHARDED, STAGES, Workspace, content, write_workspace

KILLS = 12
IMAGES = 60


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    root = tmp_path_factory.mktemp("kill") / "world"
    return write_workspace(root, tiny_clip, index=IMAGES, bench=IMAGES)


def start(workspace: Workspace, stage: str, out: Path) -> Fork:
    return Fork(lambda: workspace.run(stage, out))


def remove_temporaries(folder: Path) -> None:
    """What a killed run was writing lies beside its place, until a later run finds it old."""
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment(workspace: Workspace, tmp_path: Path, stage: str) -> None:
    begun = time.monotonic()
    assert start(workspace, stage, tmp_path / "calm").wait() == 0
    duration = time.monotonic() - begun
    rng = random.Random(f"kill {stage}")
    killed = 0
    for _ in range(KILLS):
        process = start(workspace, stage, tmp_path / "killed")
        time.sleep(rng.uniform(0, 1.2 * duration))
        process.kill()
        killed += process.poll() == -signal.SIGKILL
    assert start(workspace, stage, tmp_path / "killed").wait() == 0
    assert killed > 0
    remove_temporaries(tmp_path / "killed")
    assert content(tmp_path / "killed/made") == content(tmp_path / "calm/made")
    assert not list((tmp_path / "killed").glob(".*"))


def finished_rows(out: Path) -> list[Path]:
    return sorted(out.rglob("*.row.json"))


def stopped_late(workspace: Workspace, stage: str, out: Path) -> tuple[Fork, list[Path]]:
    """A process that stands still, and the rows of the shards that it has finished."""
    process = start(workspace, stage, out)
    process.wait_until(lambda: len(finished_rows(out)) >= 3)
    rows = finished_rows(out)
    process.send_signal(signal.SIGSTOP)
    return process, rows


@pytest.mark.parametrize("stage", SHARDED)
def test_finished_shards_are_kept_and_damaged_ones_are_made_again(
    workspace: Workspace, tmp_path: Path, stage: str
) -> None:
    """A kill late in the run leaves shards with their rows; one is then cut, one edited."""
    whole = workspace.run(stage, tmp_path / "calm")
    parent = tmp_path / "killed"
    process, rows = stopped_late(workspace, stage, tmp_path / "killed")
    shards = [row.with_name(row.name.removesuffix(".row.json")) for row in rows]
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    edited = bytearray(shards[-1].read_bytes())
    edited[len(edited) // 2] ^= 1
    shards[-1].write_bytes(edited)
    process.kill()
    assert process.poll() == -signal.SIGKILL
    assert not (parent / "made" / MANIFEST).exists()
    made = workspace.run(stage, tmp_path / "killed")
    assert content(made) == content(whole)


def test_shards_of_images_that_have_changed_since_are_not_kept(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    workspace = write_workspace(tmp_path / "world", tiny_clip, index=IMAGES, bench=1)
    process, _ = stopped_late(workspace, "embed", tmp_path / "killed")
    process.kill()
    first, second, *_ = sorted(workspace.images.iterdir())
    first.write_bytes(second.read_bytes())
    made = workspace.run("embed", tmp_path / "killed")
    assert content(made) == content(workspace.run("embed", tmp_path / "calm"))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ("thesis.tex", r"holds other things too, such as thesis\.tex"),
        ("00000.tar", r"has no _manifest\.json, so no earlier run has written it"),
    ],
)
def test_a_folder_of_something_else_is_not_replaced(
    workspace: Workspace, tmp_path: Path, theirs: str, message: str
) -> None:
    (tmp_path / "run/made").mkdir(parents=True)
    (tmp_path / "run/made" / theirs).write_text("years of work")
    with pytest.raises(PipelineError, match=message):
        workspace.run("mask", tmp_path / "run")
    assert (tmp_path / "run/made" / theirs).read_text() == "years of work"
    (tmp_path / "run/made" / theirs).unlink()
    workspace.run("mask", tmp_path / "run")
    workspace.run("mask", tmp_path / "run")


def test_finished_shards_are_kept_with_their_skipped_images(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    workspace = write_workspace(tmp_path / "world", tiny_clip, index=IMAGES, bench=1)
    for path in sorted(workspace.images.iterdir())[::7]:
        path.write_bytes(b"garbage")
    process, rows = stopped_late(workspace, "embed", tmp_path / "killed")
    kept = [row.with_name(row.name.removesuffix(".row.json")) for row in rows]
    numbers = [path.stat().st_ino for path in kept]
    process.kill()
    made = workspace.run("embed", tmp_path / "killed")
    assert [(made / path.name).stat().st_ino for path in kept] == numbers
    assert content(made) == content(workspace.run("embed", tmp_path / "calm"))
    stats = [json.loads((tmp_path / n / "stats.json").read_text()) for n in ("killed", "calm")]
    for name in ("items", "skipped", "skipped_items"):
        assert stats[0][name] == stats[1][name]
