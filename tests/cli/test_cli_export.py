"""`pipeline export`: one source, one format, and nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from tests.conftest import encoded_image, noise_image
from tests.exporters.predicted import Photo, write_predictions


@pytest.fixture
def predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Predictions of one image, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(encoded_image(noise_image(0), "JPEG"))
    photo = Photo(Path("photo.jpg"), (16, 24), [(np.eye(16, 24, dtype=bool), 1, 0.7)])
    return write_predictions(Path("predictions"), [photo])


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["export", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: str) -> str:
    with pytest.raises(PipelineError) as error:
        CliRunner().invoke(app, ["export", *words], catch_exceptions=False)
    return str(error.value)


def test_a_folder_is_written_and_says_how_it_is_opened(predictions: Path) -> None:
    output = run(str(predictions), "--to", "coco", "--out", "out")
    assert "export: 1 images, 0 skipped, 1 objects: out" in output
    assert "opened by python -c" in output
    assert json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))["format"] == "coco"


def test_an_export_is_replaced_by_force_alone(predictions: Path) -> None:
    run(str(predictions), "--to", "coco", "--out", "out")
    before = sorted(Path("out").rglob("*"))
    message = refused(str(predictions), "--to", "yolo-seg", "--out", "out")
    assert message.endswith("replace it with --force, or choose another folder")
    assert sorted(Path("out").rglob("*")) == before
    run(str(predictions), "--to", "yolo-seg", "--out", "out", "--force")
    assert not Path("out/annotations").exists()
    assert Path("out/data.yaml").is_file()


@pytest.mark.parametrize("manifest", [None, "{}", '{"tool": "another"}', "["])
def test_what_is_no_export_is_not_replaced_at_all(predictions: Path, manifest: str | None) -> None:
    Path("out").mkdir()
    Path("out/holiday.jpg").write_bytes(b"mine")
    if manifest is not None:
        Path("out/manifest.json").write_text(manifest, encoding="utf-8")
    for options in ([], ["--force"]):
        message = refused(str(predictions), "--to", "coco", "--out", "out", *options)
        assert "holds what `pipeline export` has not written" in message
    assert Path("out/holiday.jpg").read_bytes() == b"mine"


def test_an_empty_folder_is_filled(predictions: Path) -> None:
    Path("out").mkdir()
    run(str(predictions), "--to", "voc", "--out", "out")
    assert Path("out/JPEGImages/photo.jpg").is_file()


def test_an_occupied_folder_is_found_out_before_anything_is_read(predictions: Path) -> None:
    run(str(predictions), "--to", "coco", "--out", "out")
    Path("predictions/predictions.json").unlink()
    assert "--force" in refused(str(predictions), "--to", "coco", "--out", "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "coco", "--out", "o"], "name one source"),
        (["predictions", "--archives", "--to", "coco", "--out", "o"], "name one source"),
        (["--bench", "voc", "--archives", "--to", "coco", "--out", "o"], "name one source"),
        (["predictions", "--to", "coco"], "--out: missing"),
        (["predictions", "--to", "cocoa", "--out", "o"], "did you mean coco"),
        (["predictions", "--labels", "x", "--to", "coco", "--out", "o"], "with --archives only"),
        (["predictions", "--root", "x", "--to", "coco", "--out", "o"], "with --bench only"),
        (["nowhere", "--to", "coco", "--out", "o"], r"nowhere/predictions.json: no such file"),
    ],
)
@pytest.mark.usefixtures("predictions")
def test_a_wrong_call_is_explained(words: list[str], message: str) -> None:
    assert message in refused(*words)
    assert not Path("o").exists()


def test_formats_are_listed() -> None:
    output = run("--to", "list")
    assert "coco" in output
    assert "16-bit" in output


def test_min_score_and_split_are_passed_on(predictions: Path) -> None:
    options = ["--min-score", "0.8", "--split", "1"]
    output = run(str(predictions), "--to", "yolo-seg", "--out", "out", *options)
    assert "1 below min score" in output
    assert Path("out/labels/val/photo.txt").read_text(encoding="utf-8") == ""
