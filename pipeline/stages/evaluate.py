"""Stage 6: score a checkpoint on a labelled set, beside DenseCLIP alone on the same images."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.benchmarks import Benchmark, Example, open_bench
from pipeline.data.categories import load_category_set
from pipeline.data.images import ImageError, load_image
from pipeline.errors import PipelineError
from pipeline.files import atomic_path, digest, file_sha256, replace_dir, write_json
from pipeline.metrics.instance import MaskAP
from pipeline.metrics.semantic import ConfusionMatrix
from pipeline.models.build import WEIGHTS_NAME
from pipeline.models.clip import load_clip
from pipeline.models.denseclip import DenseClip, label_and_confidence
from pipeline.params import BenchParams, EvaluateParams, PseudoLabelParams
from pipeline.predictor import (
    CheckpointConfig,
    Prediction,
    PredictionSettings,
    Segmenter,
    read_checkpoint_config,
    to_tensor,
)
from pipeline.runtime import Runtime, StageRun
from pipeline.stages.pseudo_label import build_denseclip
from pipeline.viz import (
    colour_map,
    displayed,
    grid,
    overlay_errors,
    overlay_instances,
    overlay_semantic,
)

EXTREMES = 6
DIGITS = 12
LISTED_NAMES = 8
GROUP_SCORES = ("miou", "ap", "ap50", "baseline_miou", "n_images")

Item = TypeVar("Item")


def run(
    *,
    bench_name: str,
    bench: BenchParams,
    checkpoint_dir: Path,
    out_dir: Path,
    params: EvaluateParams,
    baseline: PseudoLabelParams,
    background: Sequence[str],
    runtime: Runtime,
    stats_path: Path,
    open_vocabulary: bool = False,
) -> None:
    """Write `metrics/NAME.json`, `plots/NAME_per_class.csv` and `overlays/NAME/`.

    Scores are percentages with two decimals, null where there was nothing to score. Void pixels
    count nowhere: they are left out of the confusion matrix and cut out of all instance masks.

    Args:
        bench_name: name of the benchmark, used in file names.
        bench: its entry of params.yaml.
        checkpoint_dir: folder that the train stage wrote.
        out_dir: folder of reports.
        params: section `evaluate` of params.yaml.
        baseline: section `pseudo_label`: the settings of DenseCLIP, the training-free baseline.
        background: names of label id 0 for the baseline; the checkpoint brings its own.
        runtime: device and precision.
        stats_path: counts of this run, JSON.
        open_vocabulary: score categories that the checkpoint was not trained with.

    Raises:
        PipelineError: a benchmark that lacks a part, a checkpoint that cannot be used, category
            lists that differ, or no readable image.
    """
    categories = load_category_set(
        bench.categories, background=background, field=f"benches.{bench_name}.categories"
    )
    benchmark = open_bench(
        format=bench.format,
        root=bench.root,
        split=bench.split,
        categories=categories,
        groups=bench.groups,
    )
    config = read_checkpoint_config(checkpoint_dir)
    if not open_vocabulary:
        _check_categories(bench_name, categories, checkpoint_dir, config.categories)
    settings = prediction_settings(params)
    segmenter = Segmenter.load(
        checkpoint_dir, categories=categories, settings=settings, runtime=runtime
    )
    reference = _load_baseline(baseline, categories, background, runtime)
    scores = _Scores(categories, benchmark.groups)
    with StageRun("evaluate", stats_path=stats_path, total=len(benchmark)) as stage:
        for batch in batches(_load_examples(benchmark, stage), params.batch_size):
            images = [image for _, image in batch]
            predictions = segmenter.predict(images)
            baselines = [_baseline_labels(reference, image, segmenter, runtime) for image in images]
            for (example, _), prediction, labels in zip(batch, predictions, baselines, strict=True):
                scores.add(example, prediction, labels)
                stage.advance()
        if not stage.items:
            first = stage.skipped[0]
            raise PipelineError(
                f"{bench.root}: none of its {len(benchmark)} images can be read; the first one, "
                f"{first['item']}: {first['reason']}"
            )
        _write_overlays(
            out_dir / "overlays" / bench_name,
            benchmark,
            segmenter,
            scores.image_miou,
            count=params.overlays,
        )
        _write_per_class(out_dir / "plots" / f"{bench_name}_per_class.csv", categories, scores)
        metrics = scores.compute()
        metrics["protocol"] = _protocol(
            bench,
            categories,
            config=config,
            weights_path=Path(checkpoint_dir) / WEIGHTS_NAME,
            params=params,
            baseline=baseline,
            background=background,
            open_vocabulary=open_vocabulary,
        )
        write_json(out_dir / "metrics" / f"{bench_name}.json", metrics)


def prediction_settings(params: EvaluateParams) -> PredictionSettings:
    """The part of section `evaluate` that decides a prediction."""
    return PredictionSettings(
        threshold=params.threshold,
        temperature=params.temperature,
        suppression=params.suppression,
        resize_to=params.resize_to,
        max_side=params.max_side,
    )


@dataclass
class _SemanticPair:
    """Confusion matrices of the network and of the baseline over the same images."""

    network: ConfusionMatrix
    baseline: ConfusionMatrix


class _Scores:
    """Running scores over all images and over each group."""

    def __init__(self, categories: Sequence[str], groups: Mapping[str, frozenset[str]]) -> None:
        self._num_classes = len(categories) + 1
        self._groups = dict(groups)
        self._whole = self._new_pair()
        self._parts = {name: self._new_pair() for name in self._groups}
        self._instances = MaskAP(categories)
        # Image id -> mIoU, of images that show an object; without one, background alone is right.
        self.image_miou: dict[str, float] = {}
        self._scored: list[str] = []

    def add(self, example: Example, prediction: Prediction, baseline: NDArray[np.integer]) -> None:
        """Score one image."""
        target = example.semantic()
        pair = self._new_pair()
        pair.network.update(target=target, prediction=prediction.semantic)
        pair.baseline.update(target=target, prediction=baseline)
        image_id = example.image_id
        for total in (self._whole, *(self._parts[name] for name in self._groups_of(image_id))):
            total.network.merge(pair.network)
            total.baseline.merge(pair.baseline)
        self._instances.add(
            image_id,
            size=(target.shape[0], target.shape[1]),
            targets=example.instances(),
            predictions=prediction.instances,
            void=example.void(),
        )
        self._scored.append(image_id)
        if (target > 0).any():
            self.image_miou[image_id] = pair.network.compute().miou

    def compute(self) -> dict[str, Any]:
        """All scores, those of the groups under `groups`."""
        metrics = self._part(self._whole, self._scored)
        if self._groups:
            metrics["groups"] = {name: self._group(name) for name in self._groups}
        return metrics

    def class_iou(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """IoU by label id of the network and of the baseline."""
        return self._whole.network.compute().iou, self._whole.baseline.compute().iou

    def _part(self, pair: _SemanticPair, image_ids: Sequence[str]) -> dict[str, Any]:
        semantic, baseline = pair.network.compute(), pair.baseline.compute()
        instance = asdict(self._instances.compute(image_ids))
        return {
            "miou": percent(semantic.miou),
            "pixel_acc": percent(semantic.pixel_acc),
            "mean_acc": percent(semantic.mean_acc),
            **{name: percent(value) for name, value in instance.items()},
            "baseline_miou": percent(baseline.miou),
            "n_images": len(image_ids),
        }

    def _group(self, name: str) -> dict[str, Any]:
        """The main scores of one group."""
        image_ids = [image_id for image_id in self._scored if image_id in self._groups[name]]
        scores = self._part(self._parts[name], image_ids)
        return {key: scores[key] for key in GROUP_SCORES}

    def _groups_of(self, image_id: str) -> list[str]:
        return [name for name, members in self._groups.items() if image_id in members]

    def _new_pair(self) -> _SemanticPair:
        return _SemanticPair(ConfusionMatrix(self._num_classes), ConfusionMatrix(self._num_classes))


def percent(score: float) -> float:
    """A score in [0, 1] as a percentage with two decimals; NaN stays NaN."""
    return round(100 * float(score), 2)


def _check_categories(
    bench_name: str, categories: Sequence[str], checkpoint_dir: Path, trained: Sequence[str]
) -> None:
    untrained = [name for name in categories if name not in trained]
    unscored = [name for name in trained if name not in categories]
    if untrained or unscored:
        raise PipelineError(
            f"benches.{bench_name}.categories differ from those of {checkpoint_dir}: "
            f"only in the benchmark: {_listing(untrained)}; only in the checkpoint: "
            f"{_listing(unscored)}; make them the same and train again"
        )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return (", ".join(names[:LISTED_NAMES]) or "none") + more


def _load_examples(benchmark: Benchmark, stage: StageRun) -> Iterator[tuple[Example, Image.Image]]:
    """Examples with their images; one that cannot be read is skipped and counted."""
    for example in benchmark:
        try:
            yield example, _load_checked(example)
        except ImageError as error:
            stage.skip(str(example.image_path), str(error))


def _load_checked(example: Example) -> Image.Image:
    image = load_image(example.image_path)
    height, width = example.semantic().shape
    if image.size != (width, height):
        raise PipelineError(
            f"{example.image_path}: {image.width}x{image.height} pixels, but its masks have "
            f"{width}x{height}"
        )
    return image


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` consecutive items; the last one may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def _load_baseline(
    params: PseudoLabelParams,
    categories: Sequence[str],
    background: Sequence[str],
    runtime: Runtime,
) -> DenseClip:
    encoder = load_clip(params.encoder.model, params.encoder.pretrained, runtime.device)
    return build_denseclip(encoder, categories=categories, background=background, params=params)


def _baseline_labels(
    model: DenseClip, image: Image.Image, segmenter: Segmenter, runtime: Runtime
) -> NDArray[np.integer]:
    """DenseCLIP's label ids (H, W), from the input that the network gets."""
    pixels = to_tensor(image, segmenter.settings, patch_size=segmenter.patch_size)
    with torch.no_grad(), runtime.autocast():
        scores = model(pixels[None].to(runtime.device)).float()
    labels, _ = label_and_confidence(scores, (image.height, image.width))
    return labels[0].cpu().numpy()


