"""Stage 6, first half: predictions on a benchmark, into shards that `score` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from pipeline.benchmarks import Benchmark
from pipeline.benchmarks.headers import check_headers
from pipeline.benchmarks.opening import open_benchmark
from pipeline.engine.dry_run import DryRun
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.errors import PipelineError, listing
from pipeline.formats.predictions import SHARD_SIZE
from pipeline.inference.bench import (
    BenchRun,
    PredictionMaker,
    cached_predictions,
    images_to_predict,
)
from pipeline.inference.onnx import OnnxNetwork
from pipeline.methods.dense import DENSE_LABELLERS, PseudoLabelParams
from pipeline.methods.students import student_of
from pipeline.models.weights.checkpoint import CheckpointConfig, read_checkpoint_config
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.base import PredictionSettings
from pipeline.params.benches import BenchParams
from pipeline.params.sections import EvaluateParams
from pipeline.vocabulary.categories import texts_for

LABEL_MAP_METRICS = {"semantic", "size"}


def run(
    *,
    bench_name: str,
    bench: BenchParams,
    checkpoint_dir: Path | None,
    out_dir: Path,
    params: EvaluateParams,
    baseline: PseudoLabelParams,
    background: Sequence[str],
    runtime: Runtime,
    stats_path: Path,
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    open_vocabulary: bool = False,
    with_baseline: bool = True,
    shard_size: int = SHARD_SIZE,
    executor: Executor | DryRun | None = None,
    onnx_path: Path | None = None,
) -> None:
    """Write one prediction for each image of a benchmark, see `pipeline.formats.predictions`.

    Predictions are cached by the content of the image. The manifest says how they were made: it
    holds the protocol, the categories, and what is to be scored.

    Args:
        bench_name: name of the benchmark, for messages.
        bench: its entry of params.yaml.
        checkpoint_dir: folder that the train stage wrote, or name of published weights; None for
            the dense labeller alone.
        out_dir: folder of shards, replaced as a whole.
        params: section `evaluate`.
        baseline: section `pseudo_label`: the dense labeller, the training-free baseline.
        background: names of label id 0 for it; the checkpoint brings its own.
        runtime: device, precision, cache folder, and seed of corruptions.
        stats_path: counts of this run, JSON.
        texts: what stands for a category in prompts of the dense labeller alone, see `Names`; a
            checkpoint brings its own, also for the labeller beside it.
        open_vocabulary: score categories that the checkpoint was not trained with.
        with_baseline: let the dense labeller label beside a network.
        shard_size: predictions of a shard.
        executor: where predictions are made; here by default.
        onnx_path: a network that was exported, in place of a checkpoint and without baseline.

    Raises:
        PipelineError: a benchmark that lacks a part or has photos and masks of different sizes, a
            checkpoint that cannot be used, category lists that differ, or images of which none or
            too few can be read.
    """
    benchmark = open_benchmark(bench_name, bench, background)
    names = _asked_names(benchmark)
    with_objects = DENSE_LABELLERS[baseline.method].gives_objects
    if onnx_path is not None:
        with_objects, with_baseline = OnnxNetwork.load(onnx_path).finds_objects, False
    elif checkpoint_dir is not None:
        checkpoint_dir = resolve_weights(checkpoint_dir, runtime.cache_dir)
        config = read_checkpoint_config(checkpoint_dir)
        if not open_vocabulary and names == benchmark.categories:
            _check_categories(bench_name, bench, names, config, checkpoint_dir)
        with_objects = student_of(checkpoint_dir, config).gives_objects
        texts = config.texts
    metrics = _metrics(bench_name, bench, with_objects=with_objects)
    warnings = [*benchmark.warnings, *check_headers(benchmark)]
    prediction = BenchRun(
        bench_name=bench_name,
        bench=bench,
        categories=benchmark.categories,
        names=names,
        metrics=metrics,
        checkpoint_dir=checkpoint_dir,
        settings=_settings(params, bench, metrics),
        has_baseline=with_baseline and not LABEL_MAP_METRICS.isdisjoint(metrics),
        baseline=baseline,
        background=background,
        texts=texts_for(names, texts),
        batch_size=params.batch_size,
        warnings=warnings,
        onnx_path=onnx_path,
    )
    entries = images_to_predict(benchmark)
    job = Job(
        "predict_bench",
        entries,
        shard_size=shard_size,
        load=partial(PredictionMaker, prediction),
        inputs=[params.batch_size, names],
        files=[str(entry.image_path) for entry in entries],
        remedy=f"They lie below {bench.root}: benches.{bench_name}.root",
        max_error_rate=params.max_error_rate,
        section="evaluate",
        warnings=warnings,
        cached=cached_predictions(prediction, runtime),
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


def _metrics(bench_name: str, bench: BenchParams, *, with_objects: bool) -> list[str]:
    """What is scored; where no objects are predicted, label maps alone."""
    metrics: list[str] = [
        name for name in bench.metrics if with_objects or name in LABEL_MAP_METRICS
    ]
    if not metrics:
        raise PipelineError(
            f"benches.{bench_name}.metrics: {', '.join(bench.metrics)}: this model finds no "
            "objects; evaluate one that does, or a benchmark with `semantic`"
        )
    return metrics


def _settings(
    params: EvaluateParams, bench: BenchParams, metrics: Sequence[str]
) -> PredictionSettings:
    return PredictionSettings.of(
        params,
        resize_to=bench.resize_to or params.resize_to,
        max_side=bench.max_side or params.max_side,
        rounding=bench.rounding,
        background=bench.background,
        instances="instance" in metrics,
    )


def _asked_names(benchmark: Benchmark) -> list[str]:
    """The categories, and what else the vocabularies of single images hold."""
    vocabularies = {tuple(example.vocabulary or ()) for example in benchmark}
    return list(dict.fromkeys(chain(benchmark.categories, *sorted(vocabularies))))


def _check_categories(
    bench_name: str,
    bench: BenchParams,
    categories: Sequence[str],
    config: CheckpointConfig,
    checkpoint_dir: Path,
) -> None:
    """Refuse a checkpoint that was not trained with the categories, but for the unseen ones."""
    trained = config.categories
    untrained = [name for name in categories if name not in (*trained, *bench.unseen)]
    if untrained:
        unscored = [name for name in trained if name not in categories]
        raise PipelineError(
            f"benches.{bench_name}.categories differ from those of {checkpoint_dir}: "
            f"only in the benchmark: {listing(untrained)}; only in the checkpoint: "
            f"{listing(unscored)}; make them the same and train again, or evaluate with "
            "--open-vocabulary"
        )
