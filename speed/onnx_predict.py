"""Photos predicted by a network in ONNX's format beside the same network in torch."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.exporters.onnx import write_student
from pipeline.inference.onnx import OnnxSegmenter
from pipeline.inference.prediction import Prediction
from pipeline.inference.segmenter import Segmenter
from pipeline.models.zutis.predictor import ZutisPredictor
from pipeline.params.base import PredictionSettings
from speed.harness import Bench, Pair
from speed.inputs import cpu_runtime, photo, text_dim, unit_rows, zutis_network

CATEGORIES = [f"category {number}" for number in range(1, 21)]
ORIGIN = {
    "student": "zutis",
    "checkpoint": "random",
    "encoder": "random",
    "templates": "name",
    "step": 0,
    "background": ["background"],
}


def prepare(folder: Path, quick: bool) -> Pair:
    """A network with random weights and random texts, and two photos, from pixels to objects."""
    text = unit_rows(torch.Generator().manual_seed(0), 1 + len(CATEGORIES), text_dim(quick=quick))
    network = zutis_network(quick=quick).eval()
    student = ZutisPredictor(network, text, architecture={}, runtime=cpu_runtime(folder))
    theirs = Segmenter(student, categories=CATEGORIES, settings=PredictionSettings())
    write_student(theirs, folder / "student.onnx", origin=ORIGIN)
    ours = OnnxSegmenter.load(folder / "student.onnx")
    width, height = (64, 48) if quick else (500, 375)
    photos = [photo(number, width, height) for number in range(2)]

    def check(wanted: list[Prediction], found: list[Prediction]) -> str:
        for one, other in zip(wanted, found, strict=True):
            agreement = float((one.semantic == other.semantic).mean())
            assert agreement > 0.999, f"{1 - agreement:.1%} of the labels differ"
            assert len(one.instances) == len(other.instances)
        return f"label maps; {sum(len(one.instances) for one in found)} objects"

    return Pair(
        published=lambda: [theirs(image) for image in photos],
        ours=lambda: [ours(image) for image in photos],
        check=check,
    )


BENCHES = [
    Bench(
        name="onnx_predict",
        title="onnxruntime beside torch: 2 photos of 500 x 375, from pixels to label maps and "
        "objects (ViT-B/16, 100 queries)",
        target=0.8,
        stretch=1.0,
        prepare=prepare,
    )
]
