"""Commands of the embedded default: its drawn world and its tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import PATHS, EntryStatsPath, MasksPath, Session, try_outputs

NUM_COMPOSED = 100  # training images that there could be; the first few are drawn

demo_app = typer.Typer(help="The embedded default: its drawn world and its tiny networks.")


@demo_app.command()
def world(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="Name of an entry under `worlds:`.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Folder of the world.")] = None,
    stats: EntryStatsPath = None,
) -> None:
    """Draw the demo's index dataset and benchmark."""
    from pipeline.demo.world import draw_world

    session: Session = ctx.obj
    out = out or PATHS["worlds"] / name
    stats = stats or PATHS["stats"] / f"world-{name}.json"
    try_outputs(stats, folders=[out])
    draw_world(
        out,
        params=session.entry("worlds", name),
        seed=session.params.seed,
        stats_path=stats,
    )


@demo_app.command()
def picture(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("docs/demo.png"),
    bench: Annotated[str, typer.Option(help="Name of a benchmark under `benches:`.")] = "voc",
    predictions: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's predictions.")
    ] = None,
) -> None:
    """Draw the README's picture from the benchmark and its predictions."""
    from pipeline.demo.picture import draw_picture

    session: Session = ctx.obj
    try_outputs(out)
    draw_picture(
        predictions or PATHS["predictions"] / bench,
        out,
        bench=session.entry("benches", bench),
    )


@demo_app.command()
def steps(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder of archives.png, labels.png and training.png.")
    ] = Path("docs/steps"),
    archives: Annotated[Path, typer.Option(help="Parquet file of the archives.")] = PATHS[
        "archives"
    ],
    masks: MasksPath = PATHS["masks"],
    labels: Annotated[Path, typer.Option(help="Folder of the label shards.")] = PATHS["labels"],
) -> None:
    """Draw the documentation's pictures of what the stages make."""
    from pipeline.demo.steps import draw_archives, draw_labels, draw_training
    from pipeline.methods.students import TrainingInputs, training_data
    from pipeline.vocabulary.categories import Names

    session: Session = ctx.obj
    try_outputs(folders=[out])
    draw_archives(archives, masks, out / "archives.png")
    draw_labels(archives, masks, labels, out / "labels.png")
    names = Names(session.categories, session.params.background)
    inputs = TrainingInputs(masks, labels, names, NUM_COMPOSED, session.runtime)
    draw_training(training_data(session.params.train, inputs), out / "training.png")


@demo_app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the two networks.")] = PATHS["demo_models"],
    work: Annotated[Path, typer.Option(help="Folder of the resumable state.")] = Path("data/work"),
    seed: Annotated[int, typer.Option(help="Seed of images and initial weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Pre-train the tiny CLIP and the tiny SelfMask; continues where it was stopped."""
    from pipeline.demo.pretrain import pretrain as run
    from pipeline.engine.runtime import make_runtime

    try_outputs(folders=[out, work])
    run(out, work, runtime=make_runtime(device=device, seed=seed))
