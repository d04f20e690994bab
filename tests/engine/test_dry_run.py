"""Dry runs: what they say, and that they leave everything as it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.engine.dry_run import DryRun, last_rate
from pipeline.files import write_json
from tests.stages.tiny_workspace import SHARDED, Workspace, content, write_workspace

DONE = re.compile(r"done +about (\d+) of (\d+)")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    return write_workspace(tmp_path_factory.mktemp("dry"), tiny_clip, index=12, bench=5)


@pytest.mark.parametrize("stage", SHARDED)
def test_says_what_is_done_and_writes_nothing(
    stage: str, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = DryRun(tmp_path / "stats.json")
    workspace.run(stage, tmp_path / "fresh", executor=dry)
    before = capsys.readouterr().out
    assert not (tmp_path / "fresh").exists()
    assert "items" in before
    assert "unknown" in before
    workspace.run(stage, tmp_path / "made")
    files = content(tmp_path / "made")
    capsys.readouterr()
    workspace.run(stage, tmp_path / "made", executor=dry)
    assert content(tmp_path / "made") == files
    after = capsys.readouterr().out
    if stage != "bank":
        assert DONE.findall(before)[0][0] == "0"
        done, total = DONE.findall(after)[0]
        # All but an image that cannot be read.
        assert int(done) == int(total)


def test_what_a_killed_run_has_finished_is_a_bound(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "x" / f".made.{'0' * 16}.part"
    part.mkdir(parents=True)
    (part / "00000.tar.row.json").write_text("{}")
    write_json(tmp_path / "stats/mask.json", {"items": 100})
    times = {"stage": "mask", "seconds": 50.0, "counts": {}}
    write_json(tmp_path / "times/mask.json", times)
    workspace.run("mask", tmp_path / "x", executor=DryRun(tmp_path / "stats/mask.json"))
    said = capsys.readouterr().out
    assert "finished at most 1 shards, of a run that was cut off" in said
    assert re.search(r"time +at least \d+ s for \d+ items", said)
    shutil.rmtree(part)
    workspace.run("mask", tmp_path / "x", executor=DryRun(tmp_path / "stats/mask.json"))
    assert re.search(r"time +\d+ s for \d+ items", capsys.readouterr().out)


def test_the_rate_is_that_of_what_was_new(tmp_path: Path) -> None:
    stats = tmp_path / "stats/embed.json"
    assert last_rate(stats) is None
    write_json(stats, {"items": 100})
    times = tmp_path / "times/embed.json"
    for counts, rate in (
        ({}, 50.0),
        ({"cached": 60}, 20.0),
        ({"cached": 100}, None),
        ({"finished_before": 50}, 25.0),
        ({"cached": 0, "masked": 10}, 5.0),
    ):
        write_json(times, {"stage": "embed", "seconds": 2.0, "counts": counts})
        assert last_rate(stats) == rate
