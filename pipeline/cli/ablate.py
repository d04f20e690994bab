"""The papers' ablations and ours, as DVC experiments."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import PARAMS, Session
from pipeline.errors import PipelineError

ablate_app = typer.Typer()


@ablate_app.command()
def ablate(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of an ablation; `list` lists them.")],
    bench: Annotated[
        str | None,
        typer.Option(
            help="Name of a benchmark under `benches:`; default: the first one, or the first for "
            "development where lifts are measured."
        ),
    ] = None,
    report_bench: Annotated[
        str | None,
        typer.Option(
            help="Name of another benchmark, which reports what is chosen on `--bench`; default: "
            "none, or the first that is not for development where lifts are measured."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of runs of a variant; default: as the ablation says."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a param for all variants, e.g. `--set train.iterations=300`; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be run.")] = False,
) -> None:
    """Run an ablation, a DVC experiment a variant and seed, and compare the scores.

    It starts from the last commit and a finished `dvc repro`, leaves the workspace as it was, and
    writes `reports/ablations/NAME.json`, which `pipeline report` shows beside the paper's numbers.
    Stages that a variant does not touch are not run again, nor is a variant that has been run from
    this commit: the same command continues after Ctrl-C. `dvc exp show` lists the experiments,
    `dvc exp apply` takes one over.
    """
    from pipeline.ablations.plan import parse_settings
    from pipeline.ablations.run import describe, overview, run

    session: Session = ctx.obj
    if session.params_path != PARAMS:
        raise PipelineError(
            f"--params: {session.params_path}: DVC's experiments vary {PARAMS}; leave it out"
        )
    if not PARAMS.is_file():
        raise PipelineError(f"{PARAMS}: no such file here; run this in the project's folder")
    if name == "list":
        print(overview())
        return
    given = parse_settings(settings or [])
    if dry_run:
        print(describe(name, bench=bench, report_bench=report_bench, seeds=seeds, settings=given))
    else:
        run(name, bench=bench, report_bench=report_bench, seeds=seeds, settings=given)
