"""DenseCLIP+ beside the network of `train`: trained, and scored with its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import (
    PATHS,
    CorrectionsPath,
    LabelReviewPath,
    MasksPath,
    Session,
    try_outputs,
)
from pipeline.cli.dry_run import DryRunOption, start
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json

if TYPE_CHECKING:
    from pipeline.methods.students import DenseClipPlusParams
    from pipeline.params.sections import PlusParams

plus_app = typer.Typer()
TEACHER, GUIDED, SELF_TRAINED = "teacher", "guided", "self_trained"


@plus_app.command()
def plus(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="Name of an entry under `plus:` in the params.")],
    masks: MasksPath = PATHS["masks"],
    corrections: CorrectionsPath = PATHS["corrections"],
    review: LabelReviewPath = PATHS["review_labels"],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; default: models/plus/NAME.")
    ] = None,
    reports: Annotated[
        Path | None, typer.Option(help="Folder of curves and scores; default: reports/plus/NAME.")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Folder of the counts; default: reports/stats/plus-NAME.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a DenseCLIP+ and score it, its state at the switch to self-training, and its teacher.

    An entry has `train` (setting, data, backbone, head, teacher: docs/denseclip_plus.md) and
    `bench`, as under `benches:`. A run that was cut off is continued. Scores are in `scores.json`
    of the folder of reports; `compare` gathers them.
    """
    from pipeline.benchmarks.opening import open_benchmark
    from pipeline.stages import train as stage
    from pipeline.stages.compare import SCORES_NAME

    session: Session = ctx.obj
    entry: PlusParams = session.entry("plus", name)
    out, reports = out or PATHS["plus"] / name, reports or PATHS["plus_reports"] / name
    stats = stats or PATHS["stats"] / f"plus-{name}"
    params, background = entry.train, session.params.background
    labels = params.labels if params.needs_labels else None
    scored: dict[str, Path | None] = {TEACHER: None, GUIDED: out}
    if params.self_training != "off":
        scored |= {GUIDED: out / GUIDED, SELF_TRAINED: out}
    if dry_run:
        reads = {"mask": masks, "pseudo_label": labels} if params.data == "archives" else {}
        made = {maker: path for maker, path in reads.items() if path is not None}
        start("plus", reads=made, writes=[out, reports], stats=stats)
    else:
        try_outputs(folders=[out, reports, stats])
    with _named(f"{session.params_path}: plus.{name}"):
        # Before hours of training.
        benchmark = open_benchmark(name, entry.bench, background, field="bench")
        if dry_run:
            _say(params, scored, len(benchmark), stats, session.runtime.cache_dir)
            return
        stage.run(
            masks_dir=masks,
            labels_dir=labels,
            corrections_dir=corrections,
            review_path=review,
            out_dir=out,
            live_dir=reports / "live",
            categories=session.categories,
            background=background,
            texts=session.params.texts,
            params=params,
            runtime=session.runtime,
            stats_path=stats / "train.json",
        )
        scores = {
            title: _score(session, entry, title, checkpoint, reports, stats)
            for title, checkpoint in scored.items()
        }
    flat = {
        f"{title}_{key}": value
        for title in (TEACHER, GUIDED)
        for key, value in scores[title].items()
        if key in ("miou", "miou_unseen")
    }
    write_json(reports / SCORES_NAME, {**flat, **scores})


def _say(
    params: DenseClipPlusParams,
    scored: Iterable[str],
    num_images: int,
    stats: Path,
    cache_dir: Path,
) -> None:
    """What training and each network on the benchmark's images would do."""
    from pipeline.engine.dry_run import DryRun
    from pipeline.stages import train as stage

    stage.dry_run(DryRun(stats / "train.json"), params=params, cache_dir=cache_dir)
    for title in scored:
        print(f"then `predict_bench` and `score`: {title}")
        DryRun(stats / f"predict_bench-{title}.json").items(num_images)


@contextmanager
def _named(entry: str) -> Iterator[None]:
    """Errors that begin with the entry that they are of."""
    try:
        yield
    except PipelineError as error:
        raise PipelineError(f"{entry}: {error}") from None


def _score(
    session: Session,
    entry: PlusParams,
    title: str,
    checkpoint: Path | None,
    reports: Path,
    stats: Path,
) -> dict[str, Any]:
    """Metrics of a checkpoint on the entry's benchmark, or of the teacher alone."""
    from pipeline.stages import predict_bench, score

    params = session.params
    predictions = reports / "predictions" / title
    predict_bench.run(
        bench_name=title,
        bench=entry.bench,
        checkpoint_dir=checkpoint,
        out_dir=predictions,
        params=params.evaluate,
        baseline=entry.train.labeller,
        background=params.background,
        texts=params.texts,
        runtime=session.runtime,
        stats_path=stats / f"predict_bench-{title}.json",
        with_baseline=False,
        executor=session.executor(),
    )
    score.run(
        bench_name=title,
        bench=entry.bench,
        predictions_dir=predictions,
        out_dir=reports,
        background=params.background,
        overlays=params.evaluate.overlays,
        seed=params.seed,
        stats_path=stats / f"score-{title}.json",
    )
    metrics: dict[str, Any] = read_json(reports / f"metrics/{title}.json")
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


@plus_app.command()
def compare(
    ctx: typer.Context,
    reports: Annotated[Path, typer.Option(help="Folder of what `plus` reports.")] = PATHS[
        "plus_reports"
    ],
    out: Annotated[Path, typer.Option(help="Metrics file to write.")] = PATHS["reports"]
    / "metrics/plus.json",
) -> None:
    """Gather the scores of all entries under `plus:` in one metrics file."""
    from pipeline.stages import compare as stage

    session: Session = ctx.obj
    try_outputs(out)
    stage.run(reports_dir=reports, names=list(session.params.plus), out_path=out)
