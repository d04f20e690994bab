"""`pipeline export --to onnx` and `pipeline predict --onnx`, the latter where torch is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pipeline.cli import main
from pipeline.engine.runtime import Runtime
from pipeline.exporters.onnx import export_onnx
from pipeline.files import read_json
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import EvaluateParams
from pipeline.stages import predict
from tests.conftest import encoded_image
from tests.stages.tiny_checkpoint import write_checkpoint
from tests.without_torch import ROOT, environment_without_torch


def run_without_torch(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process that has no torch."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=cwd,
        env=environment_without_torch(cwd / "without_torch"),
        capture_output=True,
        text=True,
        check=False,
    )


def run_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """A command in this process; SystemExit where it fails."""
    monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different sizes, one of a broken file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(64, 48), (37, 90), (8, 8)]):
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
        (folder / f"{number}.png").write_bytes(encoded_image(image))
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def checkpoint(tiny_clip: tuple[Path, Path], tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "zutis", tiny_clip)


def write_onnx(checkpoint: Path, path: Path, **options: Any) -> Path:
    settings = PredictionSettings(suppression="none", threshold=0.45)
    export_onnx(checkpoint, path, settings=settings, cache_dir=path.parent, **options)
    return path


def test_predict_writes_the_same_where_torch_is_not(
    checkpoint: Path, photos: Path, runtime: Runtime, tmp_path: Path
) -> None:
    path = write_onnx(checkpoint, tmp_path / "z.onnx")
    options = ["--onnx", path, "--out", tmp_path / "ours", "--confidence", "dog"]
    done = run_without_torch("predict", photos, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    predict.run(
        inputs=[photos],
        categories=None,
        checkpoint_dir=checkpoint,
        out_dir=tmp_path / "theirs",
        params=EvaluateParams(suppression="none", threshold=0.45),
        runtime=runtime,
        confidence=["dog"],
    )
    for kind, slack in (("labels", 0), ("confidence/dog", 1)):
        for name in ("0.png", "1.png", "2.png"):
            ours, theirs = (
                np.array(Image.open(tmp_path / side / kind / name)).astype(int)
                for side in ("ours", "theirs")
            )
            assert ours.shape == theirs.shape
            assert (np.abs(ours - theirs) <= slack).mean() >= 0.999
    ours, theirs = (read_json(tmp_path / side / "predictions.json") for side in ("ours", "theirs"))
    assert ours["images"] == theirs["images"]
    assert ours["categories"] == theirs["categories"]
    assert ours["skipped"] == theirs["skipped"] != []
    assert len(ours["annotations"]) == len(theirs["annotations"]) > 5
    for mine, its in zip(ours["annotations"], theirs["annotations"], strict=True):
        assert (mine["image_id"], mine["category_id"]) == (its["image_id"], its["category_id"])
        assert mine["area"] == pytest.approx(its["area"], rel=0.01)
        assert mine["score"] == pytest.approx(its["score"], abs=1e-4)


def test_some_of_the_names(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    path = write_onnx(checkpoint, tmp_path / "z.onnx")
    options = ["--onnx", path, "--out", tmp_path / "out", "--categories", "bird"]
    done = run_without_torch("predict", photos, *options, "--context", "cat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    categories = read_json(tmp_path / "out" / "predictions.json")["categories"]
    assert [entry["name"] for entry in categories] == ["bird", "cat"]
    options[-1] = "zebra"
    done = run_without_torch("predict", photos, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --onnx ")
    assert "'zebra' is not among its names: cat, dog, bird" in done.stderr


def test_export_refuses_what_is_there_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no params.yaml, no checkpoint
    (tmp_path / "z.onnx").write_bytes(b"kept")
    with pytest.raises(SystemExit, match=r"--out z.onnx: is there already; .*--force"):
        run_here(monkeypatch, "export", "--to", "onnx", "--out", "z.onnx")
    assert (tmp_path / "z.onnx").read_bytes() == b"kept"
    with pytest.raises(SystemExit, match="--size: '96'; expected HEIGHTxWIDTH"):
        run_here(monkeypatch, "export", "--to", "onnx", "--out", "y.onnx", "--size", "96")


def test_export_says_how_it_compares(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, "init", "--preset", "demo")
    (tmp_path / "z.onnx").write_bytes(b"earlier")
    words = ["export", "--to", "onnx", "--checkpoint", checkpoint, "--out", "z.onnx", "--force"]
    run_here(monkeypatch, *words)
    assert "100.00 % of labels equal" in capsys.readouterr().out
    assert (tmp_path / "z.onnx").stat().st_size > 1000


def test_the_image_without_torch_has_the_packages_that_the_docs_list() -> None:
    lists = []
    for page in (ROOT / "docs/deploy.md", ROOT / "Dockerfile"):
        text = page.read_text(encoding="utf-8")
        listed = re.search(r"\bonnxruntime numpy .*?python-multipart", text, re.DOTALL)
        assert listed, page
        words = re.sub(r"pip install|\\", "", listed[0]).split()
        lists.append(words)
    assert lists[0] == lists[1]


def test_a_checkpoint_beside_the_file_is_refused(
    checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="--onnx: the file is the network; leave --checkpoint out"):
        run_here(
            monkeypatch,
            *("predict", photos, "--out", tmp_path / "out"),
            *("--onnx", "z.onnx", "--checkpoint", checkpoint),
        )
