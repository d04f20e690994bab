"""Evaluation of a checkpoint on a benchmark whose true scores are known by construction."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded_image, noise_image
from PIL import Image
from tiny_checkpoint import CATEGORIES, write_checkpoint

from pipeline.data.benchmarks.voc import VocWriter
from pipeline.data.labels import IGNORE_INDEX
from pipeline.errors import PipelineError
from pipeline.metrics.semantic import ConfusionMatrix
from pipeline.models.clip import load_clip
from pipeline.params import BenchParams, EncoderParams, EvaluateParams, PseudoLabelParams
from pipeline.predictor import Prediction, Segmenter
from pipeline.runtime import Runtime
from pipeline.stages import evaluate
from pipeline.stages.pseudo_label import build_denseclip

SIZES = ((40, 56), (64, 33), (48, 48))
SCORES = ("ap", "ap50", "ap75", "ap_agnostic", "ap50_agnostic", "ap75_agnostic")


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "zutis", tiny_clip)


@dataclass
class Bench:
    """A benchmark below `root` of images whose predictions are known."""

    root: Path
    checkpoint_dir: Path
    baseline: PseudoLabelParams
    runtime: Runtime
    predictions: dict[str, Prediction]
    jpegs: dict[str, bytes]

    def write(self, truth: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        writer = VocWriter(self.root)
        for image_id, (semantic, objects) in truth.items():
            writer.add(image_id, self.jpegs[image_id], semantic, objects)
        writer.write_split("val", truth)

    def evaluate(self, out_dir: Path, *, open_vocabulary: bool = False, **changes: object) -> dict:
        sections = {"params": EvaluateParams(overlays=2, batch_size=2)}
        sections["params"] = changes.pop("params", sections["params"])
        bench = BenchParams(**({"root": self.root, "categories": CATEGORIES} | changes))
        evaluate.run(
            bench_name="tiny",
            bench=bench,
            checkpoint_dir=self.checkpoint_dir,
            out_dir=out_dir,
            baseline=self.baseline,
            background=["background"],
            runtime=self.runtime,
            stats_path=out_dir / "stats.json",
            open_vocabulary=open_vocabulary,
            **sections,
        )
        return json.loads((out_dir / "metrics/tiny.json").read_text())


@pytest.fixture
def bench(
    tmp_path: Path, checkpoint_dir: Path, tiny_clip: tuple[Path, Path], runtime: Runtime
) -> Bench:
    model_path, weights_path = map(str, tiny_clip)
    encoder = EncoderParams(model=model_path, pretrained=weights_path)
    segmenter = Segmenter.load(
        checkpoint_dir, runtime=runtime, settings=evaluate.prediction_settings(EvaluateParams())
    )
    jpegs, predictions = {}, {}
    for number, (width, height) in enumerate(SIZES):
        jpegs[f"im{number}"] = encoded_image(noise_image(number, width, height), "JPEG")
        (tmp_path / "image.jpg").write_bytes(jpegs[f"im{number}"])
        predictions[f"im{number}"] = segmenter(tmp_path / "image.jpg")
    return Bench(
        root=tmp_path / "voc",
        checkpoint_dir=checkpoint_dir,
        baseline=PseudoLabelParams(encoder=encoder, templates="name"),
        runtime=runtime,
        predictions=predictions,
        jpegs=jpegs,
    )


def empty(prediction: Prediction) -> np.ndarray:
    return np.zeros_like(prediction.semantic)


def from_predictions(bench: Bench) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Truth equal to the label maps; every label a single object."""
    return {name: (p.semantic, p.semantic) for name, p in bench.predictions.items()}


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_truth_like_the_prediction_scores_100(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    metrics = bench.evaluate(tmp_path / "out")
    assert (metrics["miou"], metrics["pixel_acc"], metrics["n_images"]) == (100, 100, 3)
    assert metrics["baseline_miou"] < 90
    rows = read_csv(tmp_path / "out/plots/tiny_per_class.csv")
    assert rows[0] == ["category", "iou", "baseline_iou"]
    assert [row[0] for row in rows[1:]] == ["background", *CATEGORIES]
    assert {row[1] for row in rows[1:]} <= {"100.0", ""}


def test_swapped_labels_and_void_give_the_score_by_hand(bench: Bench, tmp_path: Path) -> None:
    truth, counts = {}, ConfusionMatrix(4)
    for name, prediction in bench.predictions.items():
        semantic = np.array([0, 2, 1, 3])[prediction.semantic]
        semantic[:, :9] = IGNORE_INDEX
        truth[name] = (semantic, np.where(semantic > 0, semantic, 0))
        counts.update(target=semantic[:, 9:], prediction=prediction.semantic[:, 9:])
    bench.write(truth)
    metrics = bench.evaluate(tmp_path / "out")
    scores = counts.compute()
    assert 0 < scores.miou < 1
    assert metrics["miou"] == pytest.approx(100 * scores.miou, abs=0.0051)
    assert metrics["pixel_acc"] == pytest.approx(100 * scores.pixel_acc, abs=0.0051)
    assert metrics["mean_acc"] == pytest.approx(100 * scores.mean_acc, abs=0.0051)


def test_the_best_object_as_truth_scores_ap_100(bench: Bench, tmp_path: Path) -> None:
    name, prediction = next((n, p) for n, p in bench.predictions.items() if p.instances)
    best = prediction.instances[0]
    semantic = np.where(best.mask, best.label_id, 0)
    bench.write({name: (semantic, best.mask.astype(int))})
    metrics = bench.evaluate(tmp_path / "out")
    assert [metrics[score] for score in SCORES] == [100] * 6
    assert metrics["miou"] < 100

    other = 1 + best.label_id % 3
    bench.write({name: (np.where(best.mask, other, 0), best.mask.astype(int))})
    metrics = bench.evaluate(tmp_path / "out")
    assert metrics["ap_agnostic"] == 100
    assert metrics["ap"] < 100


def test_the_baseline_is_denseclip_alone(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    encoder = load_clip(
        bench.baseline.encoder.model, bench.baseline.encoder.pretrained, torch.device("cpu")
    )
    model = build_denseclip(
        encoder, categories=CATEGORIES, background=["background"], params=bench.baseline
    )
    counts = ConfusionMatrix(4)
    for name, prediction in bench.predictions.items():
        with Image.open(bench.root / f"JPEGImages/{name}.jpg") as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        labels, _ = model.label(pixels)
        counts.update(target=prediction.semantic, prediction=labels[0].numpy())
    metrics = bench.evaluate(tmp_path / "out")
    assert metrics["baseline_miou"] == pytest.approx(100 * counts.compute().miou, abs=0.1)


def test_groups_are_scored_apart(bench: Bench, tmp_path: Path) -> None:
    truth = from_predictions(bench)
    truth["im1"] = (empty(bench.predictions["im1"]),) * 2
    bench.write(truth)
    writer = VocWriter(bench.root)
    writer.write_split("first", ["im0", "im2"])
    writer.write_split("second", ["im1"])
    metrics = bench.evaluate(tmp_path / "out", groups={"known": "first", "unseen": "second"})
    known, unseen = metrics["groups"]["known"], metrics["groups"]["unseen"]
    assert (known["miou"], known["n_images"]) == (100, 2)
    assert unseen["n_images"] == 1
    assert unseen["miou"] < 100
    assert unseen["ap"] is None
    assert unseen["miou"] < metrics["miou"] < known["miou"]
    assert known.keys() == unseen.keys() == {"miou", "ap", "ap50", "baseline_miou", "n_images"}


def test_overlays_are_spread_and_ranked(bench: Bench, tmp_path: Path) -> None:
    truth = from_predictions(bench)
    wrong = np.array([0, 2, 3, 1])[truth["im1"][0]]
    truth["im1"] = (wrong, wrong)
    bench.write(truth)
    bench.evaluate(tmp_path / "out")
    folder = tmp_path / "out/overlays/tiny"
    index = json.loads((folder / "index.json").read_text())
    kinds = {kind: [e for e in index if e["kind"] == kind] for kind in ("spread", "best", "worst")}
    assert [entry["image_id"] for entry in kinds["spread"]] == ["im0", "im2"]
    assert [entry["miou"] for entry in kinds["best"]] == [100]
    assert [entry["image_id"] for entry in kinds["worst"]] == ["im1"]
    assert kinds["worst"][0]["miou"] < 100
    assert {entry["file"] for entry in index} == {f.name for f in folder.glob("*.png")}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 2 * 288


def test_the_protocol_says_what_was_done(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    params = EvaluateParams(overlays=0, resize_to=32, suppression="linear", temperature=5.0)
    protocol = bench.evaluate(tmp_path / "out", params=params)["protocol"]
    assert {
        "encoder: tiny.json/tiny.safetensors",
        "step: 7",
        "split: val",
        "resize_to: 32",
        "max_side: none",
        "suppression: linear",
        "temperature: 5.0",
    } <= set(protocol)
    assert json.loads((tmp_path / "out/overlays/tiny/index.json").read_text()) == []


def test_two_runs_write_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    files = []
    for name in ("first", "second"):
        bench.evaluate(tmp_path / name)
        paths = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        files.append(
            {
                path.relative_to(tmp_path / name): path.read_bytes()
                for path in paths
                if path.name != "stats.json"
            }
        )
    assert files[0] == files[1]
    assert {path.suffix for path in files[0]} == {".json", ".csv", ".png"}


def test_unreadable_images_are_skipped_and_counted(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    path = bench.root / "JPEGImages/im0.jpg"
    path.write_bytes(path.read_bytes()[:400])
    metrics = bench.evaluate(tmp_path / "out")
    assert (metrics["n_images"], metrics["miou"]) == (2, 100)
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    assert (stats["items"], stats["skipped"]) == (2, 1)
    assert stats["skipped_items"][0]["item"].endswith("im0.jpg")


def test_void_everywhere_has_no_score(bench: Bench, tmp_path: Path) -> None:
    void = np.full_like(bench.predictions["im0"].semantic, IGNORE_INDEX)
    bench.write({"im0": (void, void)})
    metrics = bench.evaluate(tmp_path / "out")
    assert metrics["n_images"] == 1
    assert [metrics[score] for score in ("miou", "pixel_acc", "baseline_miou", *SCORES)] == [
        None
    ] * 9
    assert "NaN" not in (tmp_path / "out/metrics/tiny.json").read_text()


def test_other_categories_are_refused_unless_asked_for(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    names = ["cat", "zebra", "bird"]
    with pytest.raises(PipelineError) as caught:
        bench.evaluate(tmp_path / "out", categories=names)
    assert "benches.tiny.categories" in str(caught.value)
    assert "only in the benchmark: zebra; only in the checkpoint: dog" in str(caught.value)
    assert not (tmp_path / "out").exists()
    metrics = bench.evaluate(tmp_path / "out", categories=names, open_vocabulary=True)
    assert "open_vocabulary: True" in metrics["protocol"]


def test_another_order_of_the_categories_is_followed(bench: Bench, tmp_path: Path) -> None:
    order = ["bird", "cat", "dog"]
    relabel = np.array([0, *(order.index(name) + 1 for name in CATEGORIES)])
    bench.write({name: (relabel[p.semantic],) * 2 for name, p in bench.predictions.items()})
    assert bench.evaluate(tmp_path / "out", categories=order)["miou"] == 100


def test_bad_benchmarks_write_nothing(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no such folder"):
        bench.evaluate(tmp_path / "out")
    truth = from_predictions(bench)
    bench.write({"im0": tuple(m[:-1] for m in truth["im0"])})
    with pytest.raises(PipelineError, match=r"im0\.jpg: 40x56 pixels, but its masks have 40x55"):
        bench.evaluate(tmp_path / "out")
    bench.write({"im0": truth["im0"]})
    (bench.root / "JPEGImages/im0.jpg").write_bytes(b"")
    with pytest.raises(PipelineError, match="none of its 1 images can be read"):
        bench.evaluate(tmp_path / "out")
    assert not (tmp_path / "out").exists()
