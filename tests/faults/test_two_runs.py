"""Two runs of one stage in one workspace, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import Fork, fork_pipeline

NUM_IMAGES = 300


@pytest.fixture
def workspace(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> Path:
    """A folder with many small images and params."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:04d}.bmp")
    model, weights = map(str, tiny_clip)
    params = {
        "categories": ["cat"],
        "index": {"pool": {"root": "images"}},
        "embed": {"encoder": {"model": model, "pretrained": weights}, "batch_size": 8},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    return tmp_path


def start(workspace: Path, *args: str, cache: str = "cache") -> Fork:
    """`pipeline embed ARGS` as a process of its own."""
    words = ("embed", "--source", "pool", *args)
    return fork_pipeline(*words, cwd=workspace, PIPELINE_CACHE=workspace / cache)


def start_and_pause(workspace: Path) -> Fork:
    """A run that is stopped in the middle of its work."""
    process = start(workspace)
    process.wait_until(lambda: any(workspace.glob("data/embeddings/.pool.*")))
    process.send_signal(signal.SIGSTOP)
    return process


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks and signals")
def test_the_second_run_is_refused_and_the_first_ends_unharmed(workspace: Path) -> None:
    first = start_and_pause(workspace)
    second = start(workspace)
    assert second.wait() == 1
    assert not (workspace / "data/embeddings/pool").exists()
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0, first.output()
    assert second.output().splitlines()[-1] == (
        "error: reports/stats/embed-pool.json: another run is writing it "
        f"(process {first.pid} on {socket.gethostname()}); wait until it has ended, or stop it"
    )
    stats = json.loads((workspace / "reports/stats/embed-pool.json").read_text())
    assert stats["items"] == NUM_IMAGES

    assert start(workspace, "--out", "alone", "--stats", "alone.json", cache="other").wait() == 0
    assert shards(workspace / "data/embeddings/pool") == shards(workspace / "alone")
    assert list(workspace.glob("data/embeddings/.*")) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks and signals")
def test_a_killed_run_is_in_nobodys_way(workspace: Path) -> None:
    start_and_pause(workspace).kill()
    assert start(workspace).wait() == 0
    assert "00000.parquet" in shards(workspace / "data/embeddings/pool")