def _write_per_class(path: Path, categories: Sequence[str], scores: _Scores) -> None:
    """CSV of IoU by class, the background's first; empty cells where a class never occurs."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["category", "iou", "baseline_iou"])
        for name, *values in zip(["background", *categories], *scores.class_iou(), strict=True):
            writer.writerow([name, *("" if np.isnan(v) else percent(v) for v in values)])


def _write_overlays(
    out_dir: Path,
    benchmark: Benchmark,
    segmenter: Segmenter,
    image_miou: dict[str, float],
    *,
    count: int,
) -> None:
    """Pictures of `count` images spread over the benchmark, and of the best and worst ones.

    `index.json` lists file, image id, mIoU and kind (spread, best, worst); best and worst are in
    order, among the images that show an object.
    """
    chosen = _choose([example.image_id for example in benchmark], image_miou, count=count)
    wanted = {image_id for image_ids in chosen.values() for image_id in image_ids}
    drawn = set()
    with replace_dir(out_dir) as folder:
        for example in benchmark:
            if example.image_id not in wanted:
                continue
            try:
                image = _load_checked(example)
            except ImageError:
                continue
            _draw(example, image, segmenter).save(folder / f"{example.image_id}.png")
            drawn.add(example.image_id)
        index = [
            {
                "file": f"{image_id}.png",
                "image_id": image_id,
                "miou": percent(image_miou[image_id]) if image_id in image_miou else None,
                "kind": kind,
            }
            for kind, image_ids in chosen.items()
            for image_id in image_ids
            if image_id in drawn
        ]
        write_json(folder / "index.json", index)


def _choose(
    image_ids: Sequence[str], image_miou: dict[str, float], *, count: int
) -> dict[str, list[str]]:
    """Which images are drawn, by kind."""
    if count == 0:
        return {}
    spread = np.linspace(0, len(image_ids) - 1, min(count, len(image_ids))).round().astype(int)
    ranked = sorted(image_miou, key=lambda image_id: (image_miou[image_id], image_id))
    extremes = min(EXTREMES, len(ranked) // 2)
    return {
        "spread": [image_ids[index] for index in spread],
        "best": ranked[len(ranked) - extremes :][::-1],
        "worst": ranked[:extremes],
    }


def _draw(example: Example, image: Image.Image, segmenter: Segmenter) -> Image.Image:
    """Image, objects, label map and errors in a square of four."""
    prediction, target = segmenter(image), example.semantic()
    pixels = np.asarray(image)
    palette = colour_map(len(segmenter.categories) + 1)
    return grid(
        [
            displayed(pixels),
            overlay_instances(pixels, prediction.instances, names=segmenter.categories),
            overlay_semantic(pixels, prediction.semantic, palette, names=segmenter.categories),
            overlay_errors(pixels, prediction.semantic, target),
        ],
        columns=2,
    )


def _protocol(
    bench: BenchParams,
    categories: Sequence[str],
    *,
    config: CheckpointConfig,
    weights_path: Path,
    params: EvaluateParams,
    baseline: PseudoLabelParams,
    background: Sequence[str],
    open_vocabulary: bool,
) -> list[str]:
    """Everything that one must know to compare these numbers with others, as `name: value`.

    Lines, because DVC makes a column of every number and text that is not in a list.
    """
    settings = {
        "encoder": _encoder_tag(config.encoder_model, config.encoder_pretrained),
        "checkpoint": file_sha256(weights_path)[:DIGITS],
        "step": config.step,
        "split": bench.split,
        "num_categories": len(categories),
        "categories_hash": digest(list(categories))[:DIGITS],
        "open_vocabulary": open_vocabulary,
        "background": ", ".join(config.background),
        "templates": config.templates,
        "resize_to": params.resize_to,
        "max_side": params.max_side,
        "void": "not scored",
        "sliding_window": False,
        "refinement": "none",
        "threshold": params.threshold,
        "temperature": params.temperature,
        "suppression": params.suppression,
        "baseline_encoder": _encoder_tag(baseline.encoder.model, baseline.encoder.pretrained),
        "baseline_background": ", ".join(background),
        "baseline_templates": baseline.templates,
        "baseline_prompt_denoising": baseline.prompt_denoising,
        "baseline_key_smoothing": baseline.key_smoothing,
        "baseline_attention": baseline.dense_attention,
    }
    return [f"{name}: {'none' if value is None else value}" for name, value in settings.items()]


def _encoder_tag(model: str, pretrained: str) -> str:
    """`ViT-B-16-quickgelu/openai`; of local files the names without folders."""
    return f"{Path(model).name}/{Path(pretrained).name}" if pretrained else model
