"""DenseCLIP+ beside the network of `train`: trained, and scored with its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import PATHS, Session, try_outputs
from pipeline.files import read_json, write_json

if TYPE_CHECKING:
    from pipeline.params.sections import PlusParams

plus_app = typer.Typer()
TEACHER, GUIDED, SELF_TRAINED = "teacher", "guided", "self_trained"


@plus_app.command()
def plus(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="Name of an entry under `plus:` in the params.")],
    masks: Annotated[Path, typer.Option(help="Folder of the mask shards.")] = PATHS["masks"],
    out: Annotated[Path | None, typer.Option(help="Folder of the checkpoint.")] = None,
    reports: Annotated[Path | None, typer.Option(help="Folder of curves and scores.")] = None,
    stats: Annotated[Path | None, typer.Option(help="Folder of the counts (JSON).")] = None,
) -> None:
    """Train a DenseCLIP+ and score it, its state at the switch to self-training, and its teacher.

    Scores are in `scores.json` of the folder of reports; `compare` gathers them.
    """
    from pipeline.stages import train as stage
    from pipeline.stages.compare import SCORES_NAME

    session: Session = ctx.obj
    entry: PlusParams = session.entry("plus", name)
    out, reports = out or PATHS["plus"] / name, reports or PATHS["plus_reports"] / name
    stats = stats or PATHS["stats"] / f"plus-{name}"
    try_outputs(folders=[out, reports, stats])
    params = entry.train
    stage.run(
        masks_dir=masks,
        labels_dir=params.labels if params.needs_labels else None,
        out_dir=out,
        live_dir=reports / "live",
        categories=session.categories,
        background=session.params.background,
        params=params,
        runtime=session.runtime,
        stats_path=stats / "train.json",
    )
    scored: dict[str, Path | None] = {TEACHER: None, GUIDED: out}
    if (out / GUIDED).is_dir():
        scored |= {GUIDED: out / GUIDED, SELF_TRAINED: out}
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
