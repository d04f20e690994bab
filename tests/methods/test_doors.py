"""A throw-away method through each door: params, stage, cache, protocol, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from pipeline.benchmarks.voc import VocWriter
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import decode_label, decode_png
from pipeline.formats.predictions import Segmentation
from pipeline.formats.shards import open_samples, read_manifest
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import DENSE_LABELLERS, DenseMethod, PseudoLabelParams
from pipeline.methods.masks import MASK_SOURCES, MaskMethod, MaskParams
from pipeline.methods.students import (
    STUDENTS,
    MicroBatch,
    StudentMethod,
    TrainParams,
    pasted_samples,
)
from pipeline.models.weights.checkpoint import WEIGHTS_NAME, CheckpointConfig
from pipeline.models.weights.weights import load_state
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.params.benches import VocBench
from pipeline.params.reading import parse_params
from pipeline.params.sections import EvaluateParams, Params
from pipeline.report.scores import read_benches
from pipeline.stages import mask, predict, pseudo_label, train
from pipeline.vocabulary.categories import Names
from tests.conftest import encoded_image, noise_image
from tests.stages.evaluating import evaluate
from tests.stages.tiny_checkpoint import CATEGORIES
from tests.stages.tiny_workspace import Workspace, write_workspace


class HalfParams(MaskParams):
    """The left part of every image."""

    source: Literal["half"] = "half"
    share: float = 0.5


class Half:
    max_pixels = 10**6
    threshold = 0.5

    def __init__(self, params: HalfParams, runtime: Runtime) -> None:
        del runtime
        self._share = params.share
        self.settings = {"source": "half", "share": params.share}

    def predict(self, images: Tensor) -> Tensor:
        masks = torch.zeros(len(images), *images.shape[-2:])
        masks[..., : int(self._share * images.shape[-1])] = 1
        return masks


class StripesParams(PseudoLabelParams):
    """Every label id in turn, from left to right."""

    method: Literal["stripes"] = "stripes"
    width: int = 8


class Stripes:
    def __init__(self, params: StripesParams, label_ids: Sequence[int]) -> None:
        self.patch_size = params.width
        self.settings = {"width": params.width}
        self.logit_scale = None
        self._params = params
        self._label_ids = list(label_ids)

    def select(self, label_ids: Sequence[int]) -> Stripes:
        return Stripes(self._params, [self._label_ids[number] for number in label_ids])

    def scores(self, images: Tensor) -> Tensor:
        columns = torch.arange(images.shape[-1] // self.patch_size) % len(self._label_ids)
        scores = nn.functional.one_hot(columns, len(self._label_ids)).T.float()
        return scores[None, :, None].expand(len(images), -1, -1, -1)

    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.arange(images.shape[-1]) // self.patch_size % len(self._label_ids)
        labels = columns.expand(len(images), *images.shape[-2:])
        return labels, torch.ones(labels.shape)


class ColourParams(TrainParams):
    """A label for each pixel by a 1 x 1 convolution of its colour."""

    student: Literal["colour"] = "colour"
    rate: float = 0.1


class Colour:
    losses = ("pixels",)
    milestones: Mapping[int, str] = {}

    def __init__(self, params: ColourParams, names: Names, runtime: Runtime) -> None:
        del runtime
        self._params = params
        self.config: dict[str, Any] = {"architecture": {"labels": 1 + len(names.categories)}}
        self.fingerprint = "none"
        self.network = nn.Conv2d(3, 1 + len(names.categories), 1)

    def make_optimizer(self) -> Optimizer:
        return SGD(self.network.parameters(), lr=self._params.rate)

    def set_learning_rates(self, optimizer: Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = self._params.rate / (1 + step)

    def count(self, batch: MicroBatch) -> Tensor:
        return torch.tensor([batch.semantic_masks.numel()])

    def loss(self, batch: MicroBatch, divisors: Tensor) -> Tensor:
        logits = self.network(batch.images / 255)
        targets = batch.semantic_masks.long()
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return torch.stack([loss / divisors[0]] * 2)

    def has_drifted(self, rows: Sequence[tuple[int, Sequence[float]]]) -> None:
        pass


class TrainedColour:
    patch_size = 1
    logit_scale = 2.0
    fingerprint = "none"

    def __init__(self, network: nn.Module, label_ids: Sequence[int]) -> None:
        self._network = network
        self._label_ids = list(label_ids)

    def select(self, label_ids: Sequence[int]) -> TrainedColour:
        return TrainedColour(self._network, [self._label_ids[number] for number in label_ids])

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], settings: PredictionSettings
    ) -> list[Segmentation]:
        del settings
        logits = self._network(images)[:, self._label_ids]
        maps = [
            nn.functional.interpolate(one[None], size).argmax(1)[0].to(torch.int16).numpy()
            for one, size in zip(logits, sizes, strict=True)
        ]
        return [Segmentation(semantic, []) for semantic in maps]

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        logits: Tensor = self._network(images)[:, self._label_ids]
        return logits

    def protocol(self, settings: PredictionSettings) -> dict[str, Any]:
        del settings
        return {"network_kind": "one convolution"}


def load_colour(
    folder: Path, config: CheckpointConfig, names: Names, runtime: Runtime
) -> TrainedColour:
    del runtime
    network = nn.Conv2d(3, config.architecture["labels"], 1)
    network.load_state_dict(load_state(folder / WEIGHTS_NAME))
    return TrainedColour(network, range(1 + len(names.categories)))


@pytest.fixture(autouse=True)
def doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more method behind each door."""
    stripes = DenseMethod(
        StripesParams,
        lambda params, names, _: Stripes(params, range(1 + len(names.categories))),
    )
    monkeypatch.setitem(MASK_SOURCES, "half", MaskMethod(HalfParams, Half))
    monkeypatch.setitem(DENSE_LABELLERS, "stripes", stripes)
    colour = StudentMethod(ColourParams, pasted_samples, Colour, load_colour, gives_objects=False)
    monkeypatch.setitem(STUDENTS, "colour", colour)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    return write_workspace(tmp_path_factory.mktemp("doors") / "world", tiny_clip, index=9, bench=3)


