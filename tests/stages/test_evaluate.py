"""Evaluation of a checkpoint on a benchmark whose true scores are known by construction."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from pipeline.benchmarks.corruptions import corrupt
from pipeline.benchmarks.voc import VocWriter
from pipeline.cli.benches import shipped_bench
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.images import decode_label, load_image
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.predictions import PredictionStore
from pipeline.formats.rle import coco_annotation, decode_mask, encode_mask
from pipeline.inference.inputs import to_tensor
from pipeline.inference.segmenter import Prediction, Segmenter
from pipeline.methods.dense import (
    DenseClipParams,
    PseudoLabelParams,
    WindowParams,
    load_dense_labeller,
)
from pipeline.models.layers.regions import majority_of_regions
from pipeline.params.base import CropNamesParams, EncoderParams, PamrParams, PredictionSettings
from pipeline.params.benches import CocoBench, CubBench, VocBench
from pipeline.params.sections import EvaluateParams
from pipeline.scoring.confusion import ConfusionMatrix
from pipeline.stages import score
from pipeline.vocabulary.categories import Names
from tests.benchmarks.fixtures import (
    COCA_CATEGORIES,
    CONTEXT_CATEGORIES,
    CUB_CATEGORIES,
    IMAGENET_S_CATEGORIES,
    VOC_CATEGORIES,
    Maps,
    write_coca,
    write_context,
    write_cub,
    write_imagenet_s,
    write_voc,
)
from tests.conftest import encoded_image, noise_image
from tests.formats.shard_folders import read_shards
from tests.stages.evaluating import evaluate
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint

SIZES = ((40, 56), (64, 33), (48, 48))
PARAMS = EvaluateParams(overlays=2, batch_size=2)
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

    def evaluate(
        self,
        out_dir: Path,
        *,
        params: EvaluateParams = PARAMS,
        open_vocabulary: bool = False,
        denseclip: bool = False,
        runtime: Runtime | None = None,
        background_names: Sequence[str] = ("background",),
        **changes: object,
    ) -> dict:
        """Metrics of this benchmark with some fields changed."""
        fields = {"format": "voc", "root": self.root, "split": "val", "categories": CATEGORIES}
        entry = changes.pop("entry", None) or VocBench(**(fields | changes))
        evaluate(
            bench_name="tiny",
            bench=entry,
            checkpoint_dir=None if denseclip else self.checkpoint_dir,
            out_dir=out_dir,
            predictions_dir=predictions_of(out_dir),
            params=params,
            baseline=self.baseline,
            background=background_names,
            runtime=runtime or self.runtime,
            stats_path=out_dir / "stats.json",
            open_vocabulary=open_vocabulary,
        )
        return json.loads((out_dir / "metrics/tiny.json").read_text())


def predictions_of(out_dir: Path) -> Path:
    return out_dir.with_name(f"{out_dir.name}-predictions")


@pytest.fixture
def bench(
    tmp_path: Path, checkpoint_dir: Path, tiny_clip: tuple[Path, Path], runtime: Runtime
) -> Bench:
    model_path, weights_path = map(str, tiny_clip)
    encoder = EncoderParams(model=model_path, pretrained=weights_path)
    segmenter = Segmenter.load(checkpoint_dir, runtime=runtime, settings=PredictionSettings())
    jpegs, predictions = {}, {}
    for number, (width, height) in enumerate(SIZES):
        jpegs[f"im{number}"] = encoded_image(noise_image(number, width, height), "JPEG")
        (tmp_path / "image.jpg").write_bytes(jpegs[f"im{number}"])
        predictions[f"im{number}"] = segmenter(tmp_path / "image.jpg")
    return Bench(
        root=tmp_path / "voc",
        checkpoint_dir=checkpoint_dir,
        baseline=DenseClipParams(encoder=encoder, templates="name"),
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
    assert rows[0] == ["category", "iou", "baseline_iou", "ap"]
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


def test_categories_that_are_not_scored_are_background(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    kept = [CATEGORIES[2], CATEGORIES[0]]
    metrics = bench.evaluate(tmp_path / "some", scored=kept)
    assert "other_categories: background" in metrics["protocol"]
    assert "num_categories: 2" in metrics["protocol"]
    store = PredictionStore(predictions_of(tmp_path / "some"))
    counts = ConfusionMatrix(3)
    for number, (name, prediction) in enumerate(bench.predictions.items()):
        truth = np.array([0, 2, 0, 1])[prediction.semantic]
        counts.update(target=truth, prediction=store.get(number, name).labels)
    assert metrics["miou"] == pytest.approx(100 * counts.compute().miou, abs=0.0051)
    rows = read_csv(tmp_path / "some/plots/tiny_per_class.csv")
    assert [row[0] for row in rows[1:]] == ["background", *kept]
    whole = bench.evaluate(tmp_path / "all")
    assert "other_categories: background" not in whole["protocol"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scored": [CATEGORIES[0], CATEGORIES[1] + "s"]},
            rf"benches.tiny.scored: {CATEGORIES[1]}s: not among .*did you mean {CATEGORIES[1]}\?",
        ),
        ({"scored": [CATEGORIES[0]] * 2}, "benches.tiny.scored: .* is listed twice"),
        (
            {"scored": [CATEGORIES[0]], "unseen": [CATEGORIES[1]]},
            f"benches.tiny.unseen: {CATEGORIES[1]}: not among .*They are: {CATEGORIES[0]}",
        ),
    ],
)
def test_a_scored_name_that_is_none_is_named(
    bench: Bench, tmp_path: Path, changes: dict[str, list[str]], message: str
) -> None:
    bench.write(from_predictions(bench))
    with pytest.raises(PipelineError, match=message):
        bench.evaluate(tmp_path / "out", **changes)


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
    model = load_dense_labeller(bench.baseline, Names(CATEGORIES), bench.runtime)
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


@pytest.mark.parametrize(("denseclip", "prefix"), [(False, "baseline_"), (True, "")])
def test_the_protocol_names_the_options_that_are_on(
    bench: Bench, tmp_path: Path, denseclip: bool, prefix: str
) -> None:
    bench.write(from_predictions(bench))
    before = bench.evaluate(tmp_path / "before", denseclip=denseclip)["protocol"]
    bench.baseline = bench.baseline.model_copy(
        update={
            "windows": WindowParams(side=16, stride=8),
            "pamr": PamrParams(dilations=[1, 2], steps=3),
            "synonyms": {"cat": ["kitten", "tom cat"], "nothing": ["nobody"]},
            "background_threshold": 0.25,
        }
    )
    after = bench.evaluate(tmp_path / "after", denseclip=denseclip)["protocol"]
    options = [
        "windows: side 16, stride 8",
        "pamr: dilations 1/2, steps 3",
        "synonyms: cat kitten/tom cat, nothing nobody",
        "background_threshold: 0.25",
        "sliding_window: True",
        "refinement: pamr",
    ]
    assert {f"{prefix}{line}" for line in options} == set(after) - set(before)
    network = [] if denseclip else ["sliding_window: False", "refinement: none"]
    assert {line for line in after if line.startswith(("sliding_window", "refinement"))} == (
        {*network} if network else {*options[-2:]}
    )


def test_the_protocol_names_what_refines_the_network_and_not_the_labeller_beside_it(
    bench: Bench, tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    sharp = write_checkpoint(tmp_path / "sharp", tiny_clip, logit_scale=20.0)
    bench = replace(bench, checkpoint_dir=sharp)
    bench.write(from_predictions(bench))
    before = bench.evaluate(tmp_path / "before")
    params = EvaluateParams(
        overlays=1,
        flip=True,
        joint_foreground=True,
        pamr=PamrParams(dilations=[1, 2], steps=3),
        crop_names=CropNamesParams(weight=0.25),
    )
    after = bench.evaluate(tmp_path / "after", params=params)
    assert set(after["protocol"]) ^ set(before["protocol"]) == {
        "refinement: none",
        "flip: True",
        "joint_foreground: True",
        "refinement: pamr",
        "pamr: dilations 1/2, steps 3",
        "crop_names: weight 0.25, margin 0.0",
    }
    assert after["baseline_miou"] == before["baseline_miou"]
    assert after["miou"] != before["miou"]


@pytest.mark.parametrize(("denseclip", "prefix"), [(False, "baseline_"), (True, "")])
def test_the_protocol_has_every_setting_of_denseclip_and_of_the_network(
    bench: Bench, tmp_path: Path, denseclip: bool, prefix: str
) -> None:
    bench.write(from_predictions(bench))
    bench.baseline = bench.baseline.model_copy(
        update={
            "normalisation": "clip",
            "published_activation": False,
            "position_resize": "grid",
            "key_smoothing": 0.9,
            "key_affinity": "cosine",
        }
    )
    protocol = bench.evaluate(tmp_path / "out", denseclip=denseclip)["protocol"]
    denseclip_lines = [
        "encoder: tiny.json/tiny.safetensors",
        "background: background",
        "templates: name",
        "prompt_denoising: none",
        "key_smoothing: 0.9",
        "key_affinity: cosine",
        "dense_attention: maskclip",
        "normalisation: clip",
        "published_activation: False",
        "position_resize: grid",
        "logit_scale: 100.0",
    ]
    assert {f"{prefix}{line}" for line in denseclip_lines} <= set(protocol)
    assert not [line for line in protocol if "_size:" in line]
    assert {"asked_names: categories", "precision: float32"} <= set(protocol)
    assert ("network_num_queries: 12" in protocol) is not denseclip


@pytest.mark.parametrize("denseclip", [False, True])
def test_the_precision_is_in_the_protocol_and_in_the_cache_key(
    bench: Bench, tmp_path: Path, denseclip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(from_predictions(bench))
    for dtype, name, cached in (
        (None, "float32", 0),
        (torch.bfloat16, "bfloat16", 0),
        (None, "float32", 3),
    ):
        runtime = replace(bench.runtime, amp_dtype=dtype)
        out = tmp_path / f"{name}{cached}"
        metrics = bench.evaluate(out, denseclip=denseclip, runtime=runtime)
        assert f"precision: {name}" in metrics["protocol"]
        assert f"cached {cached}\n" in capsys.readouterr().out


@pytest.mark.parametrize("upsampling", ["direct", "published"])
def test_scores_of_patches_are_upsampled_once_or_as_published_twice(
    bench: Bench, tmp_path: Path, upsampling: str
) -> None:
    bench.write(from_predictions(bench))
    params = EvaluateParams(overlays=0, resize_to=100, upsampling=upsampling)
    alone = bench.evaluate(tmp_path / "alone", params=params, denseclip=True)
    beside = bench.evaluate(tmp_path / "beside", params=params)
    for metrics in (alone, beside):
        named = [line for line in metrics["protocol"] if "upsampling" in line]
        assert named == (["upsampling: published"] if upsampling == "published" else [])
    model = load_dense_labeller(bench.baseline, Names(CATEGORIES), bench.runtime)
    others = 0
    for number, name in enumerate(bench.predictions):
        with Image.open(bench.root / f"JPEGImages/{name}.jpg") as image:
            pixels = to_tensor(image, PredictionSettings(resize_to=100), patch_size=16)[None]
            scores, size = model.scores(pixels), image.size[::-1]
        once = F.interpolate(scores, size=size, mode="bilinear").argmax(dim=1)
        inside = F.interpolate(scores, size=pixels.shape[2:], mode="bilinear")
        twice = F.interpolate(inside, size=size, mode="bilinear").argmax(dim=1)
        others += int((once != twice).sum())
        expected = (once if upsampling == "direct" else twice)[0].numpy()
        found = PredictionStore(predictions_of(tmp_path / "alone")).get(number, name).labels
        np.testing.assert_array_equal(found, expected)
        found = PredictionStore(predictions_of(tmp_path / "beside")).get(number, name).baseline
        np.testing.assert_array_equal(found, expected)
    assert others > 0


def test_a_benchmark_says_how_sizes_are_rounded(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    plain = bench.evaluate(tmp_path / "down", resize_to=47)
    assert not [line for line in plain["protocol"] if line.startswith("rounding")]
    metrics = bench.evaluate(tmp_path / "half_up", resize_to=47, rounding="half_up")
    assert "rounding: half_up" in metrics["protocol"]
    for rounding in ("down", "half_up"):
        settings = PredictionSettings(resize_to=47, rounding=rounding)
        segmenter = Segmenter.load(bench.checkpoint_dir, runtime=bench.runtime, settings=settings)
        labels = stored(tmp_path / rounding)
        for name in bench.predictions:
            expected = segmenter(bench.root / f"JPEGImages/{name}.jpg").semantic
            np.testing.assert_array_equal(labels[name], expected)


def test_a_name_that_is_asked_for_is_no_background(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    config = json.loads((bench.checkpoint_dir / "config.json").read_text())
    folder = tmp_path / "checkpoint"
    shutil.copytree(bench.checkpoint_dir, folder)
    (folder / "config.json").write_text(json.dumps(config | {"background": ["sky", "bird"]}))
    bench.checkpoint_dir = folder
    # A shipped set is not checked against the background, and here holds a name of it.
    names = {"categories": "voc", "open_vocabulary": True}
    both = bench.evaluate(tmp_path / "both", background_names=["sky", "bird"], **names)
    assert {"background: sky", "baseline_background: sky"} <= set(both["protocol"])
    alone = bench.evaluate(tmp_path / "alone", background_names=["sky"], **names)
    assert both["protocol"] == alone["protocol"]
    stores = (read_shards(predictions_of(tmp_path / name)) for name in ("both", "alone"))
    for first, second in zip(*stores, strict=True):
        assert first["baseline.png"] == second["baseline.png"]


def test_two_runs_write_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    files = []
    for name in ("first", "second"):
        out_dir = tmp_path / name
        bench.evaluate(out_dir)
        files.append(
            {
                path.relative_to(folder): path.read_bytes()
                for folder in (out_dir, predictions_of(out_dir))
                for path in folder.rglob("*")
                if path.is_file() and path.name not in ("stats.json", "score.json")
            }
        )
    assert files[0] == files[1]
    assert {path.suffix for path in files[0]} == {".json", ".csv", ".png", ".tar"}


def test_unreadable_images_are_skipped_and_counted(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    path = bench.root / "JPEGImages/im0.jpg"
    path.write_bytes(path.read_bytes()[:400])
    metrics = bench.evaluate(tmp_path / "out")
    assert (metrics["n_images"], metrics["miou"]) == (2, 100)
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    assert (stats["items"], stats["skipped"]) == (2, 1)
    assert stats["skipped_items"][0]["item"].endswith("im0.jpg")


@pytest.mark.parametrize("change", [{}, {"scored": ["cat"]}])
def test_sizes_are_compared_before_a_network_is_loaded(
    bench: Bench, tmp_path: Path, change: dict
) -> None:
    bench.write(from_predictions(bench))
    (bench.root / "JPEGImages/im1.jpg").write_bytes(bench.jpegs["im2"])
    checkpoint_dir = shutil.copytree(bench.checkpoint_dir, tmp_path / "checkpoint")
    for path in checkpoint_dir.rglob("*.safetensors"):
        path.write_bytes(b"no weights")
    bench = replace(bench, checkpoint_dir=checkpoint_dir)
    with pytest.raises(PipelineError, match=r"im1\.jpg: 48x48 pixels, but its masks have 64x33"):
        bench.evaluate(tmp_path / "out", open_vocabulary=bool(change), **change)
    assert not predictions_of(tmp_path / "out").exists()


def test_a_renumbered_mask_is_said_once_and_scored_by_its_indices(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(from_predictions(bench))
    paths = sorted(bench.root.glob("SegmentationClass/*.png"))
    recolour(paths[1])
    assert bench.evaluate(tmp_path / "out")["miou"] == 100
    (warning,) = json.loads((tmp_path / "out/stats.json").read_text())["warnings"]
    assert warning.startswith("1 of 6 masks have another palette")
    assert str(paths[1]) in warning
    assert capsys.readouterr().out.count(warning) == 1
    # Whoever scores later learns of what has changed since.
    recolour(paths[0])
    score.run(
        bench_name="tiny",
        bench=VocBench(format="voc", root=bench.root, categories=CATEGORIES),
        predictions_dir=predictions_of(tmp_path / "out"),
        out_dir=tmp_path / "out",
        background=("background",),
        overlays=0,
        seed=0,
        stats_path=tmp_path / "out/score.json",
    )
    (warning,) = json.loads((tmp_path / "out/score.json").read_text())["warnings"]
    assert warning.startswith("2 of 6 masks have another palette")
    assert str(paths[0]) in warning


def recolour(path: Path) -> None:
    with Image.open(path) as image:
        indices = image.copy()
    indices.putpalette([1, 2, 3] * 256)
    indices.save(path)


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
    with pytest.raises(PipelineError, match="none of the 1 images can be read"):
        bench.evaluate(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "stats.json"]


def stored(out_dir: Path) -> dict[str, np.ndarray]:
    """Image id -> predicted label ids, as they were written."""
    store = PredictionStore(predictions_of(out_dir))
    found = (store.get(number, f"im{number}") for number in range(len(SIZES)))
    return {prediction.image_id: prediction.labels for prediction in found if prediction}


def test_predictions_are_kept_as_they_were_made(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    bench.evaluate(tmp_path / "out")
    samples = list(read_shards(predictions_of(tmp_path / "out")))
    members = {"__key__", "json", "label.png", "baseline.png"}
    members |= {"instances.json", "baseline_instances.json"}
    assert [set(sample) for sample in samples] == [members] * 3
    labels = stored(tmp_path / "out")
    for sample, (name, prediction) in zip(samples, bench.predictions.items(), strict=True):
        np.testing.assert_array_equal(labels[name], prediction.semantic)
        results = json.loads(sample["instances.json"])
        assert [result["score"] for result in results] == [i.score for i in prediction.instances]
        assert {result["image_id"] for result in results} <= {name}


def test_other_weights_of_the_same_name_predict_anew(
    bench: Bench, tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    bench.write(from_predictions(bench))
    bench.evaluate(tmp_path / "out")
    before = list(read_shards(predictions_of(tmp_path / "out")))
    weights = {
        name: value.flip(-1) for name, value in load_file(tiny_clip[1]).items() if value.ndim
    }
    other = tmp_path / "other" / tiny_clip[1].name
    other.parent.mkdir()
    save_file({**load_file(tiny_clip[1]), **weights}, other)
    encoder = EncoderParams(model=str(tiny_clip[0]), pretrained=str(other))
    checkpoint_dir = tmp_path / "checkpoint"
    shutil.copytree(bench.checkpoint_dir, checkpoint_dir)
    config = json.loads((checkpoint_dir / "config.json").read_text())
    config["encoder"] = encoder.model_dump()
    (checkpoint_dir / "config.json").write_text(json.dumps(config))
    changed = replace(
        bench,
        checkpoint_dir=checkpoint_dir,
        baseline=bench.baseline.model_copy(update={"encoder": encoder}),
    )
    changed.evaluate(tmp_path / "again")
    after = list(read_shards(predictions_of(tmp_path / "again")))
    for member in ("label.png", "baseline.png"):
        assert [sample[member] for sample in before] != [sample[member] for sample in after]


def test_denseclip_alone_scores_like_the_baseline_beside_a_network(
    bench: Bench, tmp_path: Path
) -> None:
    bench.write(from_predictions(bench))
    beside = bench.evaluate(tmp_path / "beside")
    alone = bench.evaluate(tmp_path / "alone", denseclip=True, categories=["cat", "dog", "bird"])
    assert alone["miou"] == beside["baseline_miou"]
    assert "model: denseclip" in alone["protocol"]
    assert not [name for name in alone if name.startswith("baseline")]
    for name in SCORES:
        assert alone[name] == beside[f"baseline_{name}"]
    assert alone["ap_agnostic"] > 0
    objects = bench.evaluate(tmp_path / "objects", denseclip=True, metrics=["instance"])
    assert {name: objects[name] for name in SCORES} == {name: alone[name] for name in SCORES}
    assert "miou" not in objects


@pytest.mark.parametrize("background", [True, False])
def test_the_objects_of_denseclip_are_its_classes_or_their_parts(
    bench: Bench, tmp_path: Path, background: bool
) -> None:
    bench.write(from_predictions(bench))
    found = {}
    for regions in ("classes", "components"):
        params = EvaluateParams(overlays=1, temperature=7.0, labeller_objects=regions)
        metrics = bench.evaluate(
            tmp_path / regions, denseclip=True, params=params, background=background
        )
        assert {"temperature: 7.0", f"objects: {regions}"} <= set(metrics["protocol"])
        for sample in read_shards(predictions_of(tmp_path / regions)):
            image_id, labels = json.loads(sample["json"])["image_id"], sample["label.png"]
            results = json.loads(sample["instances.json"])
            found[regions, image_id] = results
            scores = [result["score"] for result in results]
            assert scores == sorted(scores, reverse=True)
            assert all(0 < score < 1 for score in scores)
            union = sum(decode_mask(result["segmentation"]).astype(int) for result in results)
            np.testing.assert_array_equal(union, decode_label(labels) > 0)
    for image_id in bench.predictions:
        classes = [result["category_id"] for result in found["classes", image_id]]
        parts = [result["category_id"] for result in found["components", image_id]]
        assert len(classes) == len(set(classes)) == len(set(parts))
        assert len(parts) >= len(classes)
    assert sum(map(len, found.values())) > 2 * sum(
        len(results) for (regions, _), results in found.items() if regions == "classes"
    )


def test_regions_of_every_predictor_take_what_most_of_them_has(
    bench: Bench, tmp_path: Path
) -> None:
    bench.write(from_predictions(bench))
    maps, protocols = {}, {}
    for is_on in (False, True):
        out, params = tmp_path / str(is_on), EvaluateParams(overlays=1, region_majority=is_on)
        alone = bench.evaluate(out / "alone", denseclip=True, params=params)
        beside = bench.evaluate(out / "beside", params=params)
        assert alone["miou"] == beside["baseline_miou"]
        protocols[is_on] = [
            line for line in alone["protocol"] + beside["protocol"] if "region_majority" in line
        ]
        for name in ("alone", "beside"):
            for sample in read_shards(predictions_of(out / name)):
                key = name, json.loads(sample["json"])["image_id"]
                maps[is_on, *key] = decode_label(sample["label.png"])
                objects = json.loads(sample["instances.json"])
                if name == "alone":
                    for found in objects:
                        inside = decode_mask(found["segmentation"])
                        assert (maps[is_on, *key][inside] == found["category_id"]).all()
    lines = ["region_majority: True", "baseline_region_majority: True"]
    assert protocols == {False: [], True: [lines[0], *sorted(lines, reverse=True)]}
    for key in [key for is_on, *key in maps if is_on]:
        voted = majority_of_regions(maps[False, *key])
        np.testing.assert_array_equal(maps[True, *key], voted)
    assert any((maps[False, *key] != maps[True, *key]).any() for _, *key in maps)


def test_an_image_without_foreground_has_no_objects(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    # No label is that likely anywhere, and without any the background wins.
    unlikely = {"prompt_denoising": 1.0, "logit_scale": 1.0}
    bench.baseline = bench.baseline.model_copy(update=unlikely)
    metrics = bench.evaluate(tmp_path / "out", denseclip=True)
    assert metrics["ap"] == 0
    for sample in read_shards(predictions_of(tmp_path / "out")):
        assert decode_label(sample["label.png"]).max() == 0
        assert json.loads(sample["instances.json"]) == []


def test_unseen_categories_of_the_baselines_objects(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    names = [*CATEGORIES, "zebra"]
    metrics = bench.evaluate(tmp_path / "out", categories=names, unseen=["bird", "zebra"])
    assert {"baseline_ap_seen", "baseline_ap50_unseen", "baseline_ap75_unseen"} <= set(metrics)
    assert not [name for name in metrics if name.startswith("baseline_ar")]


def test_without_background_the_best_category_has_every_pixel(bench: Bench, tmp_path: Path) -> None:
    truth = {
        name: (np.ones_like(p.semantic), np.ones_like(p.semantic))
        for name, p in bench.predictions.items()
    }
    truth["im0"][0][:, :9] = 0
    bench.write(truth)
    metrics = bench.evaluate(tmp_path / "out", background=False, metrics=["semantic"])
    settings = PredictionSettings(background=False, instances=False)
    segmenter = Segmenter.load(bench.checkpoint_dir, runtime=bench.runtime, settings=settings)
    counts = ConfusionMatrix(4)
    for name, labels in stored(tmp_path / "out").items():
        np.testing.assert_array_equal(
            labels, segmenter(bench.root / f"JPEGImages/{name}.jpg").semantic
        )
        assert labels.min() >= 1
        kept = slice(9 if name == "im0" else 0, None)
        counts.update(target=truth[name][0][:, kept], prediction=labels[:, kept])
    assert metrics["miou"] == pytest.approx(100 * counts.compute().miou, abs=0.0051)
    assert "background_scored: False" in metrics["protocol"]
    rows = read_csv(tmp_path / "out/plots/tiny_per_class.csv")
    assert [row[0] for row in rows] == ["category", *CATEGORIES]
    baseline = next(read_shards(predictions_of(tmp_path / "out")))["baseline.png"]
    with Image.open(io.BytesIO(baseline)) as image:
        assert np.array(image).min() >= 1
    # What is not scored is void in the picture of errors; `false` is a square of the legend alone.
    with Image.open(tmp_path / "out/overlays/tiny/im0.png") as picture:
        pixels = np.asarray(picture, dtype=int)
    errors = pixels[len(pixels) // 2 :, : pixels.shape[1] // 2]
    reddish = errors[..., 0] - errors[..., 2] > 100
    assert reddish.sum() < 400


def test_unseen_categories_may_be_new_to_the_checkpoint(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    names = [*CATEGORIES, "zebra"]
    metrics = bench.evaluate(tmp_path / "out", categories=names, unseen=["zebra"])
    assert {"miou_seen", "miou_unseen", "hiou", "ap_seen", "ap50_unseen"} <= set(metrics)
    assert {"unseen: zebra", "open_vocabulary: True"} <= set(metrics["protocol"])
    with pytest.raises(PipelineError, match=r"only in the benchmark: zebra"):
        bench.evaluate(tmp_path / "out", categories=names, unseen=["cat"])
    with pytest.raises(PipelineError, match=r"benches\.tiny\.unseen: lion: not among"):
        bench.evaluate(tmp_path / "out", unseen=["lion"])


def test_a_part_of_the_trained_categories_can_be_scored(bench: Bench, tmp_path: Path) -> None:
    keep_cats = np.array([0, 1, 0, 0])
    bench.write({name: (keep_cats[p.semantic],) * 2 for name, p in bench.predictions.items()})
    metrics = bench.evaluate(tmp_path / "out", categories=["cat"])
    assert "open_vocabulary: False" in metrics["protocol"]
    rows = read_csv(tmp_path / "out/plots/tiny_per_class.csv")
    assert metrics["iou"] == float(rows[2][1])
    assert "baseline_iou" in metrics


def test_a_benchmarks_own_size_goes_first(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    params = EvaluateParams(overlays=0, resize_to=64, max_side=100)
    metrics = bench.evaluate(tmp_path / "out", params=params, resize_to=16)
    assert {"resize_to: 16", "max_side: 100"} <= set(metrics["protocol"])
    settings = PredictionSettings(resize_to=16, max_side=100)
    segmenter = Segmenter.load(bench.checkpoint_dir, runtime=bench.runtime, settings=settings)
    for name, labels in stored(tmp_path / "out").items():
        expected = segmenter(bench.root / f"JPEGImages/{name}.jpg").semantic
        np.testing.assert_array_equal(labels, expected)


def test_objects_alone_need_no_baseline(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    metrics = bench.evaluate(tmp_path / "out", metrics=["instance"])
    assert "ap50" in metrics
    assert not [name for name in metrics if "iou" in name]
    assert not [line for line in metrics["protocol"] if line.startswith("baseline_")]
    assert "baseline.png" not in next(read_shards(predictions_of(tmp_path / "out")))
    index = json.loads((tmp_path / "out/overlays/tiny/index.json").read_text())
    assert {entry["kind"] for entry in index} == {"spread"}
    assert read_csv(tmp_path / "out/plots/tiny_per_class.csv")[0] == ["category", "ap"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_corruption_changes_the_input_and_nothing_else(
    bench: Bench, tmp_path: Path, batch_size: int
) -> None:
    bench.write(from_predictions(bench))
    writer = VocWriter(bench.root)
    writer.write_split("reversed", ["im2", "im1", "im0"])
    metrics = bench.evaluate(
        tmp_path / "out",
        params=EvaluateParams(overlays=0, batch_size=batch_size),
        corruption={"name": "gaussian_noise", "level": 5},
    )
    assert metrics["miou"] < 100
    assert {"corruption: gaussian_noise 5", "corruption_seed: 0"} <= set(metrics["protocol"])
    segmenter = Segmenter.load(bench.checkpoint_dir, runtime=bench.runtime)
    labels = stored(tmp_path / "out")
    for name in bench.predictions:
        with Image.open(bench.root / f"JPEGImages/{name}.jpg") as image:
            seed = int(digest([0, name])[:8], 16)
            noisy = corrupt(image.convert("RGB"), name="gaussian_noise", level=5, seed=seed)
        np.testing.assert_array_equal(labels[name], segmenter(noisy).semantic)
    again = bench.evaluate(
        tmp_path / "again",
        split="reversed",
        corruption={"name": "gaussian_noise", "level": 5},
    )
    assert again["miou"] == metrics["miou"]
    other = bench.evaluate(
        tmp_path / "other",
        runtime=replace(bench.runtime, seed=1),
        corruption={"name": "gaussian_noise", "level": 5},
    )
    assert other["miou"] != metrics["miou"]


def test_a_benchmark_says_in_which_order_a_corruption_sees_the_channels(
    bench: Bench, tmp_path: Path
) -> None:
    bench.write(from_predictions(bench))
    spatter = {"name": "spatter", "level": 5}
    plain = bench.evaluate(tmp_path / "rgb", corruption=spatter)
    assert not [line for line in plain["protocol"] if line.startswith("corruption_channels")]
    metrics = bench.evaluate(tmp_path / "bgr", corruption=spatter, corruption_channels="bgr")
    assert {"corruption: spatter 5", "corruption_channels: bgr"} <= set(metrics["protocol"])
    segmenter = Segmenter.load(bench.checkpoint_dir, runtime=bench.runtime)
    labels = stored(tmp_path / "bgr")
    for name in bench.predictions:
        with Image.open(bench.root / f"JPEGImages/{name}.jpg") as image:
            swapped = Image.fromarray(np.asarray(image.convert("RGB"))[..., ::-1])
        seed = int(digest([0, name])[:8], 16)
        muddy = np.asarray(corrupt(swapped, name="spatter", level=5, seed=seed))[..., ::-1]
        expected = segmenter(np.ascontiguousarray(muddy)).semantic
        np.testing.assert_array_equal(labels[name], expected)
    # Without a corruption the order of the channels is nobody's business.
    lines = bench.evaluate(tmp_path / "none", corruption_channels="bgr")["protocol"]
    assert lines == bench.evaluate(tmp_path / "usual")["protocol"]


def test_masks_belong_to_the_pixels_as_they_are_stored(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    path = bench.root / "JPEGImages/im0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by a quarter
    content, tags = path.read_bytes(), exif.tobytes()
    marker = b"\xff\xe1" + (len(tags) + 2).to_bytes(2, "big")
    path.write_bytes(content[:2] + marker + tags + content[2:])
    assert load_image(path).size != load_image(path, upright=False).size
    assert bench.evaluate(tmp_path / "out")["miou"] == 100


def test_an_unknown_corruption_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.write(from_predictions(bench))
    with pytest.raises(PipelineError, match=r"benches\.tiny\.corruption\.name: 'fog' is not known"):
        bench.evaluate(tmp_path / "out", corruption={"name": "fog", "level": 1})


def test_every_image_is_asked_for_its_own_names(bench: Bench, tmp_path: Path) -> None:
    root = tmp_path / "cub"
    maps = write_cub(root)
    photos = sorted(root.glob("images/*/*.jpg"))
    for number, path in enumerate(photos):
        noise_image(number, 30 + number, 41).save(path)
        mask = np.full((41, 30 + number), 255, np.uint8)
        Image.fromarray(mask).save(root / f"segmentations/{path.parent.name}/{path.stem}.png")
    entry = CubBench(format="cub", root=root, names="breed")
    metrics = bench.evaluate(tmp_path / "out", entry=entry)
    assert "asked_names: of each image" in metrics["protocol"]
    store = PredictionStore(predictions_of(tmp_path / "out"))
    counts = ConfusionMatrix(2)
    breeds = ["Black footed Albatross", "Laysan Albatross", "Laysan Albatross"]
    for number, (image_id, breed) in enumerate(zip(maps, breeds, strict=True)):
        path = next(p for p in photos if p.stem == image_id.split("__")[1])
        segmenter = Segmenter.load(bench.checkpoint_dir, categories=[breed], runtime=bench.runtime)
        prediction = store.get(number, image_id)
        expected = segmenter(path).semantic
        np.testing.assert_array_equal(prediction.labels, expected)
        counts.update(target=np.ones_like(expected), prediction=expected)
    assert metrics["iou"] == pytest.approx(100 * counts.compute().iou[1], abs=0.0051)
    # The network sees a difference between the breeds, or this would prove little.
    one = Segmenter.load(bench.checkpoint_dir, categories=breeds[:2], runtime=bench.runtime)
    first, second = (one.select([name])(photos[0]).semantic for name in breeds[:2])
    assert (first != second).any()


def test_gray_and_cmyk_images_and_one_without_an_object(bench: Bench, tmp_path: Path) -> None:
    maps = write_voc(tmp_path / "photos")
    metrics = bench.evaluate(tmp_path / "out", root=tmp_path / "photos", categories=["cat", "dog"])
    assert metrics["n_images"] == 3
    store = PredictionStore(predictions_of(tmp_path / "out"))
    counts = ConfusionMatrix(3)
    for number, (image_id, target) in enumerate(maps.items()):
        counts.update(target=target, prediction=store.get(number, image_id).labels)
    assert metrics["miou"] == pytest.approx(100 * counts.compute().miou, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "write", "categories"),
    [
        ("voc20", write_voc, VOC_CATEGORIES),
        ("context60", write_context, CONTEXT_CATEGORIES),
        ("coca", write_coca, COCA_CATEGORIES),
        ("imagenet_s300", write_imagenet_s, IMAGENET_S_CATEGORIES),
        ("cub", write_cub, CUB_CATEGORIES),
    ],
)
def test_the_shipped_benchmarks_are_scored_from_their_real_formats(
    bench: Bench,
    tmp_path: Path,
    name: str,
    write: Callable[[Path], Maps],
    categories: list[str],
) -> None:
    maps = write(tmp_path / name)
    entry = shipped_bench(name)
    # Short sides of 512 pixels would take long, and these images have no more than 4.
    side = entry.resize_to and 24
    changes = {"root": tmp_path / name, "categories": categories, "resize_to": side}
    entry = entry.model_copy(update=changes)
    metrics = bench.evaluate(tmp_path / "out", entry=entry, open_vocabulary=True)
    assert metrics["n_images"] == len(maps) == 3
    store = PredictionStore(predictions_of(tmp_path / "out"))
    counts = ConfusionMatrix(len(categories) + 1)
    for number, (image_id, target) in enumerate(maps.items()):
        scored = target if entry.background else np.where(target == 0, IGNORE_INDEX, target)
        counts.update(target=scored, prediction=store.get(number, image_id).labels)
    assert metrics["miou"] == pytest.approx(100 * counts.compute().miou, abs=0.0051)
    assert ("miou_s" in metrics) == ("size" in entry.metrics)


def write_coco(root: Path, bench: Bench, segmenter: Segmenter) -> Path:
    """COCO's layout with the predicted objects as truth, moved, renamed or made crowds."""
    (root / "annotations").mkdir(parents=True)
    (root / "val").mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for number, (name, jpeg) in enumerate(bench.jpegs.items(), start=1):
        path = root / f"val/{name}.jpg"
        path.write_bytes(jpeg)
        prediction = segmenter(path)
        height, width = prediction.semantic.shape
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        annotations += [
            coco_annotation(
                encode_mask(np.roll(instance.mask, 5 * place, axis=0)),
                annotation_id=len(annotations) + place + 1,
                image_id=number,
                category_id=10 * (1 + (instance.label_id - 1 + place // 4) % 3),
                crowd=place == 3,
            )
            for place, instance in enumerate(prediction.instances[:6])
        ]
    categories = [{"id": 10 * place, "name": name} for place, name in enumerate(CATEGORIES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations/instances_val.json"
    path.write_text(json.dumps(content))
    return path


def test_annotations_without_a_pixel_are_said_in_the_summary(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmenter = Segmenter.load(
        bench.checkpoint_dir, runtime=bench.runtime, settings=PredictionSettings()
    )
    path = write_coco(tmp_path / "coco", bench, segmenter)
    content = json.loads(path.read_text())
    content["annotations"].append(
        {"id": 5000, "image_id": 1, "category_id": 10, "segmentation": []}
    )
    path.write_text(json.dumps(content))
    entry = CocoBench(
        format="coco", root=tmp_path / "coco", categories=CATEGORIES, scored=CATEGORIES[:2]
    )
    bench.evaluate(tmp_path / "out", params=EvaluateParams(overlays=0), entry=entry)
    (warning,) = json.loads((tmp_path / "out/stats.json").read_text())["warnings"]
    assert warning.startswith(f"{path}: 1 of ")
    assert warning.endswith("The first: id 5000")
    assert capsys.readouterr().out.count(warning) == 1


def test_objects_score_as_cocos_own_tool_scores_the_stored_results(
    bench: Bench, tmp_path: Path
) -> None:
    params = EvaluateParams(suppression="none", overlays=0)
    segmenter = Segmenter.load(
        bench.checkpoint_dir,
        runtime=bench.runtime,
        settings=PredictionSettings.of(params),
    )
    truth = COCO(write_coco(tmp_path / "coco", bench, segmenter))
    entry = CocoBench(
        format="coco", root=tmp_path / "coco", categories=CATEGORIES, metrics=["instance"]
    )
    metrics = bench.evaluate(tmp_path / "out", params=params, entry=entry)
    numbers = {name: number for number, name in enumerate(bench.jpegs, start=1)}
    results = [
        result
        | {"image_id": numbers[result["image_id"]], "category_id": 10 * result["category_id"]}
        for sample in read_shards(predictions_of(tmp_path / "out"))
        for result in json.loads(sample["instances.json"])
    ]
    aware = ["ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar1", "ar10", "ar100"]
    agnostic = ["ap_agnostic", "ap50_agnostic", "ap75_agnostic", "", "", "", "ar1_agnostic"]
    for with_categories, keys in ((1, aware), (0, agnostic)):
        evaluation = COCOeval(truth, truth.loadRes(deepcopy(results)), "segm")
        evaluation.params.useCats = with_categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0.05 < evaluation.stats[1] < 0.95
        for key, value in zip(keys, evaluation.stats, strict=False):
            expected = None if value < 0 else pytest.approx(100 * value, abs=0.0051)
            assert not key or metrics[key] == expected


def test_the_confusion_matrix_is_written_as_table_and_picture(bench: Bench, tmp_path: Path) -> None:
    swapped = {name: np.array([0, 2, 1, 3])[p.semantic] for name, p in bench.predictions.items()}
    bench.write({name: (labels, labels) for name, labels in swapped.items()})
    metrics = bench.evaluate(tmp_path / "out", unseen=["bird"])
    header, *rows = read_csv(tmp_path / "out/plots/tiny_confusion.csv")
    assert header == ["category", "background", *CATEGORIES]
    assert [row[0] for row in rows] == header[1:]
    found = np.array([row[1:] for row in rows], dtype=int)
    counts = ConfusionMatrix(4)
    for name, prediction in bench.predictions.items():
        counts.update(target=swapped[name], prediction=prediction.semantic)
    np.testing.assert_array_equal(found, counts.counts)
    assert metrics["pixel_acc"] == pytest.approx(100 * np.trace(found) / found.sum(), abs=0.0051)
    seen = found[:3]
    share = 100 * np.trace(seen) / seen.sum()
    assert metrics["pixel_acc_seen"] == pytest.approx(share, abs=0.0051)
    with Image.open(tmp_path / "out/plots/tiny_confusion.png") as picture:
        picture.load()
        assert min(picture.size) > 100

    bench.evaluate(tmp_path / "bare", background=False, metrics=["semantic"])
    assert read_csv(tmp_path / "bare/plots/tiny_confusion.csv")[0] == ["category", *CATEGORIES]
    objects = bench.evaluate(tmp_path / "objects", metrics=["instance"])
    assert "miou" not in objects
    rows = read_csv(tmp_path / "objects/plots/tiny_confusion.csv")[1:]
    assert {cell for row in rows for cell in row[1:]} == {"0"}
    assert (tmp_path / "objects/plots/tiny_confusion.png").is_file()


def test_categories_without_a_predicted_pixel_are_listed_and_no_metric(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(from_predictions(bench))
    names = [*CATEGORIES, *(f"thing {number}" for number in range(60))]
    metrics = bench.evaluate(tmp_path / "out", open_vocabulary=True, categories=names)
    found = {
        int(label_id)
        for sample in read_shards(predictions_of(tmp_path / "out"))
        for label_id in np.unique(decode_label(sample["label.png"]))
    }
    never = [name for label_id, name in enumerate(names, 1) if label_id not in found]
    assert never
    assert json.loads((tmp_path / "out/score.json").read_text())["never_predicted"] == never
    assert f"score: never predicted: {', '.join(never)}\n" in capsys.readouterr().out
    assert "never" not in json.dumps(metrics)
