"""Evaluation of an image, all included, over the bare forward of its network."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.benchmarks.voc import VocWriter
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Job, run_job
from pipeline.formats.images import load_image
from pipeline.formats.labels import LABEL_TYPE
from pipeline.formats.predictions import SHARD_SIZE, PredictionStore
from pipeline.inference.bench import BenchRun, NetworkPredictor, PredictionMaker, images_to_predict
from pipeline.inference.inputs import to_tensor
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import DenseClipParams
from pipeline.models.weights.checkpoint import save_checkpoint
from pipeline.models.zutis.network import Zutis, ZutisOutput
from pipeline.models.zutis.postprocess import semantic_prediction
from pipeline.models.zutis.predictor import ZutisPredictor
from pipeline.params.base import PredictionSettings
from pipeline.params.benches import VocBench
from pipeline.scoring.board import ScoreBoard
from pipeline.scoring.task import ScoringTask
from speed.harness import Bench, Curve, Pair
from speed.inputs import (
    MakeRuntime,
    cpu_runtime,
    ellipses,
    jpeg,
    photo,
    text_dim,
    unit_rows,
    zutis_network,
)

CATEGORIES = [f"category {number}" for number in range(1, 21)]
METRICS = ["semantic", "instance"]
DIFFERENT_PHOTOS = 64
PATCH = 16


@dataclass(frozen=True)
class Evaluated:
    """Predictions on disk and their scores."""

    store: PredictionStore
    scores: dict[str, Any]


def _write_voc(root: Path, size: tuple[int, int], num_images: int) -> list[str]:
    """Images with three objects each, in PASCAL VOC's layout; their ids."""
    writer = VocWriter(root)
    image_ids = [f"{number:06d}" for number in range(num_images)]
    for number, image_id in enumerate(image_ids):
        semantic, instances = np.zeros(size, LABEL_TYPE), np.zeros(size, LABEL_TYPE)
        for instance, mask in enumerate(ellipses(number, 3, size), start=1):
            semantic[mask] = 1 + (number + instance) % len(CATEGORIES)
            instances[mask] = instance
        data = jpeg(photo(number % DIFFERENT_PHOTOS, size[1], size[0]))
        writer.add(image_id, data, semantic, instances)
    writer.write_split("val", image_ids)
    return image_ids


def _open_voc(folder: Path) -> Benchmark:
    return open_bench(
        format="voc", root=folder / "voc", split="val", categories=CATEGORIES, groups={}
    )


def _segmenter(runtime: Runtime, *, quick: bool) -> tuple[Segmenter, Zutis, Tensor]:
    """A network with random weights and random texts of the categories, alone as well."""
    network = zutis_network(quick=quick).to(runtime.device).eval()
    text = unit_rows(torch.Generator().manual_seed(0), 1 + len(CATEGORIES), text_dim(quick=quick))
    text = text.to(runtime.device)
    student = ZutisPredictor(network, text, architecture={}, runtime=runtime)
    segmenter = Segmenter(student, categories=CATEGORIES, settings=PredictionSettings())
    return segmenter, network, text


def _save_network(folder: Path, network: Zutis) -> None:
    """Write the checkpoint, whose digest is part of the key of its predictions."""
    config = {
        "architecture": {},
        "encoder": {"model": "random", "pretrained": "none"},
        "categories": CATEGORIES,
        "background": ["background"],
        "templates": "name",
        "step": 0,
    }
    save_checkpoint(folder / "zutis", network, config)


def _evaluate(folder: Path, segmenter: Segmenter, benchmark: Benchmark) -> Evaluated:
    """Predict to disk with nothing in the cache, then score from there, as the stages do."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    run = BenchRun(
        bench_name="voc",
        bench=VocBench(format="voc", root=folder / "voc", categories=CATEGORIES),
        categories=CATEGORIES,
        names=CATEGORIES,
        metrics=METRICS,
        checkpoint_dir=folder / "zutis",
        settings=segmenter.settings,
        has_baseline=False,
        baseline=DenseClipParams(),
        background=["background"],
        batch_size=1,
    )
    predictor = NetworkPredictor(segmenter, baseline=None, checkpoint_dir=folder / "zutis")
    job = Job(
        "predict_bench",
        images_to_predict(benchmark),
        shard_size=SHARD_SIZE,
        load=partial(PredictionMaker, run, predictor=predictor),
    )
    run_job(
        job,
        out_dir=folder / "predictions",
        stats_path=folder / "stats.json",
        runtime=cpu_runtime(folder / "cache"),
    )
    store = PredictionStore(folder / "predictions")
    board = ScoreBoard(ScoringTask(CATEGORIES), metrics=METRICS, groups={})
    for example, prediction in store.pair(benchmark):
        board.add(example, prediction)
    return Evaluated(store, board.compute())


def prepare_evaluation(
    folder: Path, quick: bool, *, make: MakeRuntime = cpu_runtime, count: int = 2
) -> Pair:
    """Bare forward, and predictions on disk with their scores, on the device of the runtime."""
    size = (48, 64) if quick else (375, 500)
    image_ids = _write_voc(folder / "voc", size, count)
    benchmark = _open_voc(folder)
    runtime = make(folder / "cache")
    segmenter, network, text = _segmenter(runtime, quick=quick)
    _save_network(folder, network)
    paths = [folder / f"voc/JPEGImages/{image_id}.jpg" for image_id in image_ids]
    inputs = [
        to_tensor(load_image(path), segmenter.settings, patch_size=PATCH)[None].to(runtime.device)
        for path in paths
    ]

    @torch.inference_mode()
    def bare() -> list[ZutisOutput]:
        with runtime.autocast():
            return [network(image) for image in inputs]

    def ours() -> Evaluated:
        return _evaluate(folder, segmenter, benchmark)

    def check(outputs: list[ZutisOutput], evaluated: Evaluated) -> str:
        num_objects = 0
        for number, (image_id, output) in enumerate(zip(image_ids, outputs, strict=True)):
            prediction = evaluated.store.get(number, image_id)
            assert prediction is not None
            expected = semantic_prediction(output.patch_tokens, text, size)[0].cpu()
            agreement = float((prediction.labels == expected.numpy()).mean())
            assert agreement > 0.999, f"{image_id}: {1 - agreement:.1%} of the labels differ"
            num_objects += len(prediction.objects or [])
        assert evaluated.scores["n_images"] == count
        return f"label maps of the bare network's outputs; {num_objects} objects scored"

    return Pair(bare, ours, check)


def _prepare_many(folder: Path, num_images: int, dim: int) -> None:
    del dim
    _write_voc(folder / "voc", (96, 128), num_images)
    _save_network(folder, zutis_network(quick=True))


def _evaluate_many(folder: Path) -> Evaluated:
    segmenter, _, _ = _segmenter(cpu_runtime(folder / "cache"), quick=True)
    return _evaluate(folder, segmenter, _open_voc(folder))


CURVE = Curve(
    name="evaluate",
    title="evaluate: images of 128 x 96, tiny network, semantic and instance scores",
    sizes=(100, 500, 2_500),
    bytes_of_item=lambda _: 20_000,
    prepare=_prepare_many,
    run=_evaluate_many,
)

BENCHES = [
    Bench(
        name="evaluate_image",
        title="evaluation of 2 images of 500 x 375 from JPEG to scores, over the bare "
        "forward (ViT-B/16, 100 queries)",
        target=1.3,
        stretch=1.15,
        prepare=prepare_evaluation,
        overhead=True,
    )
]
