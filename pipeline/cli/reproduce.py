"""The papers' tables made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import PATHS, Session, try_outputs

reproduce_app = typer.Typer()


@reproduce_app.command()
def reproduce(
    table: Annotated[
        str,
        typer.Argument(help="A table: zutis-3; or several: denseclip-2; `list` lists them."),
    ],
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Number of a row in the list, or a part of its name; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only print the commands, also those that lack something.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets, in place of data/raw.")
    ] = None,
) -> None:
    """Make this project's numbers of a paper's table, and print paper, ours and difference.

    The commands are printed and run; numbers that are there already are not made again, and what
    is missing, data or weights, is named. Results go to `reports/reproduced`, the rest to
    `data/reproduced`. Exit status: 0, every number is there (with `--dry-run`: there or can be
    made); 1, a command failed; 3, data or weights are missing.
    """
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.reproduce.run import Tables, overview
    from pipeline.reproduce.run import reproduce as make

    tables = Tables(data=data, cache_dir=default_cache_dir())
    if table == "list":
        print(overview(tables))
    else:
        raise typer.Exit(make(tables, table, rows=rows or [], dry_run=dry_run))


@reproduce_app.command()
def measure(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Metrics file to write.")] = PATHS["reports"]
    / "metrics/network.json",
) -> None:
    """Size of the image encoder of `train` and images a second of the network, without weights."""
    from pipeline.reproduce.measure import run

    session: Session = ctx.obj
    try_outputs(out)
    run(session.params.train, out, session.runtime)
