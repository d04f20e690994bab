"""DenseCLIP+ from the command line: trained, scored, gathered, and on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.benchmarks.voc import VocWriter
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.formats.corrections import Correction, write_corrections
from pipeline.formats.review import Decision, Reviewed, write_review
from pipeline.formats.shards import open_samples
from tests.conftest import encoded_image, noise_image
from tests.report.helpers import checked, section, text_of
from tests.stages.tiny_training import write_labels

CATEGORIES = ["cat", "dog"]
VOC = {"format": "voc", "root": "voc", "categories": CATEGORIES}


@pytest.fixture
def project(tmp_path: Path, tiny_clip: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with images and two DenseCLIP+ to train: one on photos, one on true masks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    writer = VocWriter(Path("voc"))
    for number in range(4):
        labels = np.zeros((30, 40), dtype=np.uint8)
        labels[:20, :20], labels[20:] = 1, 2
        writer.add(
            f"im{number}", encoded_image(noise_image(number, 40, 30), "JPEG"), labels, labels
        )
    writer.write_split("val", [f"im{number}" for number in range(4)])
    train: dict[str, Any] = {
        "student": "denseclip_plus",
        "encoder": dict(zip(("model", "pretrained"), map(str, tiny_clip), strict=True)),
        "templates": "name",
        "labels": "voc",
        "data": {"format": "folder", "root": "voc/JPEGImages"},
        "backbone": "timm:resnet10t",
        "backbone_weights": None,
        "head": "lraspp",
        "iterations": 2,
        "batch_size": 2,
        "crop_size": 32,
        "base_size": None,
        "workers": 0,
        "log_every": 1,
    }
    bench = {**VOC, "background": False, "metrics": ["semantic"]}
    free = train | {"labels": "voc/JPEGImages"}
    zero = train | {"data": {**VOC, "split": "val"}, "setting": "zero_shot", "unseen": ["dog"]}
    zero |= {"guided_iterations": 1, "self_training": "on"}
    params = {
        "device": "cpu",
        "categories": CATEGORIES,
        "index": {"a": {"root": "a"}},
        "evaluate": {"overlays": 2},
        "plus": {
            "free": {"train": free, "bench": bench},
            "zero": {"train": zero, "bench": {**bench, "unseen": ["dog"]}},
        },
    }
    Path("params.yaml").write_text(json.dumps(params))


def run(*words: str) -> str:
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def files_of(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.usefixtures("project")
def test_an_entry_is_scored_gathered_timed_and_reported() -> None:
    with pytest.raises(PipelineError, match="run `pipeline plus --name free` first"):
        run("compare")
    run("plus", "--name", "free")
    left = files_of("reports/plus/free") | files_of("reports/stats")
    run("plus", "--name", "zero")
    run("compare")
    scores = json.loads(Path("reports/metrics/plus.json").read_text())
    assert {*scores["free"]} == {"teacher_miou", "guided_miou", "teacher", "guided"}
    assert {"miou_seen", "miou_unseen", "hiou"} <= scores["zero"]["self_trained"].keys()

    # The same again leaves the same bytes: what took how long lies elsewhere.
    run("plus", "--name", "free")
    assert {path: path.read_bytes() for path in left} == left
    assert not list(Path("reports/plus").rglob("times"))
    times = run("times")
    for name in ("plus-free/train", "plus-free/score-teacher", "plus-zero/score-self_trained"):
        assert re.search(rf"^{name} +[\d.]+ s$", times, re.MULTILINE)

    printed = run("metrics")
    assert "reports/metrics/plus.json\n" in printed
    assert "zero.self_trained.hiou" in printed

    run("report")
    page = Path("reports/index.html").read_text()
    checked(page)
    shown = text_of(section(page, "plus"))
    assert "annotation free on JPEGImages; network timm:resnet10t, lraspp" in shown
    assert "zero shot on voc, val;" in shown
    for row, title in (("teacher", "Teacher, DenseCLIP alone"), ("self_trained", "Self-trained")):
        assert f"{title} {scores['zero'][row]['miou']:.1f} " in shown
    for curve in ("agreement", "entropy", "share dog"):
        assert f"<h3>{curve}</h3>" in section(page, "plus")
    assert "Benchmarks: not run" in section(page, "scores")
    Path("params.yaml").unlink()
    run("report")
    assert "Benchmarks: not run" in section(Path("reports/index.html").read_text(), "scores")


@pytest.mark.usefixtures("project")
def test_a_dry_run_says_what_would_be_trained_and_scored() -> None:
    before = files_of(".")
    text = run("plus", "--name", "zero", "--dry-run")
    assert "items    2 iterations of 2 images" in text
    for title in ("teacher", "guided", "self_trained"):
        assert f"then `predict_bench` and `score`: {title}\n  items    4 images\n" in text
    assert files_of(".") == before


@pytest.mark.usefixtures("project")
def test_an_entry_on_archives_follows_what_a_person_has_decided() -> None:
    params = json.loads(Path("params.yaml").read_text())
    entry = params["plus"]["free"]
    entry["train"] |= {"data": "archives", "labels": "data/masks"}
    Path("params.yaml").write_text(json.dumps(params))
    with pytest.raises(PipelineError, match="run `pipeline mask` first"):
        run("plus", "--name", "free", "--dry-run")
    write_labels(Path("data/masks"))
    keys = open_samples(Path("data/masks")).keys
    write_review(
        Path("data/review/labels.csv"),
        {Reviewed("cat", keys[it].rpartition("_")[0]): Decision("reject") for it in (0, 1)},
    )
    corrected = Correction(f"{1:064d}", "x", (40, 36))
    write_corrections(Path("data/review/corrections"), [corrected])
    run("plus", "--name", "free")
    counts = json.loads(Path("reports/stats/plus-free/train.json").read_text())["counts"]
    assert (counts["images"], counts["rejected"], counts["corrected"]) == (8, 2, 1)


@pytest.mark.usefixtures("project")
def test_no_benchmark_takes_the_name_of_its_metrics_file() -> None:
    params = json.loads(Path("params.yaml").read_text()) | {"benches": {"plus": VOC}}
    Path("params.yaml").write_text(json.dumps(params))
    with pytest.raises(PipelineError, match=r"params\.yaml.*benches.*plus.*another name"):
        run("metrics")
