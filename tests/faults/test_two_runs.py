"""Two runs of one stage in one workspace, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.paths import ROOT

PATIENCE_S = 120
NUM_IMAGES = 800
COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]
EMBED = [*COMMAND, "embed", "--source", "pool"]


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


def environment(workspace: Path, cache: str) -> dict[str, str]:
    cache_dir = str(workspace / cache)
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PIPELINE_CACHE": cache_dir,
        "OMP_NUM_THREADS": "1",
    }


def embed(workspace: Path, *args: str, cache: str = "cache") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EMBED, *args],
        cwd=workspace,
        env=environment(workspace, cache),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def start_and_pause(workspace: Path) -> subprocess.Popen[str]:
    """A run that is stopped in the middle of its work."""
    process = subprocess.Popen(
        EMBED,
        cwd=workspace,
        env=environment(workspace, "cache"),
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + PATIENCE_S
    while not list(workspace.glob("data/embeddings/.pool.*")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    return process


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks and signals")
def test_the_second_run_is_refused_and_the_first_ends_unharmed(workspace: Path) -> None:
    with start_and_pause(workspace) as first:
        second = embed(workspace)
        assert not (workspace / "data/embeddings/pool").exists()
        first.send_signal(signal.SIGCONT)
        _, stderr = first.communicate(timeout=PATIENCE_S)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1] == (
        "error: reports/stats/embed-pool.json: another run is writing it "
        f"(process {first.pid} on {socket.gethostname()}); wait until it has ended, or stop it"
    )
    assert first.returncode == 0, stderr
    assert json.loads((workspace / "reports/stats/embed-pool.json").read_text())["items"] == 800

    alone = ["--out", "alone", "--stats", "alone.json"]
    assert embed(workspace, *alone, cache="other").returncode == 0
    assert shards(workspace / "data/embeddings/pool") == shards(workspace / "alone")
    assert list(workspace.glob("data/embeddings/.*")) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks and signals")
def test_a_killed_run_is_in_nobodys_way(workspace: Path) -> None:
    with start_and_pause(workspace) as first:
        first.kill()
    assert embed(workspace).returncode == 0
    assert "00000.parquet" in shards(workspace / "data/embeddings/pool")
