"""`pipeline new`: a ready workspace, outside of the project's repository."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from pipeline.cli.common import preset_names
from pipeline.errors import PipelineError
from pipeline.presets import OWN_IMAGES
from pipeline.workspace.making import DEMO, make_workspace, start_dvc, upgrade_workspace

OWN_PRESETS = ", ".join(f"`{name}`" for name in OWN_IMAGES)
DEFAULT_PRESET = "folder"

new_app = typer.Typer()


@new_app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="Made if it is missing.")],
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="The drawn world: `--preset demo`, no download; needs the extra `demo`.",
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Name of a preset, see `pipeline init --preset list`; default: {DEFAULT_PRESET}."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help=f"Folder of unlabelled images (presets {OWN_PRESETS}).")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help=f"Names between commas (presets {OWN_PRESETS}).")
    ] = None,
    start: Annotated[
        bool, typer.Option("--init/--no-init", help="Initialise git and DVC there.")
    ] = True,
    force: Annotated[
        bool, typer.Option(help="Overwrite files that are there, none of data/.")
    ] = False,
    upgrade: Annotated[
        bool, typer.Option(help="Only bring dvc.yaml and the version to the installed package.")
    ] = False,
) -> None:
    """Make a workspace: dvc.yaml, params.yaml, .gitignore, README, a place for images, git and DVC.

    Its stages run from the installed package, so it needs no copy of the code. Stages depend on the
    package's version; after an upgrade of the package, `pipeline new DIR --upgrade`.
    """
    if demo and preset not in (None, DEMO):
        raise PipelineError(f"--demo is `--preset {DEMO}`, not {preset}; give one of the two")
    if upgrade:
        if demo or preset or images or categories or force:
            raise PipelineError("--upgrade keeps the params; give it alone")
        written = upgrade_workspace(folder)
        print(f"{folder}: {', '.join(map(str, written))} written; now run: dvc repro")
        return
    preset = preset or (DEMO if demo else DEFAULT_PRESET)
    listed = preset_names(categories, preset)
    written = make_workspace(folder, preset=preset, images=images, categories=listed, force=force)
    print(f"{folder}: {len(written)} files written from preset {preset}")
    if start:
        print("\n".join(start_dvc(folder)))
        print(_next_steps(folder))
    else:
        print(_next_steps(folder, "git init && dvc init"))


def _next_steps(folder: Path, *first: str) -> str:
    """What to run, a step a line."""
    moved = " && ".join([f"cd {quote(str(folder))}", *first])
    return (
        f"now run: {moved}\n"
        "         pipeline doctor   # what a run needs here: downloads, extras, disk\n"
        "         dvc repro"
    )
