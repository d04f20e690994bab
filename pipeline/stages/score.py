"""Stage 6, second half: predictions on a benchmark -> metrics, scores by class, and pictures.

No network is needed: what predicted, and how, stands in the manifest of the predictions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.corruptions import BenchImageReader
from pipeline.benchmarks.headers import check_headers
from pipeline.benchmarks.opening import open_benchmark
from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError
from pipeline.files import atomic_path, write_bytes, write_json
from pipeline.formats.images import encode_png
from pipeline.formats.labels import Predicted
from pipeline.formats.predictions import PredictionStore
from pipeline.formats.shards import MANIFEST
from pipeline.params.benches import BenchParams
from pipeline.pictures.benchmark import write_pictures
from pipeline.pictures.confusion import draw_confusion
from pipeline.scoring.board import ScoreBoard, percent
from pipeline.scoring.task import ScoringTask


def run(
    *,
    bench_name: str,
    bench: BenchParams,
    predictions_dir: Path,
    out_dir: Path,
    background: Sequence[str],
    overlays: int,
    seed: int,
    stats_path: Path,
    result_name: str | None = None,
) -> None:
    """Write `metrics/NAME.json`, `overlays/NAME/`, and below `plots` `NAME_per_class.csv`.

    Beside it `NAME_confusion.csv` has the pixels by true (row) and predicted class, which
    `NAME_confusion.png` shows; they are all 0 where no label maps are scored.

    Scores are percentages with two decimals, null where there was nothing to score. Void pixels
    count nowhere: they are left out of the confusion matrix and cut out of all instance masks.
    Masks of one image at a time are in memory.

    Args:
        bench_name: name of the benchmark, for messages.
        bench: its entry of params.yaml.
        predictions_dir: shards of `predict_bench`.
        out_dir: folder of reports.
        background: names of label id 0, which no category may have.
        overlays: number of pictures.
        seed: of corruptions.
        stats_path: counts of this run, JSON; `never_predicted` names the categories without a pixel
            in any label map.
        result_name: NAME in the paths above; None for `bench_name`.

    Raises:
        PipelineError: a benchmark that lacks a part, or predictions that are damaged or not of it.
    """
    benchmark = open_benchmark(bench_name, bench, background)
    store = PredictionStore(predictions_dir)
    described = _described(store, predictions_dir, benchmark.categories)
    unseen = frozenset(1 + benchmark.categories.index(name) for name in bench.unseen)
    task = ScoringTask(benchmark.categories, background=bench.background, unseen=unseen)
    board = ScoreBoard(task, metrics=described["metrics"], groups=benchmark.groups)
    name = result_name or bench_name
    predicted = Predicted(benchmark.categories)
    warnings = [*benchmark.warnings, *check_headers(benchmark)]
    with StageRun("score", stats_path=stats_path, total=len(store)) as stage:
        for text in warnings:
            if text not in described.get("warnings", []):  # else `predict_bench` has said it
                stage.warn(text)
        for example, prediction in store.pair(benchmark):
            board.add(example, prediction)
            predicted.add(prediction.labels)
            stage.advance()
        stage.note("never_predicted", predicted.never())
        write_pictures(
            out_dir / "overlays" / name,
            benchmark,
            store,
            image_miou=board.image_miou,
            load=BenchImageReader(
                bench.corruption,
                channels=bench.corruption_channels,
                bench_name=bench_name,
                seed=seed,
            ),
            count=overlays,
            background=bench.background,
        )
        _write_per_class(out_dir / "plots" / f"{name}_per_class.csv", task, board)
        _write_confusion(out_dir / "plots" / f"{name}_confusion", task, board.confusion())
        metrics = board.compute() | {"protocol": described["protocol"]}
        write_json(out_dir / "metrics" / f"{name}.json", metrics)


def dry_run(dry: DryRun, *, predictions_dir: Path) -> None:
    """Say what `run` would do.

    Raises:
        PipelineError: predictions that are damaged.
    """
    dry.items(len(PredictionStore(predictions_dir)))


def _described(
    store: PredictionStore, predictions_dir: Path, categories: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of the predictions, if they are of these categories."""
    described = store.manifest.get("predict_bench")
    if not isinstance(described, dict) or described.get("categories") != list(categories):
        raise PipelineError(
            f"{predictions_dir / MANIFEST}: not predictions of these categories; run "
            "`pipeline predict_bench` again"
        )
    return described


def _write_per_class(path: Path, task: ScoringTask, board: ScoreBoard) -> None:
    """CSV of scores by class, the background's first if it counts; empty cells for no score."""
    columns = board.per_class()
    first = 0 if task.background else 1
    rows = zip(_names(task), *(column[first:] for column in columns.values()), strict=True)
    _write_csv(
        path,
        ["category", *columns],
        ([name, *("" if np.isnan(v) else percent(v) for v in values)] for name, *values in rows),
    )


def _write_confusion(stem: Path, task: ScoringTask, counts: NDArray[np.int64]) -> None:
    """CSV and picture of the matrix, the background first if it counts."""
    first, names = 0 if task.background else 1, _names(task)
    scored = counts[first:, first:]
    rows = ([name, *row.tolist()] for name, row in zip(names, scored, strict=True))
    _write_csv(stem.with_name(f"{stem.name}.csv"), ["category", *names], rows)
    picture = draw_confusion(scored, names, {label_id - first for label_id in task.unseen})
    write_bytes(stem.with_name(f"{stem.name}.png"), encode_png(np.asarray(picture)))


def _names(task: ScoringTask) -> list[str]:
    """Classes that count, by label id."""
    return [*(["background"] if task.background else []), *task.categories]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
