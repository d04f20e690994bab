"""Further rounds: the student labels the archives anew, and is trained again on that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import (
    PATHS,
    CorrectionsPath,
    EntryStatsPath,
    MasksPath,
    Session,
    try_outputs,
)
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.methods.students import TrainParams

rounds_app = typer.Typer()
CANDIDATE = "candidate"  # folder of a checkpoint that is not yet judged
RoundName = Annotated[str, typer.Option(help="Name of an entry under `rounds:` in the params.")]
LabelsPath = Annotated[
    Path | None, typer.Option(help="Folder of the label shards; default: train.labels.")
]


@rounds_app.command()
def relabel(
    ctx: typer.Context,
    name: RoundName,
    masks: MasksPath = PATHS["masks"],
    labels: LabelsPath = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new shards; default: data/rounds/NAME.")
    ] = None,
    stats: EntryStatsPath = None,
) -> None:
    """Label the archive images by a trained student, for one more round of training.

    An entry names, as `after`, the checkpoint that labels (docs/training.md, Rounds).
    """
    from pipeline.stages import relabel as stage

    session: Session = ctx.obj
    entry = session.entry("rounds", name)
    out = out or PATHS["round_labels"] / name
    stats = stats or PATHS["stats"] / f"relabel-{name}.json"
    try_outputs(stats, folders=[out])
    targets = _targets(session)
    stage.run(
        masks_dir=masks,
        labels_dir=labels or targets.labels,
        out_dir=out,
        categories=session.categories,
        params=entry,
        targets=targets,
        evaluate=session.params.evaluate,
        runtime=session.runtime,
        stats_path=stats,
        executor=session.executor(),
    )


@rounds_app.command()
def retrain(
    ctx: typer.Context,
    name: RoundName,
    masks: MasksPath = PATHS["masks"],
    labels: LabelsPath = None,
    relabelled: Annotated[
        Path | None,
        typer.Option(help="Folder of what `relabel` wrote; default: data/rounds/NAME."),
    ] = None,
    corrections: CorrectionsPath = PATHS["corrections"],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; default: models/rounds/NAME.")
    ] = None,
    stats: EntryStatsPath = None,
) -> None:
    """Train a student on the labels of `relabel`, and keep it if it agrees no less than the former.

    The checkpoint in OUT is the one in force after the round: a new one, or the former again.
    """
    from pipeline.stages import retrain as stage
    from pipeline.stages import train

    session: Session = ctx.obj
    entry = session.entry("rounds", name)
    relabelled = relabelled or PATHS["round_labels"] / name
    out = out or PATHS["rounds"] / name
    stats = stats or PATHS["stats"] / f"retrain-{name}.json"
    try_outputs(stats, folders=[out])
    targets = _targets(session)
    # The labels are final, and objects are told apart in them.
    final = {"target": "denseclip", "split_components": False, "labels": relabelled}
    train.run(
        masks_dir=relabelled,
        labels_dir=relabelled,
        corrections_dir=corrections,
        review_path=PATHS["review_labels"],
        out_dir=out / CANDIDATE,
        live_dir=out / "live",
        categories=session.categories,
        background=session.params.background,
        texts=session.params.texts,
        params=targets.model_copy(update=final),
        runtime=session.runtime,
        stats_path=out / "train.json",
    )
    stage.run(
        masks_dir=masks,
        labels_dir=labels or targets.labels,
        corrections_dir=corrections,
        candidate_dir=out / CANDIDATE,
        out_dir=out,
        categories=session.categories,
        params=entry,
        targets=targets,
        evaluate=session.params.evaluate,
        runtime=session.runtime,
        stats_path=stats,
    )
    shutil.rmtree(out / CANDIDATE)


def _targets(session: Session) -> TrainParams:
    """Section `train`, of a student that rounds are for.

    Raises:
        PipelineError: it is of another one.
    """
    from pipeline.methods.students import TrainParams

    params = session.params.train
    if not isinstance(params, TrainParams):
        raise PipelineError(
            f"{session.params_path}: train.student: {params.student}: rounds label the pasted "
            "samples of a student such as zutis anew; DenseCLIP+ labels for itself "
            "(train.self_training): remove the entries of `rounds:`"
        )
    return params
