"""Further rounds: the student labels the archives anew, and is trained again on that."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import (
    PATHS,
    CorrectionsPath,
    EntryStatsPath,
    LabelReviewPath,
    MasksPath,
    Session,
    try_outputs,
)
from pipeline.cli.dry_run import DryRunOption, start
from pipeline.errors import PipelineError
from pipeline.files import Location

if TYPE_CHECKING:
    from pipeline.inference.held_out import RoundInputs
    from pipeline.methods.students import TrainParams
    from pipeline.params.sections import RoundParams

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
    corrections: CorrectionsPath = PATHS["corrections"],
    review: LabelReviewPath = PATHS["review_labels"],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new shards; default: data/rounds/NAME.")
    ] = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Label the archive images by a trained student, for one more round of training.

    An entry names, as `after`, the checkpoint that labels (docs/training.md, Rounds). Corrected
    images keep their corrections, rejected ones are left out.
    """
    from pipeline.stages import relabel as stage

    session: Session = ctx.obj
    entry = session.entry("rounds", name)
    out = out or PATHS["round_labels"] / name
    stats = stats or PATHS["stats"] / f"relabel-{name}.json"
    if not dry_run:
        try_outputs(stats, folders=[out])
    inputs = _inputs(session, entry, masks, labels, corrections, review)
    dry = None
    if dry_run:
        dry = start("relabel", reads=_reads(inputs), writes=[out], stats=stats)
    stage.run(
        inputs,
        out_dir=out,
        runtime=session.runtime,
        stats_path=stats,
        executor=dry or session.executor(),
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
    review: LabelReviewPath = PATHS["review_labels"],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; default: models/rounds/NAME.")
    ] = None,
    stats: EntryStatsPath = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a student on the labels of `relabel`, and keep it if it agrees no less than the former.

    The checkpoint in OUT is the one in force after the round: a new one, or the former again.
    """
    from pipeline.engine.dry_run import DryRun
    from pipeline.stages import retrain as stage
    from pipeline.stages import train

    session: Session = ctx.obj
    entry = session.entry("rounds", name)
    relabelled = relabelled or PATHS["round_labels"] / name
    out = out or PATHS["rounds"] / name
    stats = stats or PATHS["stats"] / f"retrain-{name}.json"
    if not dry_run:
        try_outputs(stats, folders=[out])
    inputs, runtime = _inputs(session, entry, masks, labels, corrections, review), session.runtime
    params = inputs.training(relabelled)
    if dry_run:
        reads = {**_reads(inputs), f"relabel --name {name}": relabelled}
        dry = start("retrain", reads=reads, writes=[out], stats=stats)
        # It is trained by the settings of `train`, and so at its rate.
        at_rate_of_train = DryRun(PATHS["stats"] / "train.json")
        train.dry_run(at_rate_of_train, params=params, cache_dir=runtime.cache_dir)
        stage.dry_run(dry, inputs, runtime=runtime)
        return
    start_time = time.monotonic()
    train.run(
        masks_dir=relabelled,
        labels_dir=relabelled,
        corrections_dir=corrections,
        out_dir=out / CANDIDATE,
        live_dir=out / "live",
        categories=session.categories,
        background=session.params.background,
        texts=session.params.texts,
        params=params,
        runtime=runtime,
        stats_path=out / "train.json",
    )
    stage.run(
        inputs,
        candidate_dir=out / CANDIDATE,
        out_dir=out,
        runtime=runtime,
        stats_path=stats,
        trained_seconds=time.monotonic() - start_time,
    )
    shutil.rmtree(out / CANDIDATE)


def _inputs(
    session: Session,
    entry: RoundParams,
    masks: Path,
    labels: Path | None,
    corrections: Path,
    review: Path,
) -> RoundInputs:
    """What both halves of a round are made from."""
    from pipeline.inference.held_out import RoundInputs

    targets = _targets(session)
    return RoundInputs(
        masks_dir=masks,
        labels_dir=labels or targets.labels,
        categories=session.categories,
        params=entry,
        targets=targets,
        evaluate=session.params.evaluate,
        corrections_dir=corrections,
        review_path=review,
    )


def _reads(inputs: RoundInputs) -> dict[str, Location]:
    """Inputs of both halves, by the command that makes them."""
    after, labels = inputs.params.after, inputs.needed_labels_dir
    of_round = after.parent == PATHS["rounds"]
    return {
        "mask": inputs.masks_dir,
        **({"pseudo_label": labels} if labels else {}),
        (f"retrain --name {after.name}" if of_round else "train"): after,
    }


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
