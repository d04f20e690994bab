"""A further round, second half: whether what was trained on its labels replaces the former."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import Runtime
from pipeline.files import atomic_path, write_json
from pipeline.formats.shards import SampleStore
from pipeline.inference.held_out import Agreement, RoundInputs, agreement, load_trained, split
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from pipeline.params.base import PredictionSettings
from pipeline.params.sections import RoundParams

OUTCOME, REJECTED = "round.json", "rejected"
DIGITS = 4


def run(
    inputs: RoundInputs,
    *,
    candidate_dir: Path,
    out_dir: Path,
    runtime: Runtime,
    stats_path: Path,
    trained_seconds: float = 0.0,
) -> None:
    """Write the checkpoint in force after a round: what it has trained, or the former one.

    Both label the images that no round trains on, see `RoundParams`, and are compared with their
    pseudo-labels, or with what a person has corrected; samples whose labels are rejected are left
    out. What is not kept goes to the folder `rejected`. `round.json` says what became of it:
    `kept`, the agreement of both and how far the shares moved, in percent.

    Args:
        inputs: what the round is made from.
        candidate_dir: the checkpoint that the round has trained.
        out_dir: folder of the one in force after it.
        runtime: device, precision and seed.
        stats_path: counts of this run, JSON.
        trained_seconds: what the training took, which is part of the stage's time.

    Raises:
        PipelineError: shards that do not fit the params, a checkpoint that cannot be used, or a
            damaged correction or review.
    """
    params, store = inputs.params, inputs.open_samples()
    held_out = _judged_by(inputs, store, runtime)
    settings = PredictionSettings.of(inputs.evaluate, instances=False)
    with StageRun(
        "retrain",
        stats_path=stats_path,
        total=2 * len(held_out),
        earlier_seconds=trained_seconds,
    ) as stage:
        archives = inputs.archives()
        before, after = (
            agreement(
                load_trained(folder, inputs.categories, settings, runtime),
                archives,
                store,
                held_out,
                batch_size=params.batch_size,
                tally=stage,
            )
            for folder in (params.after, candidate_dir)
        )
        reasons = _reasons_against(before, after, params)
        _tell(stage, before, after, reasons, params, len(held_out))
        _put(params.after if reasons else candidate_dir, out_dir)
        shutil.rmtree(out_dir / REJECTED, ignore_errors=True)
        if reasons:
            _put(candidate_dir, out_dir / REJECTED)
        write_json(
            out_dir / OUTCOME,
            {
                "kept": not reasons,
                "after": str(params.after),
                "agreement": round(100 * after.miou, DIGITS),
                "agreement_before": round(100 * before.miou, DIGITS),
                "drift": round(100 * after.drift_from(before), DIGITS),
                "held_out_images": len(held_out),
            },
        )


def dry_run(dry: DryRun, inputs: RoundInputs, *, runtime: Runtime) -> None:
    """Say what `run` would do.

    Raises:
        PipelineError: as `run`, but for the checkpoints.
    """
    held_out = _judged_by(inputs, inputs.open_samples(), runtime)
    dry.items(2 * len(held_out), text=f": {len(held_out)} held-out ones, by both checkpoints")


def _judged_by(inputs: RoundInputs, store: SampleStore, runtime: Runtime) -> list[int]:
    """Numbers of the samples that both checkpoints label."""
    left_out = inputs.decided(store).left_out
    return split(store, inputs.params.held_out, seed=runtime.seed, left_out=left_out)[1]


def _tell(
    stage: StageRun,
    before: Agreement,
    after: Agreement,
    reasons: Sequence[str],
    params: RoundParams,
    num_images: int,
) -> None:
    """Warn of a round that is rejected, with the reasons, or say that it is kept."""
    facts = (
        f"agreement on {num_images} held-out images {after.miou:.2%}, before it "
        f"{before.miou:.2%}; shares of categories moved by {after.drift_from(before):.2%}"
    )
    if reasons:
        stage.warn(
            f"the round is rejected, for {' and '.join(reasons)}: {facts}; the checkpoint of "
            f"{params.after} stays in force"
        )
    else:
        print(f"retrain: the round is kept: {facts}", flush=True)


def _reasons_against(before: Agreement, after: Agreement, params: RoundParams) -> list[str]:
    """Why the new checkpoint is not kept; none if it is."""
    reasons = []
    if after.miou < before.miou:
        reasons.append("the agreement has fallen")
    if after.drift_from(before) > params.drift_tolerance:
        reasons.append(f"drift_tolerance is {params.drift_tolerance:.0%}")
    return reasons


def _put(checkpoint_dir: Path, out_dir: Path) -> None:
    """Copy a checkpoint; neither file changes unless both could be written."""
    with (
        atomic_path(out_dir / CONFIG_NAME) as config_path,
        atomic_path(out_dir / WEIGHTS_NAME) as weights_path,
    ):
        shutil.copyfile(checkpoint_dir / CONFIG_NAME, config_path)
        shutil.copyfile(checkpoint_dir / WEIGHTS_NAME, weights_path)
