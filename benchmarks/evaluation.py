"""Evaluation of an image, all included, over the bare forward of its network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Bench, Pair
from benchmarks.inputs import cpu_runtime, ellipses, jpeg, photo, text_dim, unit_rows, zutis_network
from pipeline.bench_predictor import NetworkPredictor, image_loader, predict_bench
from pipeline.data.benchmarks import open_bench
from pipeline.data.benchmarks.voc import VocWriter
from pipeline.data.images import load_image
from pipeline.models.postprocess import semantic_prediction
from pipeline.models.zutis import ZutisOutput
from pipeline.predictor import PredictionSettings, Segmenter, to_tensor
from pipeline.runtime import StageRun
from pipeline.scoring.board import ScoreBoard
from pipeline.scoring.predictions import PredictionStore, write_predictions
from pipeline.scoring.task import ScoringTask

CATEGORIES = [f"category {number}" for number in range(1, 21)]
METRICS = ["semantic", "instance"]
NUM_IMAGES = 2
PATCH = 16


@dataclass(frozen=True)
class Evaluated:
    """Predictions on disk and their scores."""

    store: PredictionStore
    scores: dict[str, Any]


def _write_voc(root: Path, size: tuple[int, int]) -> list[str]:
    """Images with three objects each, in PASCAL VOC's layout; their ids."""
    writer = VocWriter(root)
    image_ids = [f"{number:06d}" for number in range(NUM_IMAGES)]
    for number, image_id in enumerate(image_ids):
        semantic, instances = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for instance, mask in enumerate(ellipses(number, 3, size), start=1):
            semantic[mask], instances[mask] = 1 + number + instance, instance
        data = jpeg(photo(number, size[1], size[0]))
        writer.add(image_id, data, semantic, instances)
    writer.write_split("val", image_ids)
    return image_ids


def _prepare(folder: Path, quick: bool) -> Pair:
    size = (48, 64) if quick else (375, 500)
    root = folder / "voc"
    image_ids = _write_voc(root, size)
    benchmark = open_bench(format="voc", root=root, split="val", categories=CATEGORIES, groups={})
    network = zutis_network(quick=quick).eval()
    text = unit_rows(torch.Generator().manual_seed(0), 1 + len(CATEGORIES), text_dim(quick=quick))
    runtime, settings = cpu_runtime(folder / "cache"), PredictionSettings()
    segmenter = Segmenter(network, text, categories=CATEGORIES, runtime=runtime, settings=settings)
    predictor = NetworkPredictor(segmenter, baseline=None, checkpoint_dir=folder)
    paths = [root / "JPEGImages" / f"{image_id}.jpg" for image_id in image_ids]
    inputs = [to_tensor(load_image(path), settings, patch_size=PATCH)[None] for path in paths]

    @torch.inference_mode()
    def bare() -> list[ZutisOutput]:
        return [network(image) for image in inputs]

    def ours() -> Evaluated:
        load = image_loader(None, bench_name="voc", seed=0)
        with StageRun("evaluate", stats_path=folder / "stats.json") as stage:
            predictions = predict_bench(benchmark, predictor, load, batch_size=1, stage=stage)
            write_predictions(
                predictions, folder / "predictions", num_categories=len(CATEGORIES), settings={}
            )
        store = PredictionStore(folder / "predictions")
        board = ScoreBoard(ScoringTask(CATEGORIES), metrics=METRICS, groups={})
        for example, prediction in store.pair(benchmark):
            board.add(example, prediction)
        return Evaluated(store, board.compute())

    def check(outputs: list[ZutisOutput], evaluated: Evaluated) -> str:
        num_objects = 0
        for number, (image_id, output) in enumerate(zip(image_ids, outputs, strict=True)):
            prediction = evaluated.store.get(number, image_id)
            assert prediction is not None
            expected = semantic_prediction(output.patch_tokens, text, size)[0]
            agreement = float((prediction.labels == expected.numpy()).mean())
            assert agreement > 0.999, f"{image_id}: {1 - agreement:.1%} of the labels differ"
            num_objects += len(prediction.objects or [])
        assert evaluated.scores["n_images"] == NUM_IMAGES
        return f"label maps of the bare network's outputs; {num_objects} objects scored"

    return Pair(bare, ours, check)


BENCHES = [
    Bench(
        name="evaluate_image",
        title=f"evaluation of {NUM_IMAGES} images of 500 x 375 from JPEG to scores, over the bare "
        "forward (ViT-B/16, 100 queries)",
        target=1.3,
        stretch=1.15,
        prepare=_prepare,
        overhead=True,
    )
]
