"""Training that is cut off and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.cache_store import collect
from pipeline.methods.students import TrainParams
from pipeline.params.base import EncoderParams
from tests.stages.tiny_training import (
    outputs,
    run,
    small_params,
    start_training,
    states,
    version,
    write_labels,
)


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cut_off(labels_dir: Path, root: Path, params: TrainParams) -> None:
    """A run that fails after its last iteration; as under DVC, its outputs are then removed."""
    with pytest.raises(FileExistsError):
        run(labels_dir, root, params, stats_path=root / "zutis/config.json/stats.json")
    remove_outputs(root)


def remove_outputs(root: Path) -> None:
    for name in ("zutis", "live"):
        shutil.rmtree(root / name, ignore_errors=True)


def test_killed_at_any_time_and_started_again_gives_the_same_bytes(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = small_params(encoder, iterations=50, log_every=2, checkpoint_every=5)
    undisturbed = outputs(run(labels_dir, tmp_path / "undisturbed", params))
    rng = random.Random(0)
    root = tmp_path / "killed"
    for removes in (False, True):
        before = version(root)
        process = start_training(labels_dir, root, params)
        process.wait_until(lambda before=before: version(root) not in ([], before))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        if removes:
            remove_outputs(root)
    assert states(root)

    process = start_training(labels_dir, root, params)
    code, output = process.wait(), process.output()
    assert code == 0, output
    assert "train: resumed at step " in output
    assert " of 50\n" in output
    finished = outputs(root)
    assert {name: finished[name] for name in undisturbed} == undisturbed
    assert not (root / "cache/train").exists()


def test_the_state_of_a_running_training_is_kept_from_gc(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    def collected() -> list[str]:
        verdicts = collect(tmp_path / "cache", now=time.time() + 7200, unused_days=0, kind="train")
        return [verdict.reason for verdict in verdicts if not verdict.is_removed]

    params = small_params(encoder, iterations=5000, checkpoint_every=1)
    process = start_training(labels_dir, tmp_path, params)
    process.wait_until(lambda: bool(states(tmp_path)))
    first = version(tmp_path)
    process.wait_until(lambda: version(tmp_path) != first)  # marked after the first
    assert collected() == ["in use by a running stage"]
    process.kill()
    assert states(tmp_path)
    assert collected() == []
    assert not states(tmp_path)


def test_a_run_cut_off_at_its_very_end_only_writes_what_is_left(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = small_params(encoder)
    undisturbed = outputs(run(labels_dir, tmp_path / "undisturbed", params))
    cut_off(labels_dir, tmp_path / "a", params)
    capsys.readouterr()
    root = run(labels_dir, tmp_path / "a", params.model_copy(update={"workers": 2}))
    assert "train: resumed at step 3 of 3\n" in capsys.readouterr().out
    written = outputs(root)
    config = json.loads(written.pop("zutis/config.json"))
    expected = json.loads(undisturbed.pop("zutis/config.json"))
    assert config == {**expected, "train": {**expected["train"], "workers": 2}}
    assert written == undisturbed
    assert states(root) == []
    stats = json.loads((root / "stats.json").read_text())
    assert stats["items"] == 0
    assert stats["counts"]["resumed_at_iteration"] == 3


def test_never_starts_anew(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = small_params(encoder)
    cut_off(labels_dir, tmp_path, params)
    run(labels_dir, tmp_path, params, resume=False)
    assert "resumed" not in capsys.readouterr().out
    assert json.loads((tmp_path / "stats.json").read_text())["items"] == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_state_is_reported_and_not_used(
    labels_dir: Path,
    encoder: EncoderParams,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    params = small_params(encoder)
    undisturbed = outputs(run(labels_dir, tmp_path / "undisturbed", params))
    root = tmp_path / "a"
    cut_off(labels_dir, root, params)
    [path] = states(root)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    foreign = (tmp_path / "undisturbed/zutis/model.safetensors").read_bytes()
    damaged = {"cut": data[:-100], "flipped": data, "empty": b"", "foreign": foreign}
    path.write_bytes(damaged[damage])
    capsys.readouterr()
    run(labels_dir, root, params)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert line.startswith(f"train: {path}: damaged (")
    assert line.endswith("; training starts anew")
    assert outputs(root) == undisturbed


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"learning_rate": 2e-3}},
        {"params": {"iterations": 4}},
        {"background": ["background", "sky"]},
        {"labels": 7},
    ],
)
def test_another_setting_does_not_resume(
    labels_dir: Path,
    encoder: EncoderParams,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
) -> None:
    cut_off(labels_dir, tmp_path, small_params(encoder))
    [path] = states(tmp_path)
    changes = {name: value for name, value in change.items() if name == "background"}
    if "labels" in change:
        labels_dir = write_labels(tmp_path / "labels", shard_size=change["labels"])
    run(labels_dir, tmp_path, small_params(encoder, **change.get("params", {})), **changes)
    assert "resumed" not in capsys.readouterr().out
    assert states(tmp_path) == [path]
