"""Stage 6: score a checkpoint on a labelled set, beside DenseCLIP alone on the same images.

Two steps: predictions of all images go to shards as they come, then one pass over the benchmark and
the shards scores them. Neither keeps masks of more than a batch of images in memory.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.benchmarks import Benchmark, open_bench
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, LocalExecutor, plan_key, run_shards, slices
from pipeline.errors import PipelineError
from pipeline.files import atomic_path, file_versions, write_json
from pipeline.inference.bench import PredictionMaker, load_predictor, queries_of
from pipeline.inference.checkpoint import read_checkpoint_config
from pipeline.inference.protocol import bench_protocol, protocol_lines
from pipeline.methods.inputs import PredictionSettings, prediction_settings
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.benches import BenchParams
from pipeline.params.sections import EvaluateParams, PseudoLabelParams
from pipeline.pictures.benchmark import write_pictures
from pipeline.scoring.board import ScoreBoard, percent
from pipeline.scoring.predictions import SHARD_SIZE, PredictionStore
from pipeline.scoring.task import ScoringTask
from pipeline.vocabulary.categories import load_category_set

LABEL_MAP_METRICS = {"semantic", "size"}
LISTED_NAMES = 8


def run(
    *,
    bench_name: str,
    bench: BenchParams,
    checkpoint_dir: Path | None,
    out_dir: Path,
    predictions_dir: Path,
    params: EvaluateParams,
    baseline: PseudoLabelParams,
    background: Sequence[str],
    runtime: Runtime,
    stats_path: Path,
    open_vocabulary: bool = False,
    result_name: str | None = None,
    executor: Executor | None = None,
) -> None:
    """Write predictions, `metrics/NAME.json`, `plots/NAME_per_class.csv` and `overlays/NAME/`.

    Scores are percentages with two decimals, null where there was nothing to score. Void pixels
    count nowhere: they are left out of the confusion matrix and cut out of all instance masks.

    Args:
        bench_name: name of the benchmark, for messages.
        bench: its entry of params.yaml.
        checkpoint_dir: folder that the train stage wrote, or name of published weights; None for
            DenseCLIP alone, which has label maps but no objects.
        out_dir: folder of reports.
        predictions_dir: folder of shards, see `pipeline.scoring.predictions`.
        params: section `evaluate` of params.yaml.
        baseline: section `pseudo_label`: the settings of DenseCLIP, the training-free baseline.
        background: names of label id 0 for DenseCLIP; the checkpoint brings its own.
        runtime: device, precision, and seed of corruptions.
        stats_path: counts of this run, JSON.
        open_vocabulary: score categories that the checkpoint was not trained with.
        result_name: NAME in the paths above; None for `bench_name`.
        executor: where predictions are made; here by default.

    Raises:
        PipelineError: a benchmark that lacks a part, a checkpoint that cannot be used, category
            lists that differ, or images of which none or too few can be read.
    """
    task = _scoring_task(bench_name, bench, background)
    benchmark = _open(bench, task)
    metrics = _metrics(bench_name, bench, with_objects=checkpoint_dir is not None)
    names = _asked_names(benchmark)
    if checkpoint_dir is not None:
        checkpoint_dir = resolve_weights(checkpoint_dir, runtime.cache_dir)
        if not open_vocabulary and names == benchmark.categories:
            _check_categories(bench_name, bench, names, checkpoint_dir)
    settings = _bench_settings(params, bench, metrics)
    open_predictor = partial(
        load_predictor,
        checkpoint_dir,
        names,
        settings=settings,
        has_baseline=not LABEL_MAP_METRICS.isdisjoint(metrics),
        baseline=baseline,
        background=background,
    )
    recipe = partial(
        PredictionMaker,
        open_predictor,
        benchmark.categories,
        params.batch_size,
        bench.corruption,
        bench_name,
    )
    maker = recipe(runtime)
    protocol = protocol_lines(
        maker.predictor.protocol
        | bench_protocol(
            bench,
            categories=task.categories,
            names=names,
            metrics=metrics,
            settings=settings,
            runtime=runtime,
        )
    )
    described = {"categories": list(task.categories), "protocol": protocol}
    queries = queries_of(benchmark)
    with StageRun(
        "evaluate",
        stats_path=stats_path,
        total=len(benchmark),
        max_error_rate=params.max_error_rate,
    ) as stage:
        run_shards(
            predictions_dir,
            slices(queries, SHARD_SIZE),
            key=plan_key(
                [described, params.batch_size, names],
                chain(queries, file_versions(str(query.image_path) for query in queries)),
            ),
            recipe=recipe,
            maker=maker,
            executor=executor or LocalExecutor(),
            stage=stage,
            settings=described,
            remedy=f"They lie below {bench.root}: benches.{bench_name}.root",
        )
        store = PredictionStore(predictions_dir)
        board = _score(benchmark, store, ScoreBoard(task, metrics=metrics, groups=benchmark.groups))
        name = result_name or bench_name
        write_pictures(
            out_dir / "overlays" / name,
            benchmark,
            store,
            image_miou=board.image_miou,
            load=maker.load,
            count=params.overlays,
        )
        _write_per_class(out_dir / "plots" / f"{name}_per_class.csv", task, board)
        write_json(out_dir / "metrics" / f"{name}.json", board.compute() | {"protocol": protocol})


def _open(bench: BenchParams, task: ScoringTask) -> Benchmark:
    return open_bench(
        format=bench.format,
        root=bench.root,
        split=bench.split,
        categories=list(task.categories),
        groups=bench.groups,
        **bench.layout(),
    )


def _score(benchmark: Benchmark, store: PredictionStore, board: ScoreBoard) -> ScoreBoard:
    """One pass over the benchmark and its predictions; `board` with all of them."""
    for example, prediction in tqdm(
        store.pair(benchmark), desc="score", total=len(store), leave=False, position=0
    ):
        board.add(example, prediction)
    return board


def _scoring_task(bench_name: str, bench: BenchParams, background: Sequence[str]) -> ScoringTask:
    categories = load_category_set(
        bench.categories, background=background, field=f"benches.{bench_name}.categories"
    )
    if strangers := [name for name in bench.unseen if name not in categories]:
        raise PipelineError(
            f"benches.{bench_name}.unseen: {_listing(strangers)}: not among its categories: "
            f"{_listing(categories)}"
        )
    unseen = frozenset(1 + categories.index(name) for name in bench.unseen)
    return ScoringTask(categories, background=bench.background, unseen=unseen)


def _metrics(bench_name: str, bench: BenchParams, *, with_objects: bool) -> list[str]:
    """What is scored; a labeller that finds no objects is scored by its label maps."""
    metrics: list[str] = [
        name for name in bench.metrics if with_objects or name in LABEL_MAP_METRICS
    ]
    if not metrics:
        raise PipelineError(
            f"benches.{bench_name}.metrics: {', '.join(bench.metrics)}: DenseCLIP alone finds no "
            "objects; use --model zutis, or a benchmark with `semantic`"
        )
    return metrics


def _bench_settings(
    params: EvaluateParams, bench: BenchParams, metrics: Sequence[str]
) -> PredictionSettings:
    return replace(
        prediction_settings(params),
        resize_to=bench.resize_to or params.resize_to,
        max_side=bench.max_side or params.max_side,
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
    checkpoint_dir: Path,
) -> None:
    """Refuse a checkpoint that was not trained with the categories, but for the unseen ones."""
    trained = read_checkpoint_config(checkpoint_dir).categories
    untrained = [name for name in categories if name not in (*trained, *bench.unseen)]
    if untrained:
        unscored = [name for name in trained if name not in categories]
        raise PipelineError(
            f"benches.{bench_name}.categories differ from those of {checkpoint_dir}: "
            f"only in the benchmark: {_listing(untrained)}; only in the checkpoint: "
            f"{_listing(unscored)}; make them the same and train again, or evaluate with "
            "--open-vocabulary"
        )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return (", ".join(names[:LISTED_NAMES]) or "none") + more


def _write_per_class(path: Path, task: ScoringTask, board: ScoreBoard) -> None:
    """CSV of scores by class, the background's first if it counts; empty cells for no score."""
    columns = board.per_class()
    first = 0 if task.background else 1
    names = ["background", *task.categories][first:]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["category", *columns])
        for name, *values in zip(
            names, *(column[first:] for column in columns.values()), strict=True
        ):
            writer.writerow([name, *("" if np.isnan(v) else percent(v) for v in values)])
