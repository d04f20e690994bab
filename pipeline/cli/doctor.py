"""`pipeline doctor`: what a run would meet here, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import PATHS, Session
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.doctor.finding import Finding

doctor_app = typer.Typer()
ROW, FIX = "{:5} {:15} {}", "{:21} fix: {}"


@doctor_app.command()
def doctor(
    ctx: typer.Context,
    offline: Annotated[bool, typer.Option("--offline", help="Try no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for scripts.")] = False,
) -> None:
    """Check machine, workspace and params, and say what to do; status 1 if a run would fail.

    Python and packages, device, memory, disks, cache; git and DVC; and what the params ask for:
    data, weights, extras, and whether the hubs answer that have what is missing.
    """
    findings = _findings(ctx.obj, offline=offline)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(ROW.format(finding.state, finding.name, finding.text))
            if finding.fix:
                print(FIX.format("", finding.fix))
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


def _findings(session: Session, *, offline: bool) -> list[Finding]:
    from pipeline.doctor.machine import check_machine
    from pipeline.doctor.params import check_params, idle_stages, params_finding
    from pipeline.doctor.workspace import check_workspace
    from pipeline.engine.runtime import default_cache_dir

    path, cache_dir, params = session.params_path, default_cache_dir(), None
    try:
        params, problem = session.params, None
        session.categories  # noqa: B018 - names that cannot be used
    except PipelineError as error:
        problem = error
    device = params.device if params else "auto"
    workspace = path.parent
    findings = [
        *check_machine(device, cache_dir=cache_dir, workspace=workspace),
        *check_workspace(workspace, idle=idle_stages(params) if params else ()),
        params_finding(path, problem),
    ]
    if params is not None:
        worlds = Path(PATHS["worlds"])
        findings += check_params(params, cache_dir=cache_dir, worlds_dir=worlds, offline=offline)
    return findings