def params(**sections: Any) -> Params:
    """As they would stand in params.yaml."""
    return parse_params({"categories": CATEGORIES, "index": {"a": {"root": "a"}}, **sections})


def make_masks(workspace: Workspace, root: Path, runtime: Runtime, **section: Any) -> Path:
    mask.run(
        archives_path=workspace.root / "archives.parquet",
        out_dir=root / "masks",
        params=params(mask={"source": "half", "refine": False, **section}).mask,
        runtime=runtime,
        stats_path=root / "mask.json",
    )
    return root / "masks"


def counts(path: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(path.read_text())["counts"]
    return found


def test_a_mask_source(workspace: Workspace, tmp_path: Path, runtime: Runtime) -> None:
    masks = open_samples(make_masks(workspace, tmp_path, runtime))
    for index in range(len(masks)):
        values = decode_png(masks.member(index, "mask.png")) > 0
        assert values[:, : values.shape[1] // 2].all()
        assert not values[:, values.shape[1] // 2 :].any()
    assert read_manifest(tmp_path / "masks")["mask"]["share"] == 0.5
    assert counts(tmp_path / "mask.json")["masked"] > 0
    make_masks(workspace, tmp_path, runtime)
    assert counts(tmp_path / "mask.json")["masked"] == 0
    make_masks(workspace, tmp_path, runtime, share=0.25)
    assert counts(tmp_path / "mask.json")["masked"] > 0
    with pytest.raises(PipelineError, match=r"unknown key 'mask\.weights'; known keys: .*share"):
        params(mask={"source": "half", "weights": "a"})


def label(root: Path, runtime: Runtime, masks: Path) -> Path:
    pseudo_label.run(
        mask_dir=masks,
        out_dir=root / "labels",
        categories=CATEGORIES,
        params=params(pseudo_label={"method": "stripes"}).pseudo_label,
        runtime=runtime,
        stats_path=root / "pseudo_label.json",
    )
    return root / "labels"


def test_a_dense_labeller(workspace: Workspace, tmp_path: Path, runtime: Runtime) -> None:
    masks = make_masks(workspace, tmp_path, runtime)
    labels = open_samples(label(tmp_path, runtime, masks))
    assert labels.keys == open_samples(masks).keys
    values = decode_label(labels.member(0, "label.png"))
    assert values[0, ::8].tolist() == [number % 4 for number in range(-(-values.shape[1] // 8))]
    assert counts(tmp_path / "pseudo_label.json") == {"cached": 0}
    label(tmp_path, runtime, masks)
    assert counts(tmp_path / "pseudo_label.json") == {"cached": 9}
    section = params(pseudo_label={"method": "stripes"}).pseudo_label
    (tmp_path / "photo.png").write_bytes(encoded_image(noise_image(2, 40, 32)))
    predict.run(
        inputs=[tmp_path / "photo.png"],
        categories=CATEGORIES,
        checkpoint_dir=None,
        out_dir=tmp_path / "out",
        params=EvaluateParams(),
        runtime=runtime,
        labeller=section,
        confidence=["dog"],
    )
    with Image.open(tmp_path / "out/confidence/dog/photo.png") as picture:
        values = np.asarray(picture)[0, 4::8]
    assert values[2] > 230
    assert (np.delete(values, 2) < 20).all()
    metrics = score(tmp_path, runtime, checkpoint_dir=None)
    assert {"model: stripes", "width: 8"} <= set(metrics["protocol"])
    assert metrics["n_images"] == 3
    assert "ap" not in metrics  # it finds no objects
    with pytest.raises(PipelineError, match=r"benches\.tiny\.metrics: instance: this model"):
        score(tmp_path, runtime, checkpoint_dir=None, metrics=["instance"])


def score(
    root: Path, runtime: Runtime, *, checkpoint_dir: Path | None, **changes: Any
) -> dict[str, Any]:
    """Metrics of a benchmark whose truth is what the method `stripes` says."""
    writer = VocWriter(root / "voc")
    for number in range(3):
        stripes = np.tile(np.arange(40) // 8 % 4, (32, 1)).astype(np.uint8)
        data = encoded_image(noise_image(number, 40, 32), "JPEG")
        writer.add(f"im{number}", data, stripes, (stripes > 0).astype(np.uint8))
    writer.write_split("val", [f"im{number}" for number in range(3)])
    evaluate(
        bench_name="tiny",
        bench=VocBench(format="voc", root=root / "voc", categories=CATEGORIES, **changes),
        checkpoint_dir=checkpoint_dir,
        out_dir=root / "reports",
        predictions_dir=root / "predictions",
        params=EvaluateParams(overlays=1),
        baseline=params(pseudo_label={"method": "stripes"}).pseudo_label,
        background=["background"],
        runtime=runtime,
        stats_path=root / "predict_bench.json",
    )
    metrics: dict[str, Any] = json.loads((root / "reports/metrics/tiny.json").read_text())
    return metrics


def test_a_student(workspace: Workspace, tmp_path: Path, runtime: Runtime) -> None:
    section = {"student": "colour", "iterations": 4, "batch_size": 2, "crop_size": 16, "workers": 0}
    encoder = EncoderParams(model=workspace.encoder.model, pretrained=workspace.encoder.pretrained)
    train.run(
        masks_dir=make_masks(workspace, tmp_path, runtime),
        out_dir=tmp_path / "student",
        live_dir=tmp_path / "live",
        stats_path=tmp_path / "train.json",
        categories=CATEGORIES,
        background=["background"],
        params=params(train={**section, "encoder": encoder.model_dump()}).train,
        runtime=runtime,
    )
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert (config["student"], config["step"], config["train"]["rate"]) == ("colour", 4, 0.1)
    assert (tmp_path / "live/plots/metrics/train/pixels.tsv").is_file()

    segmenter = Segmenter.load(tmp_path / "student", categories=["dog"], runtime=runtime)
    prediction = segmenter(noise_image(1, 20, 10))
    assert prediction.semantic.shape == (10, 20)
    assert set(np.unique(prediction.semantic)) <= {0, 1}

    metrics = score(tmp_path, runtime, checkpoint_dir=tmp_path / "student")
    assert {"model: colour", "network_kind: one convolution"} <= set(metrics["protocol"])
    assert "baseline_model: stripes" in metrics["protocol"]
    assert metrics["baseline_miou"] == 100
    assert "ap" not in metrics  # it finds no objects
    (bench,) = read_benches(tmp_path / "reports/metrics", tmp_path / "reports/plots", ["tiny"])
    assert bench["protocol"]["model"] == "colour"
    score(tmp_path, runtime, checkpoint_dir=tmp_path / "student")
    assert counts(tmp_path / "predict_bench.json") == {"cached": 3}

    (tmp_path / "photo.jpg").write_bytes(encoded_image(noise_image(2), "JPEG"))
    predict.run(
        inputs=[tmp_path / "photo.jpg"],
        categories=None,
        checkpoint_dir=tmp_path / "student",
        out_dir=tmp_path / "out",
        params=EvaluateParams(),
        runtime=runtime,
        confidence=["cat"],
    )
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["annotations"] == []
    with Image.open(tmp_path / "out" / content["images"][0]["confidence"]["cat"]) as picture:
        values = np.asarray(picture) / 255
    labels = Segmenter.load(tmp_path / "student", runtime=runtime)(tmp_path / "photo.jpg").semantic
    assert values.shape == labels.shape
    assert (values[labels == 1] > 0.24).all()  # the largest of four
    assert (values[labels != 1] < 0.51).all()


def test_a_checkpoint_of_an_unknown_kind_is_named(
    workspace: Workspace, tmp_path: Path, runtime: Runtime
) -> None:
    config = json.loads((workspace.root / "zutis/config.json").read_text())
    assert "student" not in config  # and yet it is a ZUTIS
    assert Segmenter.load(workspace.root / "zutis", runtime=runtime).categories == CATEGORIES
    (tmp_path / "config.json").write_text(json.dumps({**config, "student": "deeplab"}))
    with pytest.raises(
        PipelineError, match=r"student: 'deeplab'; known are zutis, denseclip_plus, colour"
    ):
        Segmenter.load(tmp_path, runtime=runtime)
