"""Predictions on a benchmark and their scores, as `pipeline evaluate` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor
from pipeline.methods.dense import PseudoLabelParams
from pipeline.params.benches import BenchParams
from pipeline.params.sections import EvaluateParams
from pipeline.stages import predict_bench, score


def evaluate(
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
    executor: Executor | None = None,
) -> None:
    """Both stages; the counts of the first are at `stats_path`."""
    predict_bench.run(
        bench_name=bench_name,
        bench=bench,
        checkpoint_dir=checkpoint_dir,
        out_dir=predictions_dir,
        params=params,
        baseline=baseline,
        background=background,
        runtime=runtime,
        stats_path=stats_path,
        open_vocabulary=open_vocabulary,
        executor=executor,
    )
    score.run(
        bench_name=bench_name,
        bench=bench,
        predictions_dir=predictions_dir,
        out_dir=out_dir,
        background=background,
        overlays=params.overlays,
        seed=runtime.seed,
        stats_path=stats_path.with_name("score.json"),
    )
